"""Prompt caches of mlx-lm become agents: their words are taken, and their keys and values computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from agents.conftest import PROMPT, OpenManager
from support import prompt_cache_files

from agent_memory_core import InvalidRequest
from agent_memory_core.agents.poc import read_prompt_cache

NOBODY = json.dumps({"__metadata__": {"format": "mlx"}}).encode()
OLD = Path(prompt_cache_files.__file__).parent / "agent_of_mlx_lm_0_30_4.safetensors"


@pytest.fixture
def new(tmp_path: Path) -> Path:
    prompt_cache_files.write(tmp_path / "new.safetensors")
    return tmp_path / "new.safetensors"


def test_an_old_and_a_new_file_say_the_same(new: Path) -> None:
    old = read_prompt_cache(OLD)
    assert old == read_prompt_cache(new)
    assert (old.agent_id, old.agent_type) == ("tech specialist", "technical")
    assert [{"role": m.role, "content": m.content} for m in old.messages] == prompt_cache_files.SAID


def test_an_imported_agent_goes_on_from_its_text(open_manager: OpenManager) -> None:
    manager = open_manager()
    (agent,) = manager.import_poc(OLD)
    assert (agent.state, agent.conversation_history) == ("prefilled", prompt_cache_files.SAID)
    known = agent.cache_tokens
    manager.generate(agent.agent_id, "And now?", 4)
    assert agent.last_report is not None
    assert agent.last_report.usage.cache_read >= known - 1
    with pytest.raises(InvalidRequest, match="exists already"):
        manager.import_poc(OLD)


def test_a_folder_is_imported_whole_and_words_that_lack_have_defaults(
    open_manager: OpenManager, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        prompt_cache_files.write(tmp_path / f"{name}.safetensors", {"agent_id": name})
    manager = open_manager()
    agents = manager.import_poc(str(tmp_path))
    assert [(agent.agent_id, agent.agent_type, agent.system_prompt) for agent in agents] == [
        ("a", "imported", ""),
        ("b", "imported", ""),
    ]
    manager.generate("a", "Hello.", 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not the prompt cache"),
        (b"\xff" * 64, "header"),
        (b"\x02\0\0\0\0\0\0\0{}", "__metadata__"),
        (len(NOBODY).to_bytes(8, "little") + NOBODY, "agent_id"),
    ],
)
def test_what_is_no_prompt_cache_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InvalidRequest, match=says):
        read_prompt_cache(tmp_path / "x.safetensors")


def test_a_folder_without_any_is_named(open_manager: OpenManager, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no \.safetensors"):
        open_manager().import_poc(tmp_path)


def test_an_agent_is_written_as_a_prompt_cache_and_read_again(
    open_manager: OpenManager, tmp_path: Path
) -> None:
    manager = open_manager()
    agent = manager.create_agent("ada", "technical", PROMPT)
    manager.generate("ada", "Hello.", 8)
    path = manager.export_poc("ada", tmp_path / "ada.safetensors")
    found = read_prompt_cache(path)
    assert (found.agent_id, found.agent_type, found.system_prompt) == ("ada", "technical", PROMPT)
    assert [message.content for message in found.messages] == [
        message["content"] for message in agent.conversation_history
    ]
