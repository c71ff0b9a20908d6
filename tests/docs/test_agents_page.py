"""The page about agents: its examples run one after another and print what it shows, and its errors are raised."""

from __future__ import annotations

import contextlib
import io
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.docs_page import Page

from agent_memory_core import AgentMemory
from agent_memory_core.agents import PersistentAgentManager
from agent_memory_core.cli.agents import app

PAGE = Page("agents.md")


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")


def test_the_examples_run_one_after_another_and_print_what_the_page_shows() -> None:
    names: dict[str, Any] = {"__name__": "example"}
    for title, code, output in PAGE.examples():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, title, "exec"), names)
        assert out.getvalue() == (output or ""), title


def test_the_template_is_one(tmp_path: Path) -> None:
    text = PAGE.text.split("```toml\n")[1].split("```")[0]
    (tmp_path / "own.toml").write_text(text)
    with PersistentAgentManager(templates=tmp_path) as manager:
        template = manager.templates["technical"]
    assert template.description == tomllib.loads(text)["description"]


def test_the_commands_are_there() -> None:
    told = {line.split()[2] for line in PAGE.text.splitlines() if line.startswith("agent-memory agents ")}
    assert told == {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]


def exists_already(manager: PersistentAgentManager) -> None:
    manager.create_agent("ada", "technical", "You help.")
    manager.create_agent("ada", "technical", "You do not.")


def not_saved(manager: PersistentAgentManager) -> None:
    with AgentMemory(cache_dir=None) as memory, PersistentAgentManager(memory=memory) as forgetful:
        forgetful.create_agent("ada", "technical", "You help.")
        forgetful.save_agent("ada")


def busy(manager: PersistentAgentManager) -> None:
    with PersistentAgentManager(memory=manager.memory, max_agents=1, timeout=0.1) as small:
        small.create_agent("ada", "technical", "You help.")
        with small.stream("ada", "Hello.", 100):
            small.create_agent("bob", "technical", "You help.")


def no_model(manager: PersistentAgentManager) -> None:
    with PersistentAgentManager("no-such-model") as lost:
        lost.create_agent("ada", "technical", "You help.")


PROVOKED: list[Callable[[PersistentAgentManager], object]] = [
    lambda manager: manager.generate("nobody", "Hello."),
    exists_already,
    lambda manager: manager.create_agent("ada", "sailor"),
    not_saved,
    busy,
    no_model,
    lambda manager: PersistentAgentManager(max_agents=0),
]


@pytest.mark.parametrize("number", range(7))
def test_an_error_says_what_the_page_says(number: int) -> None:
    with PersistentAgentManager() as manager:
        PAGE.check_errors([lambda provoke=provoke: provoke(manager) for provoke in PROVOKED], number)  # type: ignore[misc]
