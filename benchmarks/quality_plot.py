"""Draws docs/quality.png from the committed result of quality.py: what each codec costs, against its size."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import HERE, Result, bound, read

PICTURE = HERE.parent / "docs" / "quality.png"


def main() -> None:
    """Draw the picture."""
    draw(read("quality"), PICTURE)
    print(f"wrote {PICTURE}")


def source() -> str:
    """The checksum of the result, which the picture carries: a test tells whether it was drawn from this one."""
    return hashlib.sha256((HERE / "results" / "quality.json").read_bytes()).hexdigest()


def draw(result: Result, picture: Path) -> None:
    """Two panels over the bytes of a token: perplexity lost on tiny-chat, and error on keys with outlier channels."""
    codecs = {name: row for name, row in result["results"]["codecs"].items() if name != "raw"}
    targets, raw = result["settings"]["targets"], result["results"]["codecs"]["raw"]["bytes"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, error = figure.subplots(1, 2)
    _points(loss, codecs, raw, "loss", result["results"]["default"])
    loss.axhline(100 * bound(targets["loss"]), color="firebrick", linewidth=1)
    loss.set_ylabel("perplexity lost on tiny-chat, %")
    known = {name: row for name, row in codecs.items() if "key error" in row}
    _points(error, known, raw, "key error", result["results"]["default"])
    error.axhline(100 * codecs["8/4"]["key error"], color="firebrick", linewidth=1)
    error.set_ylabel("error of attention, keys with outlier channels, %")
    error.set_ylim(bottom=0)
    for axes in (loss, error):
        axes.set_xlabel("bytes of a token at rest, % of raw")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110, metadata={"Software": None, "Source": source()})


def _points(axes: Axes, codecs: dict[str, Any], raw: float, what: str, default: str) -> None:
    for number, (name, row) in enumerate(codecs.items()):
        x, y = 100 * row["bytes"] / raw, 100 * row[what]
        color = "tab:blue" if name == default else "tab:gray"
        axes.errorbar(x, y, yerr=100 * row.get(f"{what} error", 0), fmt="o", color=color, capsize=3)
        side = -1 if number % 2 else 1
        axes.annotate(
            name,
            (x, y),
            (8 * side, 4),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            color=color,
            fontsize=8,
        )
    axes.margins(x=0.3)


if __name__ == "__main__":
    main()
