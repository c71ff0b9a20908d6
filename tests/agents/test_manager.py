"""Agents come, answer, go and come back: nothing is lost, and nothing that is known is computed again."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from agents.conftest import PROMPT, OpenManager
from support.fixed_volume import FixedVolume

from agent_memory_core import AgentMemory, InvalidRequest, InvalidSetting, SessionNotFound
from agent_memory_core.agents import AgentNotFound, AgentNotSaved, AgentsBusy, PersistentAgentManager


def test_a_new_agent_has_read_its_prompt_and_its_first_turn_reuses_it(open_manager: OpenManager) -> None:
    manager = open_manager()
    agent = manager.create_agent("ada", "technical", PROMPT)
    assert (agent.state, agent.persisted, agent.conversation_history) == ("prefilled", True, [])
    assert agent.cache_tokens > 0
    read = agent.cache_tokens
    answer = manager.generate("ada", "Hello.", 8)
    assert agent.last_report is not None
    assert agent.last_report.usage.cache_read == read
    assert agent.conversation_history == [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": answer},
    ]
    assert (agent.state, manager.agents["ada"]) == ("active", agent)


def test_an_agent_goes_on_after_a_restart_and_computes_what_is_new(open_manager: OpenManager) -> None:
    first = open_manager()
    first.create_agent("ada", "technical", PROMPT, metadata={"team": "red"})
    first.generate("ada", "Hello.", 8)
    history = first.agents["ada"].conversation_history
    first.close()
    second = open_manager()
    assert [(info.agent_id, info.messages, info.in_memory) for info in second.list_agents()] == [
        ("ada", 2, False)
    ]
    agent = second.load_agent("ada")
    assert (agent.state, agent.metadata, agent.conversation_history) == ("loaded", {"team": "red"}, history)
    known = agent.cache_tokens
    second.generate("ada", "And now?", 4)
    assert agent.last_report is not None
    usage = agent.last_report.usage
    assert usage.cache_read >= known - 1
    assert agent.last_report.hit_tier == "warm"


def test_an_agent_that_exists_is_returned_and_another_of_its_id_refused(open_manager: OpenManager) -> None:
    manager = open_manager()
    made = manager.create_agent("ada", "technical", PROMPT)
    assert manager.create_agent("ada", "technical", PROMPT) is made
    for agent_type, prompt in (("business", PROMPT), ("technical", "Other.")):
        with pytest.raises(InvalidRequest, match="ada"):
            manager.create_agent("ada", agent_type, prompt)
    manager.evict_lru()
    with pytest.raises(InvalidRequest, match="exists already"):
        manager.create_agent("ada", "technical", PROMPT, exist_ok=False)
    assert manager.create_agent("ada", "technical", PROMPT).state == "loaded"


@pytest.mark.parametrize("agent_id", ["../x", "Zoë ☕", "a" * 300])
def test_any_text_names_an_agent(open_manager: OpenManager, tmp_path: Path, agent_id: str) -> None:
    manager = open_manager()
    manager.create_agent(agent_id, "technical", "Brief.")
    manager.generate(agent_id, "Hello.", 2)
    manager.evict_lru()
    assert len(manager.load_agent(agent_id).conversation_history) == 2
    assert manager.delete_agent(agent_id)
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


def test_what_is_not_there_and_what_cannot_be_is_named(open_manager: OpenManager, tmp_path: Path) -> None:
    manager = open_manager()
    for ask in (manager.load_agent, manager.save_agent, lambda name: manager.generate(name, "Hello.")):
        with pytest.raises(AgentNotFound, match="nobody"):
            ask("nobody")
    assert issubclass(AgentNotFound, (SessionNotFound, ValueError))
    assert not manager.delete_agent("nobody")
    with pytest.raises(InvalidRequest, match="technical"):
        manager.create_agent("ada", "no such type")
    with pytest.raises(InvalidRequest, match="session id"):
        manager.create_agent("", "technical", "Brief.")
    with pytest.raises(InvalidSetting, match="max_agents"):
        open_manager(max_agents=0)
    with pytest.raises(InvalidSetting, match="exclude"):
        open_manager(memory=AgentMemory(cache_dir=None))


def test_few_seats_change_no_answer(open_manager: OpenManager, tmp_path: Path) -> None:
    few = open_manager(max_agents=3)
    many = open_manager(max_agents=7, cache_dir=tmp_path / "other")
    names = [f"agent {number}" for number in range(7)]
    for manager in (few, many):
        for name in names:
            manager.create_agent(name, "technical", f"{PROMPT} You are {name}.")
            assert len(manager.agents) <= manager.max_agents
    order = random.Random(7)
    for round_number in range(3):
        for name in order.sample(names, len(names)):
            asked = (name, f"Question {round_number}.", 4)
            assert few.generate(*asked) == many.generate(*asked)
            told = few.agents[name].last_report
            assert told is not None
            assert told.usage.cache_creation < 60
            assert len(few.agents) == 3


def test_turns_of_one_agent_follow_each_other(open_manager: OpenManager) -> None:
    manager = open_manager()
    manager.create_agent("ada", "technical", PROMPT)
    threads = [threading.Thread(target=manager.generate, args=("ada", f"Question {n}.", 4)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = manager.agents["ada"].conversation_history
    assert [message["role"] for message in history] == ["user", "assistant"] * 4
    assert {message["content"] for message in history[::2]} == {f"Question {n}." for n in range(4)}


def test_a_turn_that_was_given_up_is_not_written_down(open_manager: OpenManager) -> None:
    manager = open_manager()
    manager.create_agent("ada", "technical", PROMPT)
    with manager.stream("ada", "Hello.", 200) as stream:
        next(stream)
    with pytest.raises(InvalidRequest):
        manager.generate("ada", "Hello.", max_tokens=-1)
    answer = manager.generate("ada", "Again.", 4)
    assert [message["content"] for message in manager.agents["ada"].conversation_history] == [
        "Again.",
        answer,
    ]


def test_an_agent_whose_turn_goes_on_does_not_leave(open_manager: OpenManager) -> None:
    manager = open_manager(max_agents=1, timeout=0.2)
    manager.create_agent("ada", "technical", PROMPT)
    with manager.stream("ada", "Hello.", 200) as stream:
        next(stream)
        with pytest.raises(AgentsBusy, match="max_agents"):
            manager.create_agent("bob", "technical", PROMPT)
        with pytest.raises(AgentsBusy, match="'ada' has turns"):
            manager.generate("ada", "Hello.")
        assert manager.evict_lru() is None
    assert not manager.agent_exists("bob")
    manager.create_agent("bob", "technical", PROMPT)
    assert list(manager.agents) == ["bob"]


def test_where_nothing_can_be_saved_nobody_makes_room(
    open_manager: OpenManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = open_manager(max_agents=1)
    manager.create_agent("ada", "technical", PROMPT)
    volume = FixedVolume()
    volume.install(monkeypatch)
    volume.free = 0
    first = manager.generate("ada", "Hello. " * 20, 4)
    assert not manager.agents["ada"].persisted
    for make_room in (lambda: manager.create_agent("bob", "technical", PROMPT), manager.evict_lru):
        with pytest.raises(AgentNotSaved, match="'ada'"):
            make_room()
    assert not manager.agent_exists("bob")
    manager.generate("ada", "Still there?", 4)
    assert manager.agents["ada"].conversation_history[1]["content"] == first
    volume.free = 2**40 // 2
    assert manager.save_agent("ada").persisted
    manager.create_agent("bob", "technical", PROMPT)


def test_without_a_folder_agents_live_in_memory_and_none_leaves(llama: str) -> None:
    with AgentMemory(model=llama, cache_dir=None) as memory:
        with PersistentAgentManager(memory=memory, max_agents=1) as manager:
            manager.create_agent("ada", "technical", PROMPT)
            manager.generate("ada", "Hello.", 2)
            with pytest.raises(AgentNotSaved, match="cache_dir"):
                manager.create_agent("bob", "technical", PROMPT)
            assert manager.get_disk_usage()["total_bytes"] == 0
        assert not memory.closed


def test_a_shared_prompt_is_read_once_and_stored_once(open_manager: OpenManager) -> None:
    manager = open_manager()
    first = manager.create_agent("ada", "technical", PROMPT)
    before = manager.get_disk_usage()["total_bytes"]
    second = manager.create_agent("bob", "technical", PROMPT)
    assert second.last_report is not None
    assert second.last_report.usage.cache_read >= first.cache_tokens - 1
    usage = manager.get_disk_usage()
    assert usage["total_bytes"] - before < before / 2
    assert usage["shared_bytes"] > 0
    assert usage["num_agents"] == 2
    assert {name for name, _ in usage["per_agent"]} == {"ada", "bob"}


def test_saving_writes_nothing_again(open_manager: OpenManager, tmp_path: Path) -> None:
    manager = open_manager()
    manager.create_agent("ada", "technical", PROMPT)
    for number in range(4):
        manager.generate("ada", f"Question {number}. " * 10, 4)
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
        saved = manager.save_agent("ada")
        assert (saved.persisted, saved.tokens > 0, saved.nbytes > 0) == (True, True, True)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files
    assert manager.save_all() != []


def test_an_agent_leaves_when_it_is_told_to_and_is_read_before_its_turn(open_manager: OpenManager) -> None:
    manager = open_manager()
    manager.create_agent("ada", "technical", PROMPT)
    manager.generate("ada", "Hello.", 4)
    manager.evict_agent("ada")
    assert manager.agents == {}
    manager.evict_agent("ada")
    warmed = manager.prewarm_agent("ada")
    assert list(manager.agents) == ["ada"]
    assert warmed.usage.cache_read > 64
    manager.generate("ada", "And now?", 4)
    report = manager.agents["ada"].last_report
    assert report is not None
    assert report.usage.cache_read >= warmed.usage.prompt_tokens
    for unknown in (manager.evict_agent, manager.prewarm_agent):
        with pytest.raises(AgentNotFound):
            unknown("nobody")


def test_a_fork_knows_what_the_other_knows_and_goes_its_own_way(open_manager: OpenManager) -> None:
    manager = open_manager()
    manager.create_agent("ada", "technical", PROMPT)
    manager.generate("ada", "Hello.", 8)
    known = manager.agents["ada"].cache_tokens
    fork = manager.fork_agent("ada", "eve")
    assert fork.conversation_history == manager.agents["ada"].conversation_history
    manager.generate("eve", "Left or right?", 4)
    assert fork.last_report is not None
    assert fork.last_report.usage.cache_read >= known - 1
    manager.generate("eve", "Go left.", 4)
    assert len(fork.conversation_history) == len(manager.agents["ada"].conversation_history) + 4
    with pytest.raises(InvalidRequest, match="eve"):
        manager.fork_agent("ada", "eve")
    manager.delete_agent("ada")
    manager.generate("eve", "Still there?", 2)


def test_a_deleted_agent_is_gone_and_one_whose_history_is_cleared_stays(open_manager: OpenManager) -> None:
    manager = open_manager()
    agent = manager.create_agent("ada", "technical", PROMPT)
    read = agent.cache_tokens
    manager.generate("ada", "Hello.", 4)
    manager.clear_history("ada")
    assert (agent.conversation_history, agent.cache_tokens, agent.state) == ([], read, "prefilled")
    assert manager.delete_agent("ada")
    assert (manager.agent_exists("ada"), manager.memory.sessions(), dict(manager.agents)) == (False, [], {})


def test_another_model_goes_on_from_the_text(open_manager: OpenManager) -> None:
    manager = open_manager()
    manager.create_agent("ada", "technical", PROMPT)
    manager.generate("ada", "Hello.", 4)
    manager.close()
    other = open_manager("tiny-chat")
    other.generate("ada", "And now?", 4)
    report = other.agents["ada"].last_report
    assert report is not None
    assert (report.miss_reason, report.usage.cache_read) == ("model_changed", 0)
    assert len(other.agents["ada"].conversation_history) == 4


def test_answers_come_in_the_order_of_the_requests(open_manager: OpenManager, tmp_path: Path) -> None:
    together, alone = open_manager(), open_manager(cache_dir=tmp_path / "other")
    requests = [(name, f"Question {n}.", 4) for n in range(2) for name in ("ada", "bob", "eve", "joe")]
    for manager in (together, alone):
        for name in ("ada", "bob", "eve", "joe"):
            manager.create_agent(name, "technical", f"{PROMPT} You are {name}.")
    assert together.generate_concurrent(requests) == [alone.generate(*request) for request in requests]
    with pytest.raises(AgentNotFound, match="nobody"):
        together.generate_concurrent([("nobody", "Hello.", 2), ("ada", "Hello.", 2)])
    assert len(together.load_agent("ada").conversation_history) == 6


def test_what_agents_take_is_told(open_manager: OpenManager) -> None:
    manager = open_manager()
    assert manager.get_memory_usage()["total_gb"] == 0
    manager.create_agent("ada", "technical", PROMPT)
    usage = manager.get_memory_usage()
    assert usage["agents"]["ada"]["cache_tokens"] == manager.agents["ada"].cache_tokens
    assert usage["agents"]["ada"]["cache_mb"] > 0
    assert usage["total_gb"] == pytest.approx(usage["model_memory_gb"] + usage["total_cache_mb"] / 1024)
