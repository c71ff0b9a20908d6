"""The notebooks run from top to bottom, draw their plots, and are kept without outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_there_are_notebooks_and_their_names_are_in_order() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_in_the_usual_order(path: Path) -> None:
    notebook = read(path)
    assert outputs(notebook) == []
    headings = [
        line
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith(("# ", "## "))
    ]
    assert headings[0].startswith("# ")
    assert headings[1:3] == ["## Overview", "## Setup"]
    assert headings[-1] == "## API reference"


def fresh(folder: Path) -> Any:
    """A cell after which a notebook finds no name, figure or folder of the one before it.

    What was imported stays loaded, which is what one kernel saves, but no notebook can use it without its own import.
    """
    settings = {"AGENT_MEMORY_CACHE_DIR": str(folder / "store"), "AGENT_MEMORY_MIN_FREE_MB": "0"}
    source = f"""
import os
from matplotlib import pyplot
pyplot.close("all")
os.chdir({str(folder)!r})
os.environ.update({settings!r})
%reset -f
"""
    return nbformat.v4.new_code_cell(source)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def client() -> Iterator[nbclient.NotebookClient]:
    """One kernel for all notebooks."""
    nothing = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
    client = nbclient.NotebookClient(nothing, timeout=120, kernel_name="python3")
    with client.setup_kernel():
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, client: nbclient.NotebookClient) -> None:
    notebook = read(path)
    notebook.cells.insert(0, fresh(tmp_path))
    client.nb = notebook
    for index, cell in enumerate(notebook.cells):
        client.execute_cell(cell, index)
    made = outputs(notebook)
    assert [output for output in made if output.output_type == "error"] == []
    assert any("image/png" in output.get("data", {}) for output in made)
