"""A turn of an agent: what was said and answered is written down once the engine has committed it, never otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from agent_memory_core import AsyncChatStream, ChatRequest, ChatStream, Delta, Message, SessionKey, TurnReport
from agent_memory_core.agents.waiting import in_thread
from agent_memory_core.closing import AsyncClosing, Closing

Ended = Callable[[Message, TurnReport], None]
"""Takes the answer of a turn, and what it did."""


class AgentTurn:
    """One turn under way, in its agent's queue. It ends once: answered, or given up.

    Args:
        request: the agent's whole conversation, with what is said now.
        key: the agent's session, an object of this turn alone.
        ended: told of the answer.
        leave: makes place for the agent's next turn.
    """

    def __init__(
        self, request: ChatRequest, key: SessionKey, ended: Ended, leave: Callable[[], None]
    ) -> None:
        self.request, self.key = request, key
        self._ended = ended
        self._leave = leave
        self._deltas: list[Delta] = []

    def add(self, delta: Delta) -> TurnReport | None:
        """Take a piece of the answer; the report says that it was the last one and `finish` is due."""
        self._deltas.append(delta)
        return delta.report

    def finish(self, report: TurnReport) -> None:
        """Write the turn down, and make place for the next one."""
        try:
            self._ended(_answer(self._deltas), report)
        finally:
            self._leave()

    async def afinish(self, report: TurnReport) -> None:
        """`finish` for coroutines: nothing blocks the event loop."""
        await in_thread(lambda: self.finish(report))

    def give_up(self) -> None:
        """Make place for the next turn; nothing is written down. Nothing happens if the turn has ended."""
        self._leave()


class AgentStream(Closing, Iterator[Delta]):
    """The deltas of an agent's turn as they are made. Closing it, or leaving its ``with`` block, withdraws the turn.

    The agent's next turn waits until this one was read to its end, or was closed.
    """

    def __init__(self, stream: ChatStream, turn: AgentTurn) -> None:
        self._stream = stream
        self._turn = turn

    @property
    def report(self) -> TurnReport | None:
        """What the turn did, once it was read to its end."""
        return self._stream.report

    def __next__(self) -> Delta:
        try:
            delta = next(self._stream)
        except BaseException:
            self.close()
            raise
        if (report := self._turn.add(delta)) is not None:
            self._turn.finish(report)
        return delta

    def close(self) -> None:
        """Withdraw the turn if it has not ended: nothing of it is written down."""
        self._stream.close()
        self._turn.give_up()

    def __del__(self) -> None:
        self.close()


class AsyncAgentStream(AsyncClosing, AsyncIterator[Delta]):
    """`AgentStream` for coroutines."""

    def __init__(self, stream: AsyncChatStream, turn: AgentTurn) -> None:
        self._stream = stream
        self._turn = turn

    @property
    def report(self) -> TurnReport | None:
        """What the turn did, once it was read to its end."""
        return self._stream.report

    async def __anext__(self) -> Delta:
        try:
            delta = await anext(self._stream)
        except BaseException:
            await self.aclose()
            raise
        if (report := self._turn.add(delta)) is not None:
            await self._turn.afinish(report)
        return delta

    async def aclose(self) -> None:
        """Withdraw the turn if it has not ended: nothing of it is written down."""
        await self._stream.aclose()
        self._turn.give_up()

    def __del__(self) -> None:
        self._turn.give_up()


def _answer(deltas: Sequence[Delta]) -> Message:
    """The answer as the next prompt holds it: calls that could not be read stand in its text."""
    unread = (call.text for delta in deltas for call in delta.invalid_tool_calls)
    text = "".join(delta.text for delta in deltas)
    return Message(
        "assistant",
        "\n".join(filter(None, (text, *unread))),
        tool_calls=tuple(call for delta in deltas for call in delta.tool_calls),
        reasoning="".join(delta.reasoning for delta in deltas) or None,
    )
