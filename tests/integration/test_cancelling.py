"""A turn can be withdrawn from anywhere and at any time; whoever reads it is told, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import engine_driver

from agent_memory_core import AgentMemory, Cancelled, ChatStream, Delta, EngineStopped

Open = Callable[..., engine_driver.Driver]
HELLO = [{"role": "user", "content": "Hello."}]
LONG = [{"role": "user", "content": "7" * 3000}]


@pytest.fixture
def memory(llama: str, open_driver: Open) -> AgentMemory:
    return open_driver(llama, prefill_chunk=128, prefill_chunk_busy=64, max_batch_size=1).memory


@pytest.fixture
def reader() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def read(stream: ChatStream) -> list[Delta]:
    """Read a stream to its end."""
    return list(stream)


class Gate:
    """Holds the engine's thread between two steps until it is opened."""

    def __init__(self, memory: AgentMemory) -> None:
        self._open = threading.Event()
        self._closed = threading.Event()
        memory._thread.post(self._wait)
        assert self._closed.wait(60)

    def _wait(self, _: Any) -> None:
        self._closed.set()
        self._open.wait(60)

    def open(self) -> None:
        self._open.set()


def test_a_reader_is_woken_when_another_thread_closes_its_stream(
    memory: AgentMemory, reader: ThreadPoolExecutor
) -> None:
    stream = memory.chat(HELLO, session="s", stream=True, max_tokens=4000)
    next(stream)
    reading = reader.submit(read, stream)
    stream.close()
    with pytest.raises(Cancelled, match="cancelled"):
        reading.result(60)
    assert list(stream) == [], "it is told once"
    assert stream.report is None
    assert memory.sessions() == []


def test_a_reader_of_a_turn_that_the_engine_has_not_come_to_is_woken(
    memory: AgentMemory, reader: ThreadPoolExecutor
) -> None:
    memory.load()
    gate = Gate(memory)
    stream = memory.chat(HELLO, session="s", stream=True)
    reading = reader.submit(read, stream)
    stream.close()
    with pytest.raises(Cancelled):
        reading.result(60)
    gate.open()
    assert memory.sessions() == []


def test_a_reader_is_woken_while_the_model_is_being_loaded(
    llama: str, reader: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, load = threading.Event(), threading.Event()
    build = AgentMemory._build

    def slow(self: AgentMemory, results: Any) -> Any:
        loading.set()
        load.wait(60)
        return build(self, results)

    monkeypatch.setattr(AgentMemory, "_build", slow)
    with AgentMemory(model=llama, cache_dir=None) as memory:
        stream = memory.chat(HELLO, stream=True)
        reading = reader.submit(read, stream)
        assert loading.wait(60)
        stream.close()
        with pytest.raises(Cancelled):
            reading.result(60)
        load.set()
        assert memory.chat(HELLO, max_tokens=2).token_ids


@pytest.mark.parametrize("when", ["waiting for a place", "in prefill"])
def test_a_reader_before_its_first_token_is_woken(
    memory: AgentMemory, reader: ThreadPoolExecutor, when: str
) -> None:
    other = memory.chat(HELLO, stream=True, max_tokens=4000) if when == "waiting for a place" else None
    if other is not None:
        next(other)
    stream = memory.chat(LONG, session="s", stream=True)
    reading = reader.submit(read, stream)
    memory._thread.call(lambda engine: engine.step()).result()
    stream.close()
    with pytest.raises(Cancelled):
        reading.result(60)
    if other is not None:
        other.close()
    again = memory.chat(HELLO, max_tokens=2)
    assert again.token_ids
    assert memory._thread.call(lambda engine: engine.pool.reserved).result() == 0


def test_an_ended_turn_is_not_cancelled_any_more(memory: AgentMemory) -> None:
    stream = memory.chat(HELLO, session="s", stream=True, max_tokens=3)
    deltas = list(stream)
    stream.close()
    assert deltas[-1].report is not None
    assert [info.session_id for info in memory.sessions()] == ["s"]


async def test_a_task_is_woken_when_another_closes_its_stream(memory: AgentMemory) -> None:
    stream = await memory.achat(HELLO, session="s", stream=True, max_tokens=4000)
    await anext(stream)

    async def read_all() -> list[Delta]:
        return [delta async for delta in stream]

    reading = asyncio.create_task(read_all())
    await asyncio.sleep(0)
    await stream.aclose()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(reading, 60)
    assert memory.sessions() == []


def test_a_loop_that_was_closed_does_not_harm_the_engine(memory: AgentMemory) -> None:
    streams = []

    async def begin() -> None:
        streams.append(await memory.achat(HELLO, session="s", stream=True, max_tokens=4000))
        await anext(streams[0])

    asyncio.run(begin())
    assert memory.chat(HELLO, max_tokens=4).token_ids, "its deltas go nowhere, and nothing fails"
    streams.clear()


def test_closing_the_memory_is_told_as_such(memory: AgentMemory, reader: ThreadPoolExecutor) -> None:
    stream = memory.chat(HELLO, session="s", stream=True, max_tokens=4000)
    next(stream)
    reading = reader.submit(read, stream)
    memory.close()
    stream.close()
    with pytest.raises(EngineStopped):
        reading.result(60)
