"""Draws docs/ttft.png from the committed result of ttft.py: how long a cold, a resumed and a hot turn wait."""

from __future__ import annotations

import hashlib
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import HERE, Result, read

PICTURE = HERE.parent / "docs" / "ttft.png"
CODEC = "6/4"
KINDS = {"cold": "tab:gray", "resumed": "tab:blue", "hot": "tab:green", "floor": "lightgray"}
LABELS = {
    "cold": "cold: nothing is known",
    "resumed": "resumed from disk",
    "hot": "hot: in memory",
    "floor": "mlx-lm alone, only the new tokens",
}


def main() -> None:
    """Draw the picture."""
    draw(read("ttft"), PICTURE)
    print(f"wrote {PICTURE}")


def source() -> str:
    """The checksum of the result, which the picture carries: a test tells whether it was drawn from this one."""
    return hashlib.sha256((HERE / "results" / "ttft.json").read_bytes()).hexdigest()


def draw(result: Result, picture: Path) -> None:
    """A panel a length of conversation, a bar a kind of turn, on a logarithmic axis."""
    found = [
        (name, row["medians"]) for name, row in result["results"].items() if name.startswith(f"{CODEC},")
    ]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, sharex=True)
    for axes, (name, medians) in zip(panels, found, strict=True):
        _panel(axes, f"after {name.removeprefix(f'{CODEC}, ')}", medians)
    figure.supxlabel("seconds to the first token, logarithmic", fontsize=9)
    figure.savefig(picture, dpi=110, metadata={"Software": None, "Source": source()})


def _panel(axes: Axes, title: str, medians: dict[str, float]) -> None:
    rows = list(range(len(KINDS), 0, -1))
    bars = axes.barh(rows, [medians[kind] for kind in KINDS], color=list(KINDS.values()))
    axes.bar_label(bars, labels=[f"{medians[kind]:.2g} s" for kind in KINDS], padding=3, fontsize=9)
    axes.set_yticks(rows, [LABELS[kind] for kind in KINDS], fontsize=9)
    axes.set_xscale("log")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
