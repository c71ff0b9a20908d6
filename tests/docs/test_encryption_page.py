"""The page about encryption: its example runs as it stands, its errors are raised, and what it names is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.docs_page import Page, printed
from support.keys import KEY, OTHER_KEY, give

from agent_memory_core import AgentMemory
from agent_memory_core.storage.master_key import SERVICE, USER

PAGE = Page("encryption.md")


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")
    give(monkeypatch, KEY)


def test_the_example_runs_and_prints_what_the_page_shows() -> None:
    ((_, code, output),) = PAGE.examples()
    assert printed(code) == output


def ask(encryption: str) -> None:
    with AgentMemory(encryption=encryption) as memory:
        memory.sessions()


@pytest.mark.parametrize("number", range(5))
def test_an_error_says_what_the_page_shows(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before: str | None = {2: "env", 3: "env", 4: "off"}.get(number)
    if before:
        ask(before)
    give(monkeypatch, [None, "teal", OTHER_KEY, KEY, KEY][number])
    PAGE.check_errors([lambda: ask("off" if number == 3 else "env")] * 5, number)


def test_the_entry_of_the_keyring_is_the_one_that_is_read() -> None:
    assert f"keyring set {SERVICE} '{USER}'" in PAGE.text


@pytest.mark.parametrize("page", ["README.md", "docs/format.md"])
def test_it_is_linked(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    assert "encryption.md)" in text
