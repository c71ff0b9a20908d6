"""`agent-memory agents` on a real store."""

from __future__ import annotations

from pathlib import Path

import pytest
from agents.conftest import OpenManager
from support import command_line, prompt_cache_files


def run(*arguments: str, code: int = 0, **more: str) -> str:
    done = command_line.command("agents", *arguments, code=code, **more)
    return done.stdout + done.stderr


@pytest.fixture
def store(open_manager: OpenManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with open_manager() as manager:
        manager.create_agent("ada", "technical", metadata={"field": "pumps"})
        manager.generate("ada", "Hello.", 4)
        monkeypatch.setenv("AGENT_MEMORY_MODEL", manager.memory.model_name)
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")
    return tmp_path / "store"


def test_agents_are_listed_shown_and_deleted(store: Path) -> None:
    assert "ada" in run("list")
    shown = run("show", "ada")
    assert all(words in shown for words in ("'technical'", "field = pumps", "user: Hello."))
    assert "was deleted" in run("delete", "ada")
    assert "no agent 'ada'" in run("delete", "ada", code=1)
    assert "--type technical makes one" in run("list")
    assert "create it first" in run("show", "ada", code=1)


def test_an_agent_travels_as_a_file(store: Path, tmp_path: Path) -> None:
    assert "was written" in run("export", "ada", str(tmp_path / "ada.agent"))
    assert "'eve' was imported with 2 messages" in run("import", str(tmp_path / "ada.agent"), "--as", "eve")
    prompt_cache_files.write(tmp_path / "old.safetensors")
    assert "'tech specialist'" in run("import", str(tmp_path / "old.safetensors"))
    assert all(name in run("list") for name in ("ada", "eve", "tech"))


def test_a_conversation_goes_on(store: Path) -> None:
    told = run("chat", "bob", "--type", "technical", "--max-tokens", "4", typed="Hello.\n\n")
    assert "prompt tokens reused" in told
    assert "after 2 messages" in run("chat", "bob", "--max-tokens", "4", typed="Again.\n\n")
    assert "--type makes one (" in run("chat", "nobody", code=1, typed="\n")


def test_without_a_folder_there_is_nothing_to_list(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", "none")
    assert "--cache-dir" in run("list", code=1)
