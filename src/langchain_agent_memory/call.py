"""One call on its way through LangChain: whose session it is, and after the answer what its turn came to.

What belongs to a session must not be on a generation: LangChain hands generations to tracers, and its response cache
gives them to other sessions. So a turn's report travels in a `Call`, which only the entry points of the model see, and
is put on the message that the caller gets.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any, TypeVar

from langchain_core.messages import AIMessage, AIMessageChunk

from agent_memory_core import SessionKey, TurnReport
from agent_memory_core.adapter import measurements

AnyMessage = TypeVar("AnyMessage", bound=AIMessage)


class Call:
    """The session of a call, and the report of its turn once that has ended."""

    def __init__(self, key: SessionKey) -> None:
        self.key = key
        self._report: TurnReport | None = None

    def __repr__(self) -> str:
        # Older releases of LangChain show every keyword to traces.
        return "<session>"

    def ended(self, report: TurnReport) -> None:
        """Take the report of the turn."""
        self._report = report

    def reported(self, message: AnyMessage) -> AnyMessage:
        """A copy of ``message`` with what its turn measured, once; the message itself where no turn was run."""
        report, self._report = self._report, None
        if report is None:
            return message
        measured = measurements(report)
        # The answer has it already, and LangChain joins equal texts of several chunks.
        del measured["finish_reason"]
        metadata = message.response_metadata | measured
        return message.model_copy(update={"response_metadata": metadata})

    def in_stream(self, chunks: Iterator[AIMessageChunk]) -> Iterator[AIMessageChunk]:
        """The chunks of an answer, of which the last one tells what the turn measured."""
        with closing(chunks):  # type: ignore[type-var]
            for chunk in chunks:
                yield self.reported(chunk)

    async def in_async_stream(self, chunks: AsyncIterator[AIMessageChunk]) -> AsyncIterator[AIMessageChunk]:
        """`in_stream` for coroutines."""
        async with aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                yield self.reported(chunk)


def report_to(keywords: dict[str, Any] | Any, name: str, report: TurnReport | None) -> None:
    """Hand a turn's report to the `Call` that travels under ``name`` in a call's keywords, if there is one."""
    call = keywords.get(name)
    if isinstance(call, Call) and report is not None:
        call.ended(report)
