"""``PrefixContextEditing``: agent middleware that clears old tool results in steps, so that prompts stay warm.

LangChain's ``ContextEditingMiddleware`` looks at every prompt anew: each further tool result moves the border between
what is cleared and what is kept, and everything behind that border is computed again, turn after turn. Here the border
moves in steps. A step is taken only where it frees enough for what it costs, and between two steps every prompt begins
with the one before it.

    create_agent(llm, tools, middleware=[PrefixContextEditing(trigger=8000, keep=3)])

Nothing is remembered: the steps follow from the messages alone, so that they are the same after a restart, in another
process and when a turn is run again. The state of the thread keeps all results.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain.agents.middleware.types import AgentState
from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langchain_core.messages.utils import count_tokens_approximately

from agent_memory_core import InvalidRequest

PLACEHOLDER = "[cleared]"
"""What stands in the place of a result that was cleared."""

URGENT = 2.0
"""A prompt of this many times ``trigger`` is cleared whatever it costs."""


@dataclass(frozen=True, slots=True)
class Steps:
    """When old tool results are cleared. Sizes are in tokens."""

    trigger: int = 100_000
    """How long a prompt has to be before anything of it is cleared."""
    keep: int = 3
    """How many of the latest results are kept."""
    clear_at_least: int = 1000
    """How much a step has to free."""
    worth: float = 0.5
    """How much a step has to free of each token that it lets be computed again."""
    exclude_tools: Collection[str] = ()
    """Tools whose results are never cleared."""

    def cleared(
        self, sizes: Sequence[int], results: Collection[int], calls: Collection[int], left: int
    ) -> set[int]:
        """Which messages are cleared in a prompt of messages with these ``sizes``.

        Args:
            sizes: the size of each message, as it is.
            results: the positions of tool results that may be cleared.
            calls: the positions of the model's own messages: before each of them the model was asked.
            left: the size of a cleared result.
        """
        gone: set[int] = set()
        for end in (*sorted(calls), len(sizes)):
            now = [left if i in gone else size for i, size in enumerate(sizes[:end])]
            gone |= self._step(now, sorted(i for i in results if i < end), gone, left)
        return gone

    def _step(self, sizes: Sequence[int], results: Sequence[int], gone: set[int], left: int) -> set[int]:
        """What a call with these messages, of which ``gone`` are cleared, clears besides."""
        total = sum(sizes)
        old = results[: -self.keep] if self.keep else results
        new = [i for i in old if i not in gone and sizes[i] > left]
        freed = sum(sizes[i] - left for i in new)
        if total < self.trigger or freed < self.clear_at_least or not new:
            return set()
        computed = sum(sizes[new[0] :]) - freed
        return set(new) if freed >= self.worth * computed or total >= URGENT * self.trigger else set()


class PrefixContextEditing(AgentMiddleware[AgentState[Any], Any, Any]):
    """Clears old tool results of long conversations, in steps; see the module.

    Arguments are those of LangChain's ``ClearToolUsesEdit``, and ``worth``, ``count_tokens``.
    """

    def __init__(
        self,
        *,
        trigger: int = 100_000,
        keep: int = 3,
        clear_at_least: int = 1000,
        worth: float = 0.5,
        exclude_tools: Sequence[str] = (),
        placeholder: str = PLACEHOLDER,
        count_tokens: Callable[[Sequence[AnyMessage]], int] = count_tokens_approximately,
    ) -> None:
        """Prepare the rule.

        Args:
            trigger: how many tokens a prompt has to have before anything of it is cleared.
            keep: how many of the latest results are kept.
            clear_at_least: how many tokens a step has to free.
            worth: how many tokens a step has to free for each that it lets be computed again.
            exclude_tools: names of tools whose results are never cleared.
            placeholder: what stands in the place of a result that was cleared.
            count_tokens: counts the tokens of messages; ``llm.get_num_tokens_from_messages`` is exact and slower.

        Raises:
            InvalidRequest: a number is negative, or ``trigger`` is not positive.
        """
        super().__init__()
        named = {"keep": keep, "clear_at_least": clear_at_least, "worth": worth, "trigger": trigger - 1}
        if wrong := [name for name, value in named.items() if value < 0]:
            raise InvalidRequest(f"{wrong[0]} is not valid for PrefixContextEditing: it has to be positive.")
        self.steps = Steps(trigger, keep, clear_at_least, worth, frozenset(exclude_tools))
        self.placeholder = placeholder
        self.count_tokens = count_tokens

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Let the model see the conversation without what is cleared."""
        return handler(request.override(messages=self.edited(request.messages)))

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """`wrap_model_call` for coroutines."""
        return await handler(request.override(messages=self.edited(request.messages)))

    def edited(self, messages: Sequence[AnyMessage]) -> list[AnyMessage]:
        """The messages, with the placeholder in the results that are cleared by now."""
        results = {i for i, message in enumerate(messages) if self._may_go(message)}
        if len(results) <= self.steps.keep:
            return list(messages)
        calls = [i for i, message in enumerate(messages) if isinstance(message, AIMessage)]
        sizes = [self.count_tokens([message]) for message in messages]
        left = self.count_tokens([ToolMessage(self.placeholder, tool_call_id="")])
        gone = self.steps.cleared(sizes, results, calls, left)
        return [self._without(message) if i in gone else message for i, message in enumerate(messages)]

    def _may_go(self, message: AnyMessage) -> bool:
        return isinstance(message, ToolMessage) and message.name not in self.steps.exclude_tools

    def _without(self, message: AnyMessage) -> AnyMessage:
        return message.model_copy(update={"content": self.placeholder, "artifact": None})


__all__ = ["PLACEHOLDER", "PrefixContextEditing"]
