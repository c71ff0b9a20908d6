"""Work on a thread of its own: its result comes back, or is undone if nobody waits any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from agent_memory_core.agents.waiting import in_thread


async def test_what_is_done_or_raised_comes_back() -> None:
    assert await in_thread(lambda: threading.current_thread() is threading.main_thread()) is False
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0)


async def test_more_may_wait_than_a_pool_has_threads() -> None:
    gate = threading.Event()
    waiting = [asyncio.create_task(in_thread(gate.wait)) for _ in range(40)]
    await in_thread(gate.set)
    assert all(await asyncio.gather(*waiting))


@pytest.mark.parametrize("fails", [False, True])
async def test_a_result_that_nobody_waits_for_is_undone(fails: bool) -> None:
    gate, undone = threading.Event(), threading.Event()

    def work() -> int:
        gate.wait(10)
        return 1 // (not fails)

    task = asyncio.create_task(in_thread(work, undo=lambda result: undone.set()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    assert await asyncio.to_thread(undone.wait, 0.2 if fails else 10) is not fails
