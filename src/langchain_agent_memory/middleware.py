"""Agent middleware that leaves prompts their beginning: ``PrefixSummarization``, and ``PrefixContextEditing``.

LangChain's ``SummarizationMiddleware`` pastes the history into a prompt of its own, for which nothing is stored. So
the call is computed from its first token, just when the conversation is longest. Here the instruction to summarise is
appended to the conversation itself, after the same system prompt, tools and messages, and only that instruction is
new. The call belongs to no branch and changes nothing in the conversation's memory.

    create_agent(llm, tools, middleware=[PrefixSummarization(llm, trigger=("tokens", 4000), keep=("messages", 4))])
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, RemoveMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

try:
    from langchain.agents.middleware import (
        AgentMiddleware,
        ExtendedModelResponse,
        ModelRequest,
        ModelResponse,
        SummarizationMiddleware,
    )
    from langchain.agents.middleware.internal_call_transformer import (
        InternalCallTransformer,
        internal_call_metadata,
    )
    from langchain.agents.middleware.types import AgentState
    from langchain.agents.structured_output import AutoStrategy, OutputToolBinding, ToolStrategy
    from langgraph.graph.message import REMOVE_ALL_MESSAGES
    from langgraph.types import Command
except ImportError as error:
    raise ImportError(
        "langchain_agent_memory.middleware needs LangChain's agents: pip install 'agent-memory-mlx[agents]'."
    ) from error

from langchain_agent_memory.context_editing import PrefixContextEditing

logger = logging.getLogger("agent_memory.langchain")

INSTRUCTION = (
    "Summarize our conversation up to here. Your summary will replace it: keep every name, number, decision, result "
    "and open task that is needed to go on. Answer with the summary alone and call no tool."
)

State = AgentState[Any]
Request = ModelRequest[Any]
Response = ModelResponse[Any]
Extended = ExtendedModelResponse[Any]


class PrefixSummarization(AgentMiddleware[State, Any, Any]):
    """Replaces the older messages of a long conversation by a summary, which is written by a warm call.

    When to summarise, and what is kept as it is, follow LangChain's ``SummarizationMiddleware``. The summary is
    written by the model, and with the tools, of the call that is about to be made.
    """

    transformers = (InternalCallTransformer,)

    def __init__(
        self,
        model: BaseChatModel,
        *,
        summary_prompt: str = INSTRUCTION,
        max_summary_tokens: int | None = None,
        **options: Any,
    ) -> None:
        """Prepare the rule.

        Args:
            model: the model whose context is limited. Its profile gives the size for fractions, and it counts tokens.
            summary_prompt: the message that asks for the summary.
            max_summary_tokens: longest summary; None leaves it to the model's own ``max_tokens``.
            options: ``trigger``, ``keep`` and ``token_counter``, as of ``SummarizationMiddleware``.

        Raises:
            ValueError: ``trigger`` or ``keep`` is not valid.
        """
        super().__init__()
        self.model = model
        self.summary_prompt = summary_prompt
        self.max_summary_tokens = max_summary_tokens
        self._options = options
        self._rule(_Summarizer(self, None))

    def wrap_model_call(
        self, request: Request, handler: Callable[[Request], Response]
    ) -> Response | Extended:
        """Summarise if it is time, then let the model continue from the summary."""
        rule = self._rule(_Summarizer(self, request))
        try:
            update = rule.before_model(_state(request), request.runtime)
        except _NoSummary:
            update = None
        if update is None:
            return handler(request)
        kept = update["messages"][1:]
        return _replacing(request, kept, handler(request.override(messages=kept)))

    async def awrap_model_call(
        self, request: Request, handler: Callable[[Request], Awaitable[Response]]
    ) -> Response | Extended:
        """`wrap_model_call` for coroutines."""
        rule = self._rule(_Summarizer(self, request))
        try:
            update = await rule.abefore_model(_state(request), request.runtime)
        except _NoSummary:
            update = None
        if update is None:
            return await handler(request)
        kept = update["messages"][1:]
        return _replacing(request, kept, await handler(request.override(messages=kept)))

    def _rule(self, summarizer: _Summarizer) -> SummarizationMiddleware[Any, Any]:
        write = RunnableLambda(summarizer.write, summarizer.awrite)
        # Trimmed messages would no longer be a prefix of the conversation.
        return SummarizationMiddleware(
            self.model, summarizer=write, trim_tokens_to_summarize=None, **self._options
        )


class _NoSummary(Exception):
    """The model did not write one; the conversation is left as it is."""


class _Summarizer:
    """Writes the summary at the end of one request's own messages."""

    def __init__(self, middleware: PrefixSummarization, request: Request | None) -> None:
        self._middleware = middleware
        self._request = request

    def write(self, messages: list[AnyMessage]) -> str:
        """Return a summary of ``messages``, the first of the request's."""
        prompt = self._prompt(messages)
        for model in self._models():
            answer = model.invoke(prompt, _config())
            if answer.text.strip():
                return str(answer.text)
        raise self._none()

    async def awrite(self, messages: list[AnyMessage]) -> str:
        """`write` for coroutines."""
        prompt = self._prompt(messages)
        for model in self._models():
            answer = await model.ainvoke(prompt, _config())
            if answer.text.strip():
                return str(answer.text)
        raise self._none()

    def _prompt(self, messages: Sequence[BaseMessage]) -> list[BaseMessage]:
        assert self._request is not None
        system = self._request.system_message
        asked = [*messages, HumanMessage(self._middleware.summary_prompt)]
        return [system, *asked] if system is not None else asked

    def _models(self) -> list[Runnable[Any, AIMessage]]:
        """The request's model with its tools, which are part of the prefix; then, in case it calls one, without."""
        assert self._request is not None
        settings = dict(self._request.model_settings)
        if self._middleware.max_summary_tokens is not None:
            settings["max_tokens"] = self._middleware.max_summary_tokens
        alone = self._request.model.bind(**settings)
        tools = _offered(self._request)
        return [self._request.model.bind_tools(tools, **settings), alone] if tools else [alone]

    def _none(self) -> _NoSummary:
        logger.warning("the model wrote no summary: the conversation is left as it is")
        return _NoSummary()


