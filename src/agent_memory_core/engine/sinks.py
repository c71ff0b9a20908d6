"""Where the deltas of a turn go: to a caller that blocks, to a coroutine, or nowhere.

A sink has one end: the delta that carries the report, or the error that says why there is none. Whatever comes
after that is dropped. So a reader always wakes, whoever ended the turn.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import time
from collections.abc import Callable
from typing import Protocol

from agent_memory_core.errors import DeadlineExceeded, EngineStopped
from agent_memory_core.messages import Delta

log = logging.getLogger("agent_memory")

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


class Deadline:
    """When a caller gives up, by its own clock: the engine may be busy with something long at that moment."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._end = time.monotonic() + timeout if timeout is not None else None

    def left(self) -> float | None:
        """Seconds until then, at least 0; None where nobody gives up."""
        return max(0.0, self._end - time.monotonic()) if self._end is not None else None

    def error(self) -> DeadlineExceeded:
        """What to raise then."""
        return DeadlineExceeded(
            f"there was no whole answer within timeout={self._timeout:g} seconds: allow more, or ask again, which goes "
            "on from what was computed."
        )


class GuardedSink:
    """A caller's sink whose faults are its own: the turn of a caller that is gone is withdrawn, unnoticed by others.

    Args:
        sink: the caller's.
        ended: called once, when the turn has ended, before the caller hears of it. It must neither block nor raise.
    """

    def __init__(self, sink: OutputSink, ended: Callable[[], None] = lambda: None) -> None:
        self._sink = sink
        self._broken = False
        self._ended = ended
        self.has_ended = False
        """Whether the engine is done with the turn."""

    @property
    def is_gone(self) -> bool:
        """Whether nobody can read here any more."""
        return self._broken or bool(getattr(self._sink, "is_gone", False))

    def deliver(self, delta: Delta) -> None:
        """Hand out a piece of the answer."""
        if delta.report is not None:
            self.end()
        self._try(lambda: self._sink.deliver(delta))

    def fail(self, error: Exception) -> None:
        """Hand out why there is no answer."""
        self.end()
        self._try(lambda: self._sink.fail(error))

    def withdraw(self, error: Exception) -> None:
        """Hand out that there is no answer while the engine still has the turn, which it will end."""
        self._try(lambda: self._sink.fail(error))

    def end(self) -> None:
        """The engine is done with the turn."""
        if not self.has_ended:
            self.has_ended = True
            self._ended()

    def _try(self, hand_out: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            hand_out()
        except Exception:
            # Somebody else's code, or an event loop that was closed.
            self._broken = True
            log.warning("an answer could not be handed out, and its turn is withdrawn", exc_info=True)


class QueueSink:
    """Deltas for a caller that blocks."""

    def __init__(self, timeout: float | None = None) -> None:
        self._deadline = Deadline(timeout)
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
            DeadlineExceeded: nothing came in time.
            EngineStopped: this process was forked after the turn had begun, so nothing will come.
        """
        if os.getpid() != self._process:
            raise EngineStopped(FORKED)
        try:
            item = self._queue.get(timeout=self._deadline.left())
        except queue.Empty:
            raise self._deadline.error() from None
        if isinstance(item, Exception):
            raise item
        return item


class AsyncQueueSink:
    """Deltas for a coroutine: no thread waits, the engine wakes the event loop."""

    def __init__(self, timeout: float | None = None) -> None:
        self._deadline = Deadline(timeout)
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
        try:
            async with asyncio.timeout(self._deadline.left()):
                item = await self._queue.get()
        except TimeoutError:
            raise self._deadline.error() from None
        if isinstance(item, Exception):
            raise item
        return item

    @property
    def is_gone(self) -> bool:
        """Whether the event loop of the reader was closed."""
        return self._loop.is_closed()

    def _put(self, item: Delta | Exception) -> None:
        # A loop that was closed has no reader left.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
