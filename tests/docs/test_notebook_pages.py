"""Notebooks as pages of the site: all that a reader of the notebook sees is on the page."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _converter() -> Any:
    """The module, which is beside the pages and in no package."""
    path = ROOT / "docs" / "_site" / "notebook_pages.py"
    spec = importlib.util.spec_from_file_location("notebook_pages", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


notebook_pages = _converter()
PAGES = notebook_pages.pages(ROOT / "notebooks")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_has_every_cell_output_and_picture(page: Any) -> None:
    cells = json.loads((ROOT / "notebooks" / f"{page.name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert page.text.startswith(f"# {page.title}\n")
    for cell in cells:
        for line in "".join(cell["source"]).splitlines():
            assert line.strip() in page.text
    for output in outputs:
        for line in "".join(output.get("text", [])).rstrip().splitlines():
            assert line in page.text
    assert len(page.pictures) == sum("image/png" in output.get("data", {}) for output in outputs)
    assert all(f"]({name})" in page.text for name in page.pictures)
    assert f"]({page.name}.ipynb)" in page.text


def test_text_with_backticks_stays_in_its_block() -> None:
    assert notebook_pages.fenced("a ``` b", "python") == "```` python\na ``` b\n````"
