"""The page about coordination: every example runs as it stands, and prints what the page shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from support.docs_page import Page, printed

from agent_memory_core.coordination import CoordinationService, spec
from langchain_agent_memory import ChatMLXPersistent

PAGE = Page("coordination.md")


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store of its own for each example, as for a reader who tries that one alone."""
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")
    yield
    ChatMLXPersistent().memory.close()


@pytest.mark.parametrize(
    ("code", "output"),
    [(code, output) for _, code, output in PAGE.examples()],
    ids=[title for title, *_ in PAGE.examples()],
)
def test_an_example_runs_and_prints_what_the_page_shows(code: str, output: str | None) -> None:
    found = printed(code)
    assert output is not None
    assert found == output


def test_the_page_names_what_there_is() -> None:
    for words in (spec.Topology, spec.DebateFormat, spec.DecisionMode):
        rows = re.findall(r"^\| `(\w+)` \|", PAGE.text, re.MULTILINE)
        assert set(get_args(words)) <= set(rows)
    calls = re.findall(
        r"`(\w+)[(`]", "\n".join(re.findall(r"^\| (`.*?) \|", PAGE.section("A session"), re.MULTILINE))
    )
    named = {call for call in calls if call not in rows}
    assert named
    assert [call for call in named if not hasattr(CoordinationService, call)] == []
