"""Whoever lists, forks, pins or forgets sessions waits for the disk alone; turns go on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from support import engine_driver

from agent_memory_core import AgentMemory, EngineStopped
from agent_memory_core.storage.block_store import BlockStore

Open = Callable[..., engine_driver.Driver]
HELLO = [{"role": "user", "content": "Hello."}]


class SlowDisk:
    """Every commit waits until `go`, as it would for a disk that takes its time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.reached = threading.Event()
        commit = BlockStore.commit

        def slow(store: BlockStore, *arguments: Any) -> Any:
            self.reached.set()
            assert self.go.wait(120)
            return commit(store, *arguments)

        patch.setattr(BlockStore, "commit", slow)


@pytest.fixture
def caller() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


CALLS: dict[str, Callable[[AgentMemory], Any]] = {
    "sessions": lambda memory: memory.sessions(),
    "fork": lambda memory: memory.fork("kept", "copy"),
    "pin": lambda memory: memory.pin("kept"),
    "forget": lambda memory: memory.forget("kept"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_decode_goes_on_while_a_caller_waits_for_the_writer(
    llama: str, open_driver: Open, caller: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    memory = open_driver(llama).memory
    memory.chat(HELLO, session="kept", max_tokens=4)
    disk = SlowDisk(monkeypatch)
    writing = caller.submit(memory.chat, HELLO, session="written", max_tokens=4)
    assert disk.reached.wait(60)
    waiting: Future[Any] = caller.submit(CALLS[call], memory)
    with memory.chat(HELLO, stream=True, max_tokens=60) as stream:
        assert len(list(stream)) > 10, "a whole answer while the writer stands still"
    assert memory.stats().turns == 3
    assert not waiting.done()
    assert not writing.done(), "the last delta waits for the commit"
    disk.go.set()
    waiting.result(60)
    assert writing.result(60).report.persisted
    names = {info.session_id for info in memory.sessions()}
    assert "written" in names
    assert ("kept" in names) == (call != "forget")
    assert ("copy" in names) == (call == "fork")


def test_a_turn_in_flight_does_not_bring_a_forgotten_session_back(llama: str, open_driver: Open) -> None:
    memory = open_driver(llama).memory
    memory.chat(HELLO, session="s", max_tokens=4)
    stream = memory.chat(HELLO, session="s", stream=True, max_tokens=200)
    next(stream)
    assert memory.forget("s")
    rest = list(stream)
    assert rest[-1].report is not None
    assert not rest[-1].report.persisted
    assert memory.sessions() == []


def test_whoever_waits_is_let_go_when_the_memory_is_closed(
    llama: str, open_driver: Open, caller: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = open_driver(llama).memory
    disk = SlowDisk(monkeypatch)
    writing = caller.submit(memory.chat, HELLO, session="written", max_tokens=4)
    assert disk.reached.wait(60)
    waiting = caller.submit(memory._thread.flush)
    closing = caller.submit(memory.close)
    disk.go.set()
    assert writing.result(60).report.persisted, "what is queued is written, and its reader is told"
    waiting.result(60)
    closing.result(60)
    memory._thread.flush()
    with pytest.raises(EngineStopped):
        memory.sessions()
