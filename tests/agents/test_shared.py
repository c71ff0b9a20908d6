"""An agent goes on by its name on any machine: what was said to it moves as its session does, and nothing is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import command_line

from agent_memory_core import AgentMemory, InvalidRequest, Message, StoreError
from agent_memory_core.agents import AgentExists, mirror as agent_mirror
from agent_memory_core.agents.book import AgentBook, AgentRecord
from agent_memory_core.agents.mirror import KIND, AgentMirror
from agent_memory_core.agents.shared import SharedAgent

from .conftest import PROMPT, OpenManager

OpenMachine = Callable[..., tuple[AgentBook, AgentMirror]]


def said(*texts: str) -> list[Message]:
    return [Message("user", text) for text in texts]


def record(agent_id: str = "ada", prompt: str = "You help.") -> AgentRecord:
    return AgentRecord(agent_id, "chat", prompt, "m")


@pytest.fixture(autouse=True)
def _nothing_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_mirror, "FRESH", 0.0)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[OpenMachine]:
    """Opens books with mirrors, of machines that share nothing but a bucket. No model is loaded."""
    opened: list[Any] = []

    def open_one(name: str, **settings: Any) -> tuple[AgentBook, AgentMirror]:
        url = (tmp_path / "bucket").as_uri()
        memory = AgentMemory(cache_dir=tmp_path / name, min_free_mb=0, **{"cold_url": url, **settings})
        book = AgentBook(tmp_path / name, "default", memory.cipher())
        mirror = AgentMirror(memory, book, "default")
        opened.extend((mirror, memory, book))
        return book, mirror

    yield open_one
    for each in opened:
        each.close()


def texts(book: AgentBook, agent_id: str = "ada") -> list[str]:
    return [message.content for message in book.messages(agent_id)]


def test_it_goes_back_and_forth(machine: OpenMachine) -> None:
    (here, out), (there, back) = machine("here"), machine("there")
    here.add(record(), said("one"))
    assert here.unsent() == ["ada"]
    assert out.sync("ada")
    assert here.unsent() == []
    assert back.sync("ada")
    assert (there.get("ada"), texts(there)) == (here.get("ada"), ["one"])
    there.append("ada", said("two", "three"), "n")
    assert back.sync("ada")
    assert out.sync("ada")
    assert (texts(here), here.get("ada")) == (["one", "two", "three"], there.get("ada"))
    assert not out.sync("nobody")


def test_two_machines_at_once_lose_nothing(machine: OpenMachine) -> None:
    """In any order of saying and syncing both end with all that was said, each machine's in its own order."""
    for seed in range(3):
        chance = random.Random(seed)
        name = f"agent {seed}"
        machines = machine(f"here {seed}"), machine(f"there {seed}")
        books, mirrors = [book for book, _ in machines], [mirror for _, mirror in machines]
        books[0].add(record(name))
        mirrors[0].sync(name)
        mirrors[1].sync(name)
        for turn in range(12):
            one = chance.randrange(2)
            books[one].append(name, said(f"{one} {turn}"), "m")
            if chance.random() < 0.4:
                mirrors[chance.randrange(2)].sync(name)
        for mirror in (*mirrors, mirrors[0]):
            mirror.sync(name)
        found = texts(books[0], name)
        assert found == texts(books[1], name)
        assert sorted(int(text.split()[1]) for text in found) == list(range(12))
        for place in "01":
            own = [int(text.split()[1]) for text in found if text.startswith(place)]
            assert own == sorted(own)


def test_who_is_between_a_look_and_a_write_is_not_written_over(
    machine: OpenMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here, out), (there, back) = machine("here"), machine("there")
    here.add(record(), said("one"))
    out.sync("ada")
    back.sync("ada")
    there.append("ada", said("theirs"), "m")
    here.append("ada", said("mine"), "m")
    write = out._write
    between: list[Callable[[], object]] = [
        lambda: back.sync("ada"),
        lambda: here.append("ada", said("late"), "m"),
    ]

    def first_others(*arguments: Any) -> bool:
        if between:
            between.pop(0)()
        return write(*arguments)

    monkeypatch.setattr(out, "_write", first_others)
    out.sync("ada")
    # The second word came after the write and before it could be noted: what was written is not written twice.
    assert texts(here) == ["one", "theirs", "mine", "late"]
    back.sync("ada")
    assert texts(there) == texts(here)


