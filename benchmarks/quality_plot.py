"""Draws docs/quality.png from the committed result of quality.py: the size of each codec, and what it costs."""

from __future__ import annotations

import hashlib
from pathlib import Path

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
    """A row a codec, smallest below: its bytes, perplexity lost on tiny-chat, error on keys with outlier channels."""
    codecs = {name: row for name, row in result["results"]["codecs"].items() if name != "raw"}
    default, most = result["results"]["default"], bound(result["settings"]["targets"]["loss"])
    colors = ["tab:blue" if name == default else "tab:gray" for name in codecs]
    rows = list(range(len(codecs), 0, -1))
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    size, loss, error = figure.subplots(1, 3, sharey=True)
    bars = size.barh(rows, [row["bytes"] for row in codecs.values()], color=colors)
    size.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    size.set_yticks(rows, list(codecs))
    size.set_title("bytes a token", fontsize=10)
    for place, row, color in zip(rows, codecs.values(), colors, strict=True):
        loss.errorbar(100 * row["loss"], place, xerr=100 * row["loss error"], fmt="o", color=color, capsize=3)
        if "key error" in row:
            error.plot(100 * row["key error"], place, "o", color=color)
    _limit(loss, 100 * most)
    loss.set_title("perplexity lost on tiny-chat, %", fontsize=10)
    _limit(error, 100 * codecs["8/4"]["key error"])
    error.set_title("error of attention, outlier keys, %", fontsize=10)
    error.set_xlim(left=0)
    for axes in (size, loss, error):
        axes.spines[["top", "right"]].set_visible(False)
    size.margins(x=0.15)
    figure.savefig(picture, dpi=110, metadata={"Software": None, "Source": source()})


def _limit(axes: Axes, most: float) -> None:
    axes.axvline(most, color="firebrick", linewidth=1)
    axes.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()
