"""A turn, or a round, of agents that talk, as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from agent_memory_core import AgentMemoryError, DeadlineExceeded
from agent_memory_core.coordination import AgentBusy, Step
from agent_memory_core.server.errors import BUSY, ApiError, from_core
from agent_memory_core.server.sse import data

T = TypeVar("T")

SIGN_OF_LIFE = b": the agents are at work\n\n"

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class StepStream(StreamingResponse):
    """The steps of agents as they come. A client that goes away takes the turn back that is being said.

    Args:
        steps: see `CoordinationService.stream_turn`; the first one was read already.
        first: that one; None where there is none.
        place: is closed when the stream has ended, however it did.
        event: the name and the data of a step.
        last: the same for what comes after the last step; None where nothing does.
        silence: seconds after which the stream carries a sign of life.
        limit: seconds after which the stream is given up; None is no limit.
    """

    def __init__(
        self,
        steps: AsyncGenerator[Step, None],
        first: Step | None,
        place: ExitStack,
        event: Callable[[Step], Awaitable[tuple[str, dict[str, Any]]]],
        last: Callable[[], Awaitable[tuple[str, dict[str, Any]] | None]],
        silence: float,
        limit: float | None,
    ) -> None:
        self._steps, self._first, self._place, self._silence = steps, first, place, silence
        self._event, self._last = event, last
        self._limit, self._began = limit, time.monotonic()
        super().__init__(self._written(), headers=HEADERS, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.close()
            await self._steps.aclose()

    async def _written(self) -> AsyncIterator[bytes]:
        try:
            async for step in self._with_silence():
                if step is None:
                    yield SIGN_OF_LIFE
                    continue
                name, body = await self._event(step)
                yield data(body, name)
            if (end := await self._last()) is not None:
                yield data(end[1], end[0])
        except AgentMemoryError as error:
            yield data(told(error).openai(), "error")

    async def _with_silence(self) -> AsyncIterator[Step | None]:
        """The steps, and None for each time that none came."""
        if self._first is None:
            return
        yield self._first
        coming = asyncio.ensure_future(anext(self._steps, None))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=self._patience())
                if not done:
                    yield None
                    continue
                step = coming.result()
                if step is None:
                    return
                yield step
                coming = asyncio.ensure_future(anext(self._steps, None))
        finally:
            coming.cancel()
            await asyncio.wait({coming})

    def _patience(self) -> float:
        """Seconds to wait for the next step.

        Raises:
            DeadlineExceeded: the time of the stream is over.
        """
        if self._limit is None:
            return self._silence
        left = self._began + self._limit - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"there was no end within {self._limit:g} seconds: allow more.")
        return min(left, self._silence)


def told(error: AgentMemoryError) -> ApiError:
    """What an error of agents that talk is to a client."""
    return ApiError(BUSY, str(error)) if isinstance(error, AgentBusy) else from_core(error)


async def asked(work: Awaitable[T]) -> T:
    """The result of a call of a service; its errors as those for a client."""
    try:
        return await work
    except AgentMemoryError as error:
        raise told(error) from error
