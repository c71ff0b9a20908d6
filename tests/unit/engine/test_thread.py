"""The engine's thread: nobody who asks it for something waits for ever, whatever goes wrong on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from agent_memory_core import (
    Cancelled,
    ChatRequest,
    EngineStopped,
    Message,
    ModelNotFound,
    QueueFull,
    SessionKey,
)
from agent_memory_core.engine.results import Loaded
from agent_memory_core.engine.sinks import QueueSink
from agent_memory_core.engine.thread import EngineThread

pytestmark = pytest.mark.usefixtures("all_cores")

REQUEST = ChatRequest((Message("user", "Hello."),))


class StandIn:
    """What the thread calls of an engine. The real one is in the integration tests; here it fails on demand."""

    def __init__(self, results: Any) -> None:
        self.results = results
        self.taken: list[Any] = []
        self.given_up: list[Exception] = []
        self.cancelled: list[int | None] = []
        self.submitted = 0
        self.waiting = 0
        self.faults = 0
        self.ended = threading.Event()

    def submit(self, *_: Any, **__: Any) -> int:
        self.submitted += 1
        return self.submitted

    def step(self) -> bool:
        if self.faults:
            self.faults -= 1
            raise ZeroDivisionError("a fault in a step")
        return False

    def take(self, result: Any) -> None:
        self.taken.append(result)

    def cancel(self, seq_id: int | None) -> None:
        self.cancelled.append(seq_id)

    def fail_all(self, error: Exception) -> None:
        self.given_up.append(error)

    def cancel_all(self) -> None:
        self.given_up.append(Cancelled("all"))

    def close(self, *, keep_store: bool) -> None:
        self.results.put(Loaded(9, []))
        self.ended.set()


@pytest.fixture
def started() -> tuple[EngineThread, Any]:
    thread = EngineThread(StandIn, max_waiting=8)
    return thread, thread.call(lambda engine: engine).result(60)


def test_whoever_asks_an_engine_that_cannot_be_built_is_told_why() -> None:
    def build(results: Any) -> Any:
        raise ModelNotFound("no such model")

    thread, sink = EngineThread(build, max_waiting=8), QueueSink()
    thread.submit(REQUEST, SessionKey(), sink)
    with pytest.raises(ModelNotFound):
        sink.get()
    with pytest.raises(ModelNotFound):
        thread.check_open()
    with pytest.raises(ModelNotFound):
        thread.call(lambda engine: None)
    thread.flush()


def test_a_fault_in_a_step_ends_the_turns_in_flight_and_not_the_thread(started: Any) -> None:
    thread, engine = started
    engine.faults = 1
    thread.call(lambda engine: None).result(60)
    assert thread.call(lambda engine: 5).result(60) == 5
    (error,) = engine.given_up
    assert "a fault in a step" in str(error)
    thread.close()


def test_a_fault_in_a_job_is_told_to_its_caller_alone(started: Any) -> None:
    thread, engine = started
    with pytest.raises(EngineStopped, match="ZeroDivisionError"):
        thread.call(lambda engine: 1 // 0).result(60)
    assert engine.given_up == []
    thread.close()


def test_results_come_through_the_same_queue_as_jobs_and_wake_the_thread(started: Any) -> None:
    thread, engine = started
    engine.results.put(Loaded(1, []))
    thread.call(lambda engine: None).result(60)
    assert engine.taken == [Loaded(1, [])]
    thread.close()
    assert engine.ended.is_set()
    assert engine.taken == [Loaded(1, []), Loaded(9, [])], "also those that come while it closes"


def test_a_turn_that_was_withdrawn_in_the_queue_is_never_begun(started: Any) -> None:
    thread, engine = started
    go = threading.Event()
    waits: Callable[[Any], Any] = lambda engine: go.wait(60)  # noqa: E731
    blocked, sink = thread.call(waits), QueueSink()
    thread.submit(REQUEST, SessionKey(), sink).cancel()
    with pytest.raises(Cancelled):
        sink.get()
    go.set()
    blocked.result(60)
    thread.call(lambda engine: None).result(60)
    assert engine.submitted == 0
    handle = thread.submit(REQUEST, SessionKey(), QueueSink())
    thread.call(lambda engine: None).result(60)
    handle.cancel()
    handle.cancel()
    thread.call(lambda engine: None).result(60)
    assert engine.cancelled == [1], "withdrawing twice is once"
    thread.close()


def test_a_closed_thread_refuses_and_closes_once(started: Any) -> None:
    thread, engine = started
    handle = thread.submit(REQUEST, SessionKey(), QueueSink())
    thread.close()
    thread.close()
    handle.cancel()
    with pytest.raises(EngineStopped, match="closed"):
        thread.submit(REQUEST, SessionKey(), QueueSink())
    assert engine.cancelled == []


def test_one_turn_more_than_may_wait_is_refused_and_takes_no_place(started: tuple[EngineThread, Any]) -> None:
    thread, engine = started
    ends: list[int] = []
    engine.waiting = 8
    with pytest.raises(QueueFull, match="8 turns wait already and max_waiting is 8"):
        thread.submit(REQUEST, SessionKey(), QueueSink(), ended=lambda: ends.append(1))
    assert (thread.in_flight, ends) == (0, [1])
    engine.waiting = 7
    thread.submit(REQUEST, SessionKey(), QueueSink())
    thread.call(lambda engine: engine).result(60)
    # It has reached the engine, which says how many wait there.
    thread.submit(REQUEST, SessionKey(), QueueSink())
    assert thread.in_flight == 2
    thread.close()


def test_turns_that_have_not_reached_the_engine_wait_too_and_leave_when_it_cannot_be_built() -> None:
    built = threading.Event()

    def build(results: Any) -> Any:
        assert built.wait(60)
        raise ModelNotFound("no such model")

    thread = EngineThread(build, max_waiting=2)
    sinks = [QueueSink(), QueueSink()]
    for sink in sinks:
        thread.submit(REQUEST, SessionKey(), sink)
    with pytest.raises(QueueFull):
        thread.submit(REQUEST, SessionKey(), QueueSink())
    built.set()
    for sink in sinks:
        with pytest.raises(ModelNotFound):
            sink.get()
    assert thread._queued == set()
