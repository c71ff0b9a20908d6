"""The deltas of one turn, as a caller reads them: an iterator for threads and one for coroutines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from agent_memory_core.closing import AsyncClosing, Closing
from agent_memory_core.engine.sinks import AsyncQueueSink, QueueSink
from agent_memory_core.engine.thread import TurnHandle
from agent_memory_core.errors import AgentMemoryError, DeadlineExceeded
from agent_memory_core.messages import Delta, TurnReport


class ChatStream(Closing, Iterator[Delta]):
    """The deltas of a turn as they are made. Closing it, or leaving its ``with`` block, withdraws the turn.

    Any thread may close it. Whoever reads it then gets `Cancelled`, also while waiting for the next delta.
    """

    def __init__(self, sink: QueueSink, handle: TurnHandle) -> None:
        self._sink = sink
        self._handle = handle
        self._done = False
        self.report: TurnReport | None = None

    def __next__(self) -> Delta:
        if self._done:
            raise StopIteration
        try:
            delta = self._sink.get()
        except DeadlineExceeded:
            self.close()
            self._done = True
            raise
        except AgentMemoryError:
            self._done = True
            raise
        except BaseException:
            # The caller was interrupted while it waited: nobody will read the rest.
            self.close()
            raise
        if delta.report is not None:
            self.report, self._done = delta.report, True
        return delta

    def close(self) -> None:
        """Withdraw the turn if it has not ended. The next read raises `Cancelled`."""
        if not self._done:
            self._handle.cancel()

    def __del__(self) -> None:
        self.close()


class AsyncChatStream(AsyncClosing, AsyncIterator[Delta]):
    """`ChatStream` for coroutines: any task may close it."""

    def __init__(self, sink: AsyncQueueSink, handle: TurnHandle) -> None:
        self._sink = sink
        self._handle = handle
        self._done = False
        self.report: TurnReport | None = None

    async def __anext__(self) -> Delta:
        if self._done:
            raise StopAsyncIteration
        try:
            delta = await self._sink.get()
        except DeadlineExceeded:
            self._withdraw()
            self._done = True
            raise
        except AgentMemoryError:
            self._done = True
            raise
        except BaseException:
            # The task was cancelled while it waited: nobody will read the rest.
            self._withdraw()
            raise
        if delta.report is not None:
            self.report, self._done = delta.report, True
        return delta

    async def aclose(self) -> None:
        """Withdraw the turn if it has not ended."""
        self._withdraw()

    def __del__(self) -> None:
        self._withdraw()

    def _withdraw(self) -> None:
        if not self._done:
            self._handle.cancel()
