"""A model can be unloaded and used again; its memory goes back to the machine, and nothing that was said is lost."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import engine_driver, tiny_models

from agent_memory_core import (
    AgentMemory,
    AgentMemoryError,
    Cancelled,
    ChatRequest,
    ChatStream,
    EngineStopped,
    Message,
    ModelNotFound,
)

Open = Callable[..., engine_driver.Driver]
HELLO = [{"role": "user", "content": "Hello. " * 30}]


@pytest.fixture
def memory(llama: str, open_driver: Open) -> AgentMemory:
    return open_driver(llama, prefill_chunk=128, prefill_chunk_busy=64, max_batch_size=2, kv_bits=None).memory


def follow_up(memory: AgentMemory) -> list[dict[str, str]]:
    answer = memory.chat(HELLO, session="s", max_tokens=8)
    return [*HELLO, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "Go on."}]


def test_a_session_is_warm_and_answers_the_same_after_its_model_was_unloaded(
    llama: str, open_driver: Open, tmp_path: Path
) -> None:
    answers = []
    for name, unloads in (("a", False), ("b", True)):
        memory = open_driver(llama, cache_dir=tmp_path / name).memory
        history = follow_up(memory)
        assert memory.weights_bytes > 0
        if unloads:
            assert memory.unload()
            assert memory.weights_bytes == 0
            assert not memory.closed
            assert [info.session_id for info in memory.sessions()] == ["s"], "the store serves on"
        answers.append(memory.chat(history, session="s", max_tokens=8))
    kept, unloaded = answers
    assert unloaded.token_ids == kept.token_ids
    assert unloaded.report.usage.cache_read == kept.report.usage.cache_read > 0


def test_unloading_waits_for_the_turns_in_flight_as_long_as_it_may(memory: AgentMemory) -> None:
    stream = memory.chat(HELLO, session="s", stream=True, max_tokens=200)
    next(stream)
    assert memory.in_flight == 1
    assert not memory.unload(0)
    assert not memory.unload(0.01)
    unloading = threading.Thread(target=memory.unload)
    unloading.start()
    report = list(stream)[-1].report
    unloading.join(60)
    assert report is not None
    assert report.persisted
    assert memory.in_flight == memory.weights_bytes == 0


def test_turns_that_are_withdrawn_to_unload_are_cancelled_and_their_session_goes_on(
    memory: AgentMemory,
) -> None:
    history = follow_up(memory)
    streams = [memory.chat(history, session="s", stream=True, max_tokens=4000) for _ in range(3)]
    next(streams[0])
    assert memory.unload(0, cancel=True)
    for stream in streams:
        with pytest.raises(Cancelled):
            list(stream)
    assert memory.weights_bytes == 0
    assert memory.chat(history, session="s", max_tokens=4).report.usage.cache_read > 0


def test_a_stream_of_an_unloaded_engine_withdraws_no_turn_of_the_next_one(memory: AgentMemory) -> None:
    left = memory.chat(HELLO, stream=True, max_tokens=4000)
    next(left)
    memory.unload(0, cancel=True)
    stream = memory.chat(HELLO, stream=True, max_tokens=40)
    next(stream)
    left.close()
    assert list(stream)[-1].report is not None


def test_callers_in_many_threads_are_answered_while_the_model_is_unloaded_again_and_again(
    memory: AgentMemory,
) -> None:
    expected = memory.chat(HELLO, max_tokens=4).token_ids
    answers: list[tuple[int, ...]] = []

    def ask(number: int) -> None:
        for _ in range(4):
            memory.count_tokens(HELLO)
            answers.append(memory.chat(HELLO, session=f"s{number}", max_tokens=4).token_ids)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.unload(0.02)
    assert answers == [expected] * 16
    assert memory.in_flight == 0


def test_closing_while_it_unloads_ends_everything(memory: AgentMemory) -> None:
    memory.chat(HELLO, session="s", max_tokens=4)
    unloading = threading.Thread(target=memory.unload)
    unloading.start()
    memory.close()
    unloading.join(60)
    with pytest.raises(EngineStopped):
        memory.chat(HELLO)


class Book:
    """A residency that keeps count."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.entered = self.inside = self.most = 0
        self.refuses = refuses
        self._lock = threading.Lock()
        self._empty = threading.Event()

    def enter(self, memory: AgentMemory) -> None:
        if self.refuses is not None:
            raise self.refuses
        with self._lock:
            self.entered += 1
            self.inside += 1
            self._empty.clear()

    def enter_at_once(self, memory: AgentMemory) -> bool:
        return False

    def leave(self, memory: AgentMemory) -> None:
        with self._lock:
            self.inside -= 1
            assert self.inside >= 0, "left more often than entered"
            if not self.inside:
                self._empty.set()

    def wait_until_empty(self) -> bool:
        return self._empty.wait(60)


