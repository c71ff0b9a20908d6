"""A sink has one end: whoever reads it always wakes, and hears of the first reason only."""

from __future__ import annotations

import asyncio

import pytest

from agent_memory_core import Cancelled, Delta, EngineStopped
from agent_memory_core.engine.sinks import AsyncQueueSink, QueueSink


def test_deltas_come_in_order_and_then_the_first_error_alone() -> None:
    sink = QueueSink()
    sink.deliver(Delta("a"))
    sink.fail(Cancelled("withdrawn"))
    sink.deliver(Delta("b"))
    sink.fail(EngineStopped("closed"))
    assert sink.get() == Delta("a")
    with pytest.raises(Cancelled, match="withdrawn"):
        sink.get()
    assert sink._queue.empty()


async def test_a_coroutine_is_woken_from_another_thread() -> None:
    sink = AsyncQueueSink()
    waiting = asyncio.create_task(sink.get())
    await asyncio.sleep(0)
    await asyncio.to_thread(sink.deliver, Delta("a"))
    assert await waiting == Delta("a")
    await asyncio.to_thread(sink.fail, Cancelled("withdrawn"))
    sink.deliver(Delta("b"))
    with pytest.raises(Cancelled):
        await sink.get()


def test_deltas_for_a_loop_that_is_gone_go_nowhere() -> None:
    async def make() -> AsyncQueueSink:
        return AsyncQueueSink()

    sink = asyncio.run(make())
    sink.deliver(Delta("a"))
    sink.fail(Cancelled("withdrawn"))
