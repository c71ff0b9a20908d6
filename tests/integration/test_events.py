"""Everything that happens to a turn is told, in order, and whoever listens can do no harm."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import engine_driver

from agent_memory_core import (
    AgentMemory,
    BlocksEvicted,
    EngineStopped,
    FirstToken,
    SessionKey,
    TurnAdmitted,
    TurnCancelled,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnProgress,
    TurnQueued,
    TurnSaved,
)

Open = Callable[..., engine_driver.Driver]
HELLO = [{"role": "user", "content": "Hello. " * 40}]


def watched(memory: AgentMemory) -> list[Any]:
    seen: list[Any] = []
    memory.observe(seen.append)
    return seen


def kinds(events: list[Any]) -> list[type]:
    """The kinds of events in order, each run of progress as one."""
    found = [type(event) for event in events]
    return [kind for i, kind in enumerate(found) if kind is not TurnProgress or found[i - 1] is not kind]


def test_a_turns_events_come_in_order_and_say_what_its_report_says(llama: str, open_driver: Open) -> None:
    memory = open_driver(llama).memory
    seen = watched(memory)
    key = SessionKey("s", lane="agent")
    cold = memory.chat(HELLO, session=key, max_tokens=4).report
    whole = [TurnQueued, TurnAdmitted, TurnProgress, FirstToken, TurnFinished, TurnSaved]
    assert kinds(seen) == whole
    assert {event.turn.key for event in seen} == {key}
    queued, admitted, saved = seen[0], seen[1], seen[-1]
    assert queued.prompt_tokens == cold.usage.prompt_tokens
    assert (admitted.cached_tokens, admitted.tier) == (0, "none")
    progress = [(e.start, e.stop) for e in seen if isinstance(e, TurnProgress)]
    assert [start for start, _ in progress] == [0, *(stop for _, stop in progress[:-1])]
    assert progress[-1][1] == cold.usage.prompt_tokens
    assert saved.report == cold
    seen.clear()
    warm = memory.chat(HELLO, session=key, max_tokens=4).report
    assert kinds(seen) == whole
    assert (seen[1].cached_tokens, seen[1].tier) == (warm.usage.cache_read, "hot")
    assert seen[0].turn.turn_id > queued.turn.turn_id


def test_without_a_disk_nothing_is_saved(llama: str, open_driver: Open) -> None:
    memory = open_driver(llama, cache_dir=None).memory
    seen = watched(memory)
    memory.chat(HELLO, session="s", max_tokens=2)
    memory.prewarm(HELLO)
    ended = [TurnQueued, TurnAdmitted, TurnProgress, FirstToken, TurnFinished]
    assert kinds(seen) == [*ended, *(kind for kind in ended if kind is not FirstToken)]


def test_a_withdrawn_turn_ends_as_cancelled(llama: str, open_driver: Open) -> None:
    memory = open_driver(llama).memory
    seen = watched(memory)
    stream = memory.chat(HELLO, session="s", stream=True, max_tokens=4000)
    next(stream)
    stream.close()
    memory.load()
    assert isinstance(seen[-1], TurnCancelled)
    assert seen[-1].report.finish_reason == "cancelled"
    assert seen[-1].report.usage.completion_tokens > 0
    assert memory.stats().cancelled == 1


def test_a_turn_that_is_given_up_ends_as_failed(llama: str, open_driver: Open) -> None:
    memory = open_driver(llama).memory
    seen = watched(memory)
    stream = memory.chat(HELLO, session="s", stream=True, max_tokens=4000)
    next(stream)
    memory.close()
    assert isinstance(seen[-1], TurnFailed)
    assert isinstance(seen[-1].error, EngineStopped)


def test_what_memory_had_no_room_for_is_told(llama: str, open_driver: Open) -> None:
    memory = open_driver(llama, memory_budget_mb=4, kv_bits=None).memory
    seen = watched(memory)
    for number in range(5):
        memory.chat([{"role": "user", "content": f"{number}" * 1500}], session=f"s{number}", max_tokens=2)
    told = sum(event.blocks for event in seen if isinstance(event, BlocksEvicted))
    assert told == memory.stats().memory.evicted > 0


def test_an_observer_that_fails_is_logged_and_harms_nobody(
    llama: str, open_driver: Open, caplog: pytest.LogCaptureFixture
) -> None:
    memory = open_driver(llama).memory

    def fails(event: Any) -> None:
        raise RuntimeError("an observer's own fault")

    memory.observe(fails)
    seen = watched(memory)
    assert memory.chat(HELLO, session="s", max_tokens=4).report.persisted
    assert TurnSaved in kinds(seen), "the others are told all the same"
    assert "an observer's own fault" in caplog.text


def test_observers_come_and_go_from_any_thread(llama: str, open_driver: Open) -> None:
    memory = open_driver(llama).memory
    seen: list[Any] = []
    threads: set[str] = set()

    def observer(event: Any) -> None:
        seen.append(event)
        threads.add(threading.current_thread().name)

    stops = [memory.observe(observer) for _ in range(2)]
    memory.chat(HELLO, max_tokens=2)
    assert len(seen) % 2 == 0
    assert threads == {"agent-memory-engine"}
    stops[0]()
    stops[0]()
    seen.clear()
    memory.chat(HELLO, max_tokens=2)
    assert len([event for event in seen if isinstance(event, TurnEvent)]) == len({id(e) for e in seen})
    stops[1]()
    seen.clear()
    memory.chat(HELLO, max_tokens=2)
    assert seen == []
