"""The page about ModelManager: its configuration and every example run as they stand, and print what the page shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.docs_page import Page, printed

from agent_memory_core.manager import ManagerConfig, ModelConfig, get_model_manager
from agent_memory_core.manager.events import EVENTS

PAGE = Page("model-manager.md")
EXAMPLES = list(PAGE.examples())


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's configuration where the page has it, and a store of its own for each example."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")
    found = re.search(r"```json\n(.*?)```", PAGE.text, re.DOTALL)
    assert found is not None
    file = tmp_path / "src" / "models" / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text(found[1])
    yield
    get_model_manager().shutdown()


@pytest.mark.parametrize(
    ("code", "output"),
    [(code, output) for _, code, output in EXAMPLES],
    ids=[title for title, *_ in EXAMPLES],
)
def test_an_example_runs_and_prints_what_the_page_shows(code: str, output: str | None) -> None:
    assert printed(code) == output


def test_the_page_names_every_key_and_event() -> None:
    for name in [*ModelConfig.model_fields, *ManagerConfig.model_fields, *EVENTS]:
        assert f"`{name}`" in PAGE.text or f'"{name}"' in PAGE.text, name
