"""Runs notebooks, and as a program writes what they print and draw into them: `make notebooks`.

python tests/support/run_notebooks.py [NAME ...]
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbclient
import nbformat

FOLDER = Path(__file__).parents[2] / "notebooks"
VARIES = "varies"
"""The tag of a cell whose output is of one machine or one moment."""


def read(path: Path) -> Any:
    """A notebook."""
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


@contextmanager
def kernel() -> Iterator[nbclient.NotebookClient]:
    """One kernel for many notebooks."""
    nothing = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
    client = nbclient.NotebookClient(nothing, timeout=120, kernel_name="python3")
    with client.setup_kernel():
        yield client


def run(path: Path, folder: Path, client: nbclient.NotebookClient) -> Any:
    """The notebook with its outputs, run from top to bottom in this folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = read(path)
    notebook.cells.insert(0, _fresh(folder))
    client.nb = notebook
    for index, cell in enumerate(notebook.cells):
        client.execute_cell(cell, index)
    del notebook.cells[0]
    return notebook


def printed(cell: Any) -> str:
    """What a cell prints, without what differs from run to run."""
    texts = [o["text"] for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stdout"]
    return re.sub(r"0x[0-9a-f]+|agent-memory-notebook-\w+", "…", "".join(texts))


def draws(cell: Any) -> bool:
    """Whether a cell draws a picture."""
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def _fresh(folder: Path) -> Any:
    """A cell after which a notebook finds no name, figure or folder of the one before it.

    What was imported stays loaded, which is what one kernel saves, but no notebook can use it without its own import.
    """
    settings = {"AGENT_MEMORY_CACHE_DIR": str(folder / "store"), "AGENT_MEMORY_MIN_FREE_MB": "0"}
    source = f"""
import os
from matplotlib import pyplot
pyplot.close("all")
pyplot.rcParams["figure.dpi"] = 80
os.chdir({str(folder)!r})
os.environ.update({settings!r})
%reset -f
import gc, sys
gc.collect()
if "mlx.core" in sys.modules: sys.modules["mlx.core"].clear_cache()
"""
    return nbformat.v4.new_code_cell(source)  # type: ignore[no-untyped-call]


def _kept(outputs: list[Any]) -> list[Any]:
    """What is worth keeping of a cell's outputs: what it prints, as one text, and what it shows."""
    texts = "".join(o["text"] for o in outputs if o.output_type == "stream" and o.name == "stdout")
    shown = [o for o in outputs if o.output_type in ("display_data", "execute_result")]
    for output in shown:
        if output.output_type == "execute_result":
            output.execution_count = None
        if "image/png" in output["data"]:
            output["data"].pop("text/plain", None)
    stream = nbformat.v4.new_output("stream", name="stdout", text=texts)  # type: ignore[no-untyped-call]
    return ([stream] if texts else []) + shown


def _written(notebook: Any, path: Path) -> None:
    """Write a notebook without what only says when and how it was run."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = _kept(cell.outputs)
    nbformat.write(notebook, path)  # type: ignore[no-untyped-call]


def main() -> None:
    """Run the notebooks of these names, or all, and write their outputs."""
    names = sys.argv[1:]
    with kernel() as client:
        for path in sorted(FOLDER.glob("*.ipynb")):
            if names and path.stem not in names:
                continue
            with tempfile.TemporaryDirectory() as folder:
                _written(run(path, Path(folder), client), path)
            print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