def _config() -> RunnableConfig:
    return {"metadata": {"lc_source": "summarization", **internal_call_metadata()}}


def _state(request: Request) -> Any:
    """The state that LangChain's rule looks at: with the messages that would be sent."""
    return {**request.state, "messages": list(request.messages)}


def _offered(request: Request) -> list[Any]:
    """The tools that the model is shown in this request, with those by which a structured answer is given."""
    form = request.response_format
    if isinstance(form, AutoStrategy) and not (request.model.profile or {}).get("structured_output"):
        form = ToolStrategy(form.schema)
    specs = form.schema_specs if isinstance(form, ToolStrategy) else []
    return [*request.tools, *(OutputToolBinding.from_schema_spec(spec).tool for spec in specs)]


def _replacing(request: Request, kept: Sequence[AnyMessage], response: Response) -> Extended:
    """The response, with a change of the state to the summary, which is the first of ``kept``, and what follows it.

    The whole list is sent anew, as LangChain's own summariser does: messages have no lasting ids in every graph (those
    of ``create_deep_agent`` get other ones whenever the state is loaded), so single ones cannot be removed by theirs.
    The answer is in it because this change of the state is made after that of the answer.
    """
    summary, *recent = kept
    state = request.state["messages"]
    ids = [message.id for message in state]
    if not recent or recent[0].id not in ids:
        # What the model was shown is not what the state holds, so that there is nothing to replace in it.
        return ExtendedModelResponse(response)
    whole = [summary, *state[ids.index(recent[0].id) :], *response.result]
    return ExtendedModelResponse(
        response, Command(update={"messages": [RemoveMessage(id=REMOVE_ALL_MESSAGES), *whole]})
    )


__all__ = ["INSTRUCTION", "PrefixContextEditing", "PrefixSummarization"]
