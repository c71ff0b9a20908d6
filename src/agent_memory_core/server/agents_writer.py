"""What an agent answers, whole and as a stream: deltas of its text, then one event that is the whole answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agent_memory_core import Delta
from agent_memory_core.adapter import measurements
from agent_memory_core.server.answers import Answer, PieceReader
from agent_memory_core.server.errors import ApiError
from agent_memory_core.server.openai_chat import finish_reason, usage
from agent_memory_core.server.sse import data
from agent_memory_core.server.turns import Admitted, Call


def whole(call: Call, answer: Answer) -> dict[str, Any]:
    """The answer of an agent, whose id is that of its session."""
    report = answer.ended
    return {
        "agent_id": call.session.session_id,
        "text": answer.text(),
        "tokens_generated": report.usage.completion_tokens,
        "finish_reason": finish_reason(report),
        "cache_size_tokens": report.usage.total_tokens,
        "usage": usage(report.usage),
        "agent_memory": measurements(report),
    }


class AgentWriter:
    """Streams the answer of an agent."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._answer, self._reader = Answer(), PieceReader()

    def begin(self) -> Iterator[bytes]:
        """An empty delta, by which a client knows that the question was taken."""
        yield _delta("")

    def admitted(self, event: Admitted) -> Iterator[bytes]:
        """Nothing: the usage comes at the end."""
        return iter(())

    def silence(self) -> Iterator[bytes]:
        """An empty delta."""
        yield _delta("")

    def delta(self, delta: Delta) -> Iterator[bytes]:
        """The text of a delta; after the last one the whole answer."""
        for piece in self._answer.take(delta, self._reader):
            if piece.kind == "text":
                yield _delta(piece.text)
        if delta.report is not None:
            yield data(whole(self._call, self._answer), "answer")

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """The error, in place of the whole answer."""
        yield data(error.openai(), "error")


def _delta(text: str) -> bytes:
    return data({"text": text}, "delta")
