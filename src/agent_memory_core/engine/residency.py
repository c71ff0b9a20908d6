"""Who decides whether a model may be in memory: a manager of several models is asked before each turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol


class Residency(Protocol):
    """Keeps a model in memory while a turn runs. Every `enter` that returns is followed by one `leave`."""

    def enter(self, memory: Any) -> None:
        """Make sure that an `AgentMemory` may be loaded, before its turn is queued; on the caller's thread.

        It may take long, and may raise, which is then the outcome of the turn.
        """
        ...

    def enter_at_once(self, memory: Any) -> bool:
        """`enter`, if that needs no waiting; False if it would, and nothing was done then."""
        ...

    def leave(self, memory: Any) -> None:
        """The turn has ended, whatever its end. Called on the engine's thread as a rule: it must not block or raise."""
        ...


def enter(residency: Residency | None, memory: Any) -> Callable[[], None]:
    """Enter, and return what leaves again."""
    if residency is None:
        return lambda: None
    residency.enter(memory)
    return partial(residency.leave, memory)


@contextmanager
def staying(residency: Residency | None, memory: Any) -> Iterator[None]:
    """Keep the model in memory for a block."""
    leave = enter(residency, memory)
    try:
        yield
    finally:
        leave()


async def enter_apart(residency: Residency | None, memory: Any) -> Callable[[], None]:
    """`enter` for coroutines: the event loop goes on, on another thread where it has to wait."""
    if residency is None:
        return lambda: None
    if residency.enter_at_once(memory):
        return partial(residency.leave, memory)
    # Of its own: those who wait for one model must not hold the threads that those of another one need.
    thread = ThreadPoolExecutor(1, thread_name_prefix="agent-memory-enter")
    entering = thread.submit(copy_context().run, enter, residency, memory)
    thread.shutdown(wait=False)
    try:
        return await asyncio.shield(asyncio.wrap_future(entering))
    except asyncio.CancelledError:
        # The thread cannot be stopped: what it has entered when it is done is left at once.
        entering.add_done_callback(_leave_again)
        raise


def _leave_again(entering: Future[Callable[[], None]]) -> None:
    if entering.exception() is None:
        entering.result()()
