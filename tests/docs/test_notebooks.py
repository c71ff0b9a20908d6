"""The notebooks run from top to bottom, draw their plots, and print what is kept in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import nbclient
import pytest
from support import run_notebooks
from support.run_notebooks import FOLDER, VARIES, draws, printed, read

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_notebooks_and_their_names_are_in_order() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(11)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs_and_in_the_usual_order(path: Path) -> None:
    notebook = read(path)
    assert any(draws(cell) for cell in notebook.cells)
    assert any(printed(cell) for cell in notebook.cells)
    assert path.stat().st_size < 300_000
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


@pytest.fixture(scope="module")
def client() -> Iterator[nbclient.NotebookClient]:
    with run_notebooks.kernel() as client:
        yield client


@pytest.mark.parametrize(
    "path",
    [
        # The first and the last one show that the way of running them works.
        path if path == NOTEBOOKS[0] else pytest.param(path, marks=pytest.mark.heavy)
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_a_notebook_prints_and_draws_what_is_kept_in_it(
    path: Path, tmp_path: Path, client: nbclient.NotebookClient
) -> None:
    kept = read(path).cells
    made = run_notebooks.run(path, tmp_path, client).cells
    for before, after in zip(kept, made, strict=True):
        assert draws(before) == draws(after)
        # A GPU rounds otherwise, so an answer may be another there.
        if VARIES not in before.metadata.get("tags", []) and mx.default_device() == mx.Device(mx.cpu):
            assert printed(after) == printed(before), "make notebooks"
