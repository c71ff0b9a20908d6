"""Where the deltas of a turn go: to a caller that blocks, to a coroutine, or nowhere.

A sink has one end: the delta that carries the report, or the error that says why there is none. Whatever comes
after that is dropped. So a reader always wakes, whoever ended the turn.
"""

from __future__ import annotations

import asyncio
import os
import queue
from contextlib import suppress
from typing import Protocol

from agent_memory_core.errors import EngineStopped
from agent_memory_core.messages import Delta

FORKED = (
    "this process was forked from one that runs an engine, and neither MLX nor the engine survives a fork: "
    "start child processes with multiprocessing's 'spawn' method, or open AgentMemory in the child only."
)

CANCELLED = "the turn was cancelled before it ended; its session is as it was."


class OutputSink(Protocol):
    """The caller's end of a turn. Both calls may come from any thread."""

    def deliver(self, delta: Delta) -> None:
        """Hand out a piece of the answer."""
        ...

    def fail(self, error: Exception) -> None:
        """Hand out why there is no answer, or no more of it."""
        ...


class _Discard:
    """The sink of a turn that no caller waits for."""

    def deliver(self, delta: Delta) -> None:
        pass

    def fail(self, error: Exception) -> None:
        pass


DISCARD: OutputSink = _Discard()


class QueueSink:
    """Deltas for a caller that blocks."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()
        self._failed = False
        self._process = os.getpid()

    def deliver(self, delta: Delta) -> None:
        """Hand out a piece of the answer."""
        if not self._failed:
            self._queue.put(delta)

    def fail(self, error: Exception) -> None:
        """Hand out why there is no answer; only the first error counts."""
        if not self._failed:
            self._failed = True
            self._queue.put(error)

    def get(self) -> Delta:
        """Wait for the next piece.

        Raises:
            Exception: what `fail` was given.
            EngineStopped: this process was forked after the turn had begun, so nothing will come.
        """
        if os.getpid() != self._process:
            raise EngineStopped(FORKED)
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


class AsyncQueueSink:
    """Deltas for a coroutine: no thread waits, the engine wakes the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._failed = False
        self._process = os.getpid()

    def deliver(self, delta: Delta) -> None:
        """Hand out a piece of the answer."""
        if not self._failed:
            self._put(delta)

    def fail(self, error: Exception) -> None:
        """Hand out why there is no answer; only the first error counts."""
        if not self._failed:
            self._failed = True
            self._put(error)

    async def get(self) -> Delta:
        """Wait for the next piece. Raises as `QueueSink.get` does."""
        if os.getpid() != self._process:
            raise EngineStopped(FORKED)
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _put(self, item: Delta | Exception) -> None:
        # A loop that was closed has no reader left, and says so with a RuntimeError.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
