"""An exported agent is imported whole: on another machine, under another id, in another namespace, or not at all."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from agents.conftest import PROMPT, OpenManager
from support.keys import KEY, give

from agent_memory_core import InvalidRequest, StoreError
from agent_memory_core.agents import AgentNotFound, PersistentAgentManager


@pytest.fixture
def exported(open_manager: OpenManager, tmp_path: Path) -> tuple[PersistentAgentManager, Path]:
    manager = open_manager()
    manager.create_agent("ada", "technical", PROMPT, metadata={"team": "red"})
    manager.generate("ada", "Hello.", 8)
    return manager, manager.export_agent("ada", tmp_path / "ada.agent")


def test_an_agent_goes_on_elsewhere_where_it_was(
    exported: tuple[PersistentAgentManager, Path], open_manager: OpenManager, tmp_path: Path
) -> None:
    here, path = exported
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    known = here.agents["ada"].cache_tokens
    there = open_manager(cache_dir=tmp_path / "there", namespace="other")
    agent = there.import_agent(path, "eve")
    told = here.agents["ada"]
    assert agent.conversation_history == told.conversation_history
    assert (agent.agent_type, agent.system_prompt, agent.metadata) == ("technical", PROMPT, {"team": "red"})
    assert there.generate("eve", "And now?", 4) == here.generate("ada", "And now?", 4)
    assert agent.last_report is not None
    assert agent.last_report.usage.cache_read >= known - 1
    assert there.memory.check().clean


def test_encrypted_stores_give_and_take(
    open_manager: OpenManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, KEY)
    here = open_manager(cache_dir=tmp_path / "here", encryption="env")
    here.create_agent("ada", "technical", PROMPT)
    there = open_manager(cache_dir=tmp_path / "there", encryption="env")
    agent = there.import_agent(here.export_agent("ada", tmp_path / "ada.agent"))
    assert agent.last_report is not None
    assert agent.last_report.usage.cache_read > 0


def test_a_model_with_other_weights_reads_the_text(
    exported: tuple[PersistentAgentManager, Path], open_manager: OpenManager, tmp_path: Path
) -> None:
    there = open_manager("tiny-chat", cache_dir=tmp_path / "there")
    agent = there.import_agent(exported[1])
    assert agent.last_report is not None
    assert agent.last_report.usage.cache_read == 0
    assert len(agent.conversation_history) == 2


def test_an_id_that_is_taken_and_one_that_is_unknown_are_refused(
    exported: tuple[PersistentAgentManager, Path], tmp_path: Path
) -> None:
    manager, path = exported
    with pytest.raises(InvalidRequest, match="'ada' exists"):
        manager.import_agent(path)
    with pytest.raises(AgentNotFound):
        manager.export_agent("nobody", tmp_path / "x")
    with pytest.raises(StoreError, match="nowhere"):
        manager.export_agent("ada", tmp_path / "nowhere" / "x")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        manager.import_agent(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "payload", "text", "type", "strange", "empty"])
def test_a_damaged_file_makes_no_agent(
    exported: tuple[PersistentAgentManager, Path], open_manager: OpenManager, tmp_path: Path, damage: str
) -> None:
    content = exported[1].read_bytes()
    middle = content.index(b"\n", content.index(b'"record"')) + 100
    broken = {
        "cut": content[:-20],
        "payload": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "text": content.replace(b'"messages"', b'"massages"', 1),
        "type": content.replace(b'"red"', b"[1, 2]", 1),
        "strange": b"something else\n" + content,
        "empty": b"",
    }
    (tmp_path / "broken").write_bytes(broken[damage])
    there = open_manager(cache_dir=tmp_path / "there")
    with pytest.raises(InvalidRequest, match="damaged"):
        there.import_agent(tmp_path / "broken")
    assert not there.agent_exists("ada")
    assert there.memory.sessions() == []
