"""Several answers to one prompt, which is computed once: the first answer's turn has it, and the others fork there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from agent_memory_core import Delta, TurnReport, Usage
from agent_memory_core.server.answers import Answer
from agent_memory_core.server.sse import Writer, written
from agent_memory_core.server.turns import Call, Turn, Turns

MOST_CHOICES = 16
"""Each of them is a turn, and takes the place of one."""

T = TypeVar("T")


class Choices:
    """The turns of one request for several answers. Whoever holds them must `close` them."""

    def __init__(self, turns: Turns, first: Turn, count: int) -> None:
        self._turns, self._begun = turns, [first]
        self._others = list(_others(first.call, count))

    async def answers(self) -> list[Answer]:
        """Wait for all answers.

        Raises:
            AgentMemoryError: why there is no more of one.
            ApiError: there is no room for all of them.
        """
        await self._begun[0].begun()
        await self._begin_others()
        return await asyncio.gather(*(turn.answer() for turn in self._begun))

    async def chunks(
        self,
        writers: Sequence[Writer],
        silence: float,
        end: Callable[[Sequence[TurnReport]], Iterator[bytes]],
    ) -> AsyncIterator[bytes]:
        """A stream of all answers, each written by a writer of its own. Raises as `answers` does.

        Args:
            writers: one for each answer.
            silence: seconds without anything after which there is a sign of life.
            end: what comes after the last answer.
        """
        for writer in writers:
            yield b"".join(writer.begin())
        while not await self._begun[0].begun(silence):
            yield b"".join(writers[0].silence())
        await self._begin_others()
        reports = []
        async for index, event in merged([turn.events(silence) for turn in self._begun]):
            if chunk := written(writers[index], event):
                yield chunk
            if isinstance(event, Delta) and event.report is not None:
                reports.append(event.report)
        yield b"".join(end(reports))

    async def _begin_others(self) -> None:
        """Begin the other turns, now that what was computed of the prompt is there for them."""
        for call in self._others:
            self._begun.append(await self._turns.begin(call, self._begun[0].request_id))

    async def close(self) -> None:
        """Withdraw those turns that have not ended, and free their places."""
        await asyncio.gather(*(turn.close() for turn in self._begun))


def _others(call: Call, count: int) -> Iterator[Call]:
    """The calls of all answers but the first, which alone goes on with the session."""
    sampling = call.request.sampling
    for index in range(1, count):
        seed = None if sampling.seed is None else (sampling.seed + index) % 2**64
        request = replace(call.request, sampling=sampling.replace(seed=seed))
        yield replace(call, request=request, key=replace(call.key, ephemeral=True))


def summed(counted: Sequence[Usage]) -> Usage:
    """The tokens of several answers to one prompt, which counts once, as the first answer found it."""
    return replace(
        counted[0],
        completion_tokens=sum(usage.completion_tokens for usage in counted),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in counted),
    )


async def merged(sources: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """What several sources give, as it comes, each with its source's number."""
    awaited = {asyncio.ensure_future(_next(source)): index for index, source in enumerate(sources)}
    try:
        while awaited:
            done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = awaited.pop(task)
                for event in task.result():
                    awaited[asyncio.ensure_future(_next(sources[index]))] = index
                    yield index, event
    finally:
        for task in awaited:
            task.cancel()


async def _next(source: AsyncIterator[T]) -> list[T]:
    """The next of a source; nothing at its end."""
    async for event in source:
        return [event]
    return []
