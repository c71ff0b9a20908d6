"""Notebooks as pages of the site: their text, their code, and what they printed and drew when they were last run."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ABOUT = (
    "*This page is a notebook with what it printed and drew when it was last run. "
    "[Download it](NAME) and open it in Jupyter to run it yourself.*"
)


@dataclass
class NotebookPage:
    """One notebook as Markdown, and the pictures that the Markdown shows, by file name."""

    name: str
    title: str
    text: str
    pictures: dict[str, bytes] = field(default_factory=dict)


def pages(folder: Path) -> list[NotebookPage]:
    """All notebooks of a folder, in the order of their names."""
    return [page(path) for path in sorted(folder.glob("*.ipynb"))]


def page(path: Path) -> NotebookPage:
    """One notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    made = NotebookPage(path.stem, _title(cells, path.stem), "")
    parts = [part for cell in cells for part in _cell(cell, made)]
    parts.insert(1, ABOUT.replace("NAME", path.name))
    made.text = "\n\n".join(parts) + "\n"
    return made


def _title(cells: list[dict[str, Any]], otherwise: str) -> str:
    first = _joined(cells[0]["source"]) if cells else ""
    found = re.match(r"# (.+)", first)
    return found[1] if found else otherwise


def _cell(cell: dict[str, Any], made: NotebookPage) -> Iterator[str]:
    source = _joined(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        heading, _, rest = source.partition("\n")
        yield heading
        if rest.strip():
            yield rest.strip()
        return
    if source:
        yield fenced(source, "python")
    for output in cell.get("outputs", []):
        yield from _output(output, made)


def _output(output: dict[str, Any], made: NotebookPage) -> Iterator[str]:
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{made.name}-{len(made.pictures) + 1}.png"
        made.pictures[name] = base64.b64decode(_joined(data["image/png"]))
        yield f"![What the cell above draws]({name})"
        return
    text = _joined(output.get("text", data.get("text/plain", ""))).rstrip()
    if text:
        yield fenced(text, "{ .text .printed }")


def fenced(text: str, kind: str) -> str:
    """A block of code or of text, within more backticks than it has itself."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence} {kind}\n{text}\n{fence}"


def _joined(source: str | list[str]) -> str:
    """Text of a notebook, which is one string or a list of lines."""
    return source if isinstance(source, str) else "".join(source)