def close_later(stream: ChatStream) -> None:
    next(stream)
    stream.close()


def hasty() -> ChatRequest:
    return ChatRequest((Message("user", "7" * 3000),), timeout=0.001)


ENDS: dict[str, Callable[[AgentMemory], Any]] = {
    "answered": lambda memory: memory.chat(HELLO, max_tokens=2),
    "stored": lambda memory: memory.chat(HELLO, "s", max_tokens=2),
    "prewarmed": lambda memory: memory.prewarm(HELLO),
    "asked": lambda memory: memory.count_tokens(HELLO),
    "closed at once": lambda memory: memory.chat(HELLO, stream=True).close(),
    "closed later": lambda memory: close_later(memory.chat(HELLO, stream=True, max_tokens=4000)),
    "dropped": lambda memory: next(memory.chat(HELLO, stream=True, max_tokens=4000)),
    "refused by the engine": lambda memory: memory.chat([{"role": "user", "content": "7" * 400_000}]),
    "given up": lambda memory: memory.chat(hasty()),
    "unloaded": lambda memory: (
        memory.chat(HELLO, stream=True, max_tokens=4000),
        memory.unload(0, cancel=True),
    ),
}


@pytest.mark.parametrize("end", list(ENDS))
def test_a_turn_leaves_exactly_once_wherever_it_ends(memory: AgentMemory, end: str) -> None:
    book = memory.residency = Book()
    with suppress(AgentMemoryError):
        ENDS[end](memory)
    gc.collect()
    assert book.wait_until_empty()
    assert (book.entered, book.inside) == (1, 0)
    memory.chat(HELLO, max_tokens=1)
    assert (book.entered, book.inside) == (2, 0), "left before the answer is handed out"


def test_a_refusal_to_enter_is_the_outcome_of_the_turn(memory: AgentMemory) -> None:
    memory.residency = Book(refuses=ModelNotFound("not now"))
    with pytest.raises(ModelNotFound, match="not now"):
        memory.chat(HELLO)
    with pytest.raises(ModelNotFound, match="not now"):
        asyncio.run(memory.achat(HELLO))
    assert memory.in_flight == 0


def test_a_closed_memory_is_left_at_once(memory: AgentMemory) -> None:
    book = memory.residency = Book()
    memory.close()
    with pytest.raises(EngineStopped):
        memory.chat(HELLO)
    assert (book.entered, book.inside, memory.in_flight) == (1, 0, 0)


async def test_coroutines_enter_on_another_thread_and_leave_when_they_are_cancelled(
    memory: AgentMemory,
) -> None:
    gate = threading.Event()

    class Slow(Book):
        def enter(self, memory: AgentMemory) -> None:
            gate.wait(60)
            super().enter(memory)

    book = memory.residency = Slow()
    turn = asyncio.ensure_future(memory.achat(HELLO, max_tokens=2))
    await asyncio.sleep(0.05)
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    gate.set()
    assert await asyncio.to_thread(book.wait_until_empty)
    assert (await memory.achat(HELLO, max_tokens=2)).token_ids
    assert (book.entered, book.inside) == (2, 0)


def test_a_new_shared_memory_keeps_the_residency_of_the_closed_one(llama: str) -> None:
    settings: dict[str, Any] = {"model": llama, "cache_dir": None}
    first = AgentMemory.shared(**settings)
    book = first.residency = Book()
    first.close()
    with AgentMemory.shared(**settings) as second:
        assert second is not first
        assert second.residency is book
    second.residency = None


LOADS = """
import gc, resource, subprocess, os, sys
import mlx.core as mx
from agent_memory_core import AgentMemory

def resident():
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(said.stdout) / 1024

memory = AgentMemory(model=sys.argv[1], cache_dir=None)
seen = []
for _ in range(20):
    memory.load()
    assert memory.weights_bytes > 50e6
    memory.unload()
    assert mx.get_active_memory() < 1024, "no more than the state of the random numbers"
    assert mx.get_cache_memory() < 1024
    seen.append(resident())
print(min(seen[-5:]) - seen[0])
"""


def test_twenty_loads_leave_no_memory_behind(tmp_path: Path) -> None:
    large = tiny_models.LLAMA | {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 2}
    model = tiny_models.write(tmp_path / "large", large)
    said = subprocess.run(
        [sys.executable, "-c", LOADS, model], capture_output=True, text=True, env=dict(os.environ)
    )
    assert said.returncode == 0, said.stderr
    assert float(said.stdout) < 20, f"MiB more than after the first load: {said.stdout}"