def test_a_machine_that_is_killed_before_it_notes_what_it_gave_gives_nothing_twice(
    machine: OpenMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here, out), (there, back) = machine("here"), machine("there")
    here.add(record(), said("one"))
    with monkeypatch.context() as patch:
        patch.setattr(here, "settle", lambda *_: 1 / 0)
        for words in (["two"], ["three", "four"]):
            with pytest.raises(ZeroDivisionError):
                out.sync("ada")
            here.append("ada", said(*words), "m")
    out.sync("ada")
    back.sync("ada")
    assert texts(there) == texts(here) == ["one", "two", "three", "four"]
    here.append("ada", said("five"), "m")
    with monkeypatch.context() as patch:
        patch.setattr(here, "settle", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            out.sync("ada")
    here.clear("ada")
    here.append("ada", said("new"), "m")
    out.sync("ada")
    back.sync("ada")
    assert texts(there) == texts(here) == ["new"]


def test_what_was_cleared_or_deleted_does_not_come_back(machine: OpenMachine) -> None:
    (here, out), (there, back) = machine("here"), machine("there")
    here.add(record(), said("one"))
    out.sync("ada")
    back.sync("ada")
    here.clear("ada")
    assert here.unsent() == ["ada"]
    here.append("ada", said("new"), "m")
    out.sync("ada")
    back.sync("ada")
    assert texts(there) == ["new"]
    there.delete("ada", mark=True)
    assert there.unsent() == ["ada"]
    assert not back.sync("ada")
    assert there.unsent() == []
    assert not out.sync("ada")
    assert here.get("ada") is None
    # Another one of that name, which was made afterwards.
    here.add(record(prompt="You sing."), said("la"))
    out.sync("ada")
    assert back.sync("ada")
    assert texts(there) == ["la"]


def test_a_new_agent_stays_though_the_clock_of_who_deleted_the_last_one_was_ahead(
    machine: OpenMachine,
) -> None:
    (here, out), (there, back) = machine("here"), machine("there")
    mark = SharedAgent(None, deleted=time.time() + 100)
    assert out._memory.cold.write_text(KIND, "ada", mark.to_bytes(), None)
    here.add(record())
    assert out.sync("ada")
    assert back.sync("ada")
    assert there.get("ada") == here.get("ada")
    there.append("ada", said("one"), "m")
    there.delete("ada", mark=True)
    # It is deleted for its part by a clock that is right.
    assert not back.sync("ada")
    assert not out.sync("ada")
    assert here.get("ada") is None


def test_another_agent_of_that_id_is_no_agent_to_go_on_with(machine: OpenMachine) -> None:
    (here, out), (there, back) = machine("here"), machine("there")
    here.add(record(), said("one"))
    out.sync("ada")
    there.add(record(prompt="You sing."), said("la"))
    with pytest.raises(AgentExists, match="is another one in the object store"):
        back.sync("ada")
    assert texts(there) == ["la"]


def test_a_bucket_that_is_gone_costs_nothing_but_the_copy(machine: OpenMachine, tmp_path: Path) -> None:
    here, out = machine("here", cold_url="s3://bucket", cold_timeout_seconds=0.2, cold_ack="remote")
    here.add(record(), said("one"))
    out.look("ada")
    assert not out.changed("ada")
    assert here.unsent() == ["ada"]
    with pytest.raises(StoreError):
        out.sync("ada")
    out.close()
    # The next start puts it there.
    _, again = machine("here")
    again.close()
    there, back = machine("there")
    assert back.sync("ada")
    assert texts(there) == ["one"]


def test_without_a_cold_tier_nothing_is_noted(machine: OpenMachine) -> None:
    here, out = machine("here", cold_url=None)
    here.add(record(), said("one"))
    out.look("ada")
    assert out.changed("ada")


@pytest.mark.parametrize("data", [b"", b"{}", b'{"version": 2}', b'{"version": 1, "record": {}}', b"[1]"])
def test_what_is_no_agent_is_refused(machine: OpenMachine, data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="what the object store has is no agent"):
        SharedAgent.from_bytes(data)
    here, out = machine("here")
    here.add(record(), said("one"))
    out._memory.cold.write_text(KIND, "ada", data, None)
    out.look("ada")
    assert texts(here) == ["one"]


def test_an_agent_moves_by_its_name_and_computes_only_what_is_new(
    open_manager: OpenManager, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"cold_url": "memory://agents", "cold_ack": "remote"}
    here = open_manager(cache_dir=tmp_path / "here", **settings)
    here.create_agent("ada", "chat", PROMPT, metadata={"ship": "Beagle"})
    here.generate("ada", "My name is Ada.", 4)
    assert here.agents["ada"].persisted
    there = open_manager(cache_dir=tmp_path / "there", **settings)
    assert there.list_agents() == []
    context = there.load_agent("ada")
    assert (context.system_prompt, context.metadata) == (PROMPT, {"ship": "Beagle"})
    assert context.conversation_history == here.agents["ada"].conversation_history
    there.generate("ada", "Where am I?", 4)
    report = there.agents["ada"].last_report
    assert report is not None
    assert report.usage.cache_read > 100
    assert report.usage.cache_creation < 64
    here.generate("ada", "And now?", 4)
    assert [
        line["content"] for line in here.agents["ada"].conversation_history if line["role"] == "user"
    ] == [
        "My name is Ada.",
        "Where am I?",
        "And now?",
    ]
    assert here.delete_agent("ada")
    assert not there.agent_exists("ada")


def test_the_commands_carry_agents_too(
    open_manager: OpenManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")
    here = open_manager(cache_dir=tmp_path / "here")
    here.create_agent("ada", "chat", PROMPT)
    here.close()
    monkeypatch.setenv("AGENT_MEMORY_COLD_URL", (tmp_path / "bucket").as_uri())

    def run(*arguments: str, folder: str) -> str:
        return command_line.command(*arguments, "--cache-dir", str(tmp_path / folder)).stdout

    assert "what was said to 1 agent is there, too" in run("cold", "push", folder="here")
    assert "here are now the agents 'ada'" in run("cold", "pull", "ada", "nobody", folder="there")
    monkeypatch.delenv("AGENT_MEMORY_COLD_URL")
    assert PROMPT.strip() in run("agents", "show", "ada", folder="there").replace("\n", " ")
