"""Server-sent events: a turn's pieces in a dialect, written down as they come."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Protocol

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from agent_memory_core import AgentMemoryError, Delta
from agent_memory_core.server.errors import FAULT, ApiError, from_core
from agent_memory_core.server.turns import Admitted, Turn

log = logging.getLogger("agent_memory.server")


class Writer(Protocol):
    """Writes one answer in one dialect. Each call gives the events that it adds to the stream."""

    def begin(self) -> Iterator[bytes]:
        """What comes at once."""

    def admitted(self, event: Admitted) -> Iterator[bytes]:
        """What comes when it is known how much need not be computed."""

    def delta(self, delta: Delta) -> Iterator[bytes]:
        """What a delta adds; after the last one the stream is complete."""

    def silence(self) -> Iterator[bytes]:
        """A sign of life."""

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """How a stream ends whose answer is not complete."""


class Closing(Protocol):
    """A turn, or several."""

    async def close(self) -> None:
        """Withdraw it if it has not ended."""


def data(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event, with a name where the dialect has names."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encoded(value) + b"\n\n"


def encoded(value: Mapping[str, Any]) -> bytes:
    """JSON. What a client sent is repeated in some answers, and need not be valid Unicode."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


class EventStream(StreamingResponse):
    """The answer of a turn as it is made. A client that goes away withdraws the turn."""

    def __init__(
        self, turn: Closing, chunks: AsyncIterator[bytes], writer: Writer, headers: Mapping[str, str]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(_to_the_end(chunks, writer), headers=headers, media_type="text/event-stream")
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._turn.close()


async def events(turn: Turn, writer: Writer, silence: float) -> AsyncIterator[bytes]:
    """The events of a turn, as its writer writes them. Raises as `Turn.events` does."""
    for chunk in writer.begin():
        yield chunk
    async for event in turn.events(silence):
        if chunk := written(writer, event):
            yield chunk


def written(writer: Writer, event: Admitted | Delta | None) -> bytes:
    """What an event of a turn adds to the stream."""
    if event is None:
        return b"".join(writer.silence())
    if isinstance(event, Admitted):
        return b"".join(writer.admitted(event))
    return b"".join(writer.delta(event))


async def _to_the_end(chunks: AsyncIterator[bytes], writer: Writer) -> AsyncIterator[bytes]:
    """All chunks; where they end before the answer does, how a stream ends that is not complete."""
    try:
        async for chunk in chunks:
            yield chunk
    except AgentMemoryError as error:
        yield b"".join(writer.failed(from_core(error)))
    except ApiError as error:
        yield b"".join(writer.failed(error))
    except Exception:
        # The outermost loop of a stream: a client must not take what was cut off for a whole answer.
        log.exception("an answer could not be written")
        fault = ApiError(FAULT, "The server met a fault while it wrote the answer.")
        yield b"".join(writer.failed(fault))
