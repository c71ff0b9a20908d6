"""Work that waits, for coroutines: each on a thread of its own, because it may wait for one that is queued after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
    """Do something that waits; nothing blocks the event loop.

    Args:
        undo: takes the result if nobody waits for it any more.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="agent-memory-agents")
    done = thread.submit(work)
    thread.shutdown(wait=False)
    try:
        return await asyncio.shield(asyncio.wrap_future(done))
    except asyncio.CancelledError:
        if undo is not None:
            done.add_done_callback(lambda ended: ended.exception() is None and undo(ended.result()))
        raise
