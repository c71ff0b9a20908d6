"""``ChatMLXPersistent``: a LangChain chat model that remembers across turns, restarts and branches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict

from agent_memory_core import (
    AdapterSettings,
    ChatRequest,
    InvalidRequest,
    SessionKey,
    TurnReport,
    sampling_for,
    settings_for,
)
from agent_memory_core.adapter import Turn, chosen_text, chosen_tool, to_response_schema
from langchain_agent_memory.call import Call, report_to
from langchain_agent_memory.errors import understood
from langchain_agent_memory.messages import (
    PROVIDER,
    ChunkWriter,
    to_ai_message,
    to_core,
)
from langchain_agent_memory.profile import profile_of
from langchain_agent_memory.sessions import resolve_session
from langchain_agent_memory.structured import (
    METHODS,
    Method,
    call_parser,
    form_tool,
    response_format,
    text_parser,
    with_parser,
)

_KEY = "agent_memory_session"
"""The keyword under which a `Call` travels from an entry point to the model's inside."""

_PRIVATE = frozenset(
    {"session_id", "namespace", "cache_dir", "adapter_path", "metadata", "profile", "callbacks", "cache"}
)
"""Fields that traces do not show."""


class ChatMLXPersistent(AdapterSettings, BaseChatModel):
    """A chat model on MLX whose key-value memory lives as long as the conversation.

    An instance holds configuration only: nothing is loaded or opened before the first call, and instances of
    equal configuration share one engine. A field that is not given comes from the environment
    (``AGENT_MEMORY_<FIELD>``), then the model's profile, then the default.

    The session comes from the call: ``session_id=``, ``session_id`` or ``thread_id`` of its configuration, the
    LangGraph thread it runs in, or the model's own ``session_id``; without any, nothing reaches the disk. See
    ``langchain_agent_memory.sessions`` for the whole order.

    A call may choose its own ``model``, ``session_id``, ``namespace``, sampling and ``stop``, and hand
    ``chat_template_kwargs`` to the model's chat template; an option that means nothing here is refused.

        llm = ChatMLXPersistent(model="tiny-chat")
        llm.invoke("My name is Ada.", config={"configurable": {"thread_id": "ada"}})
    """

    # LangChain's own tests hand over names of other providers.
    REFUSES_UNKNOWN: ClassVar[bool] = False

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    # Configuration ------------------------------------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "mlx-persistent"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """All that an answer depends on, as a part of the response cache's key."""
        engine = settings_for(self._settings())
        sampling = sampling_for(engine.model, self._given(self.SAMPLING_FIELDS))
        return {
            "model": str(engine.model),
            "adapter_path": engine.adapter_path,
            "kv_bits": engine.kv_bits,
            **{name: getattr(sampling, name) for name in self.SAMPLING_FIELDS},
            "stop": list(self.stop or ()),
            "chat_template_kwargs": self._template_kwargs(),
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = PROVIDER
        if "model" not in kwargs:
            params["ls_model_name"] = str(settings_for(self._settings()).model)
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        settings = settings_for(self._settings())
        sampling = sampling_for(settings.model, self._given(self.SAMPLING_FIELDS))
        return profile_of(self._memory(), sampling)

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """What traces show of this model: nothing of its session, its namespace or its folders."""
        shown = [f"{name}={value!r}" for name, value in self.__repr_args__() if name not in _PRIVATE]
        said = super().to_json()
        if said["type"] == "not_implemented":
            said["repr"] = f"{type(self).__name__}({', '.join(shown)})"
        return said

    # Entry points: resolve the session before BaseChatModel drops the configuration -------------------------

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        call = self._call(config, kwargs)
        return call.reported(super().invoke(input, config, stop=stop, **self._keywords(kwargs, call)))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        call = self._call(config, kwargs)
        return call.reported(await super().ainvoke(input, config, stop=stop, **self._keywords(kwargs, call)))

    # Neither of the next two is a generator itself: its first line has to run at the call.
    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        call = self._call(config, kwargs)
        return call.in_stream(super().stream(input, config, stop=stop, **self._keywords(kwargs, call)))

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        call = self._call(config, kwargs)
        return call.in_async_stream(super().astream(input, config, stop=stop, **self._keywords(kwargs, call)))

    # Versions 1 and 2 of the events come by way of the methods above.
    def stream_events(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        version: str = "v2",
        **kwargs: Any,
    ) -> Any:
        if version == "v3":
            kwargs = self._keywords(kwargs, self._call(config, kwargs))
        return super().stream_events(input, config, version=version, **kwargs)  # type: ignore[call-overload]

    def astream_events(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        version: str = "v2",
        **kwargs: Any,
    ) -> Any:
        if version == "v3":
            kwargs = self._keywords(kwargs, self._call(config, kwargs))
        return super().astream_events(input, config, version=version, **kwargs)  # type: ignore[call-overload]

    def _call(self, config: RunnableConfig | None, kwargs: Mapping[str, Any]) -> Call:
        """The call that these keywords belong to: one entry point may go on to another one."""
        if _KEY in kwargs:
            call: Call = kwargs[_KEY]
            return call
        return Call(self._take_session(dict(kwargs), config=config))

    def _keywords(self, kwargs: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """The keywords with the call in place of what named its session."""
        named = ("session_id", "namespace", "prompt_cache_key", _KEY)
        return {**{name: value for name, value in kwargs.items() if name not in named}, _KEY: call}

    def _take_session(
        self, kwargs: dict[str, Any], *, config: RunnableConfig | None = None, run_manager: object = None
    ) -> SessionKey:
        """Remove from ``kwargs`` what names a session, and return the key."""
        own = {name: kwargs.pop(name, None) for name in ("session_id", "namespace")}
        cache_key = chosen_text(kwargs.pop("prompt_cache_key", None), "prompt_cache_key")
        call: Call | None = kwargs.pop(_KEY, None)
        if call is not None:
            return call.key
        return resolve_session(
            config,
            run_manager=run_manager,
            default_session_id=cache_key or self.session_id,
            default_namespace=self.namespace,
            **own,
        )

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """The parameters that traces show of a call, without its session."""
        self._take_session(kwargs)
        return super()._get_invocation_params(stop=stop, **kwargs)

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The response cache's key next to the prompt: sessions share answers, namespaces do not."""
        key = self._take_session(kwargs)
        return f"{super()._get_llm_string(stop=stop, **kwargs)}---{key.namespace}"

    # One turn -----------------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        turn = self._turn(messages, stop, run_manager, kwargs)
        with understood():
            result = turn.memory.chat(turn.request, turn.session)
        return _result(to_ai_message(result), result.report, kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        turn = self._turn(messages, stop, run_manager, kwargs)
        with understood():
            result = await turn.memory.achat(turn.request, turn.session)
        return _result(to_ai_message(result), result.report, kwargs)

    # Token callbacks are LangChain's to call: run_manager is here for the session alone.
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        turn = self._turn(messages, stop, run_manager, kwargs)
        writer = ChunkWriter(blocks=self.output_version == "v1")
        answer = turn.memory.chat(turn.request, turn.session, stream=True)
        try:
            with understood():
                for delta in answer:
                    report_to(kwargs, _KEY, delta.report)
                    for chunk in writer.chunks(delta):
                        yield ChatGenerationChunk(message=chunk)
        finally:
            answer.close()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        turn = self._turn(messages, stop, run_manager, kwargs)
        writer = ChunkWriter(blocks=self.output_version == "v1")
        answer = await turn.memory.achat(turn.request, turn.session, stream=True)
        try:
            with understood():
                async for delta in answer:
                    report_to(kwargs, _KEY, delta.report)
                    for chunk in writer.chunks(delta):
                        yield ChatGenerationChunk(message=chunk)
        finally:
            await answer.aclose()

    def _turn(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        run_manager: object | None,
        kwargs: Mapping[str, Any],
    ) -> Turn:
        options = self._options(kwargs)
        session = self._take_session(options, run_manager=run_manager)
        tools = [convert_to_openai_tool(tool) for tool in options.pop("tools", None) or ()]
        schema = to_response_schema(options.pop("response_format", None))
        return self._turn_of(to_core(messages), tools, session, options, response_schema=schema, stop=stop)

    # Ahead of time ------------------------------------------------------------------------------------------

    def prefill(
        self,
        messages: LanguageModelInput,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] = (),
        *,
        config: RunnableConfig | None = None,
        session_id: str | None = None,
        namespace: str | None = None,
        **options: Any,
    ) -> TurnReport:
        """Compute the keys and values of ``messages`` and ``tools`` now, so that a prompt that begins so is warm.

        Tools that were bound with ``bind_tools`` are not handed on: name them here.

        Args:
            messages: the beginning of later prompts, as for ``invoke``; text is one message of the user.
            tools: the tools of those prompts, as for ``bind_tools``.
            config: a configuration that names the session, as for ``invoke``.
            session_id: whose memory it is; where no session is named, it is kept in memory only.
            namespace: the namespace of the session.
            options: ``model``, ``chat_template_kwargs``, ``thinking`` and ``timeout``, as of a call.

        Returns:
            What the prompt came to: ``report.usage.cache_read`` tokens of it were known, ``cache_creation`` are new.

        Raises:
            InvalidRequest: a message, a tool or an option cannot be used.
        """
        turn = self._prefilling(messages, tools, config, session_id, namespace, options)
        with understood():
            return turn.memory.prewarm(turn.request, turn.session)

    async def aprefill(
        self,
        messages: LanguageModelInput,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] = (),
        *,
        config: RunnableConfig | None = None,
        session_id: str | None = None,
        namespace: str | None = None,
        **options: Any,
    ) -> TurnReport:
        """`prefill` for coroutines: no thread waits."""
        turn = self._prefilling(messages, tools, config, session_id, namespace, options)
        with understood():
            return await turn.memory.aprewarm(turn.request, turn.session)

    def _prefilling(
        self,
        messages: LanguageModelInput,
        tools: Sequence[Any],
        config: RunnableConfig | None,
        session_id: str | None,
        namespace: str | None,
        options: Mapping[str, Any],
    ) -> Turn:
        named = {**options, "session_id": session_id, "namespace": namespace}
        keywords = self._keywords(named, self._call(config, named))
        return self._turn(
            self._convert_input(messages).to_messages(), None, None, keywords | {"tools": tools}
        )

    # Tools --------------------------------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return this model with ``tools`` to call.

        Args:
            tools: functions, LangChain tools, pydantic classes, typed dictionaries or JSON schemas.
            tool_choice: "auto" or None, "none", "any", "required" or True, the name of a tool, or OpenAI's
                ``{"type": "function", "function": {"name": ...}}``.
            strict: whether the tools' schemas are made strict; the arguments of a forced call fit in any case.
            kwargs: further options of every call, for example ``parallel_tool_calls``.

        Raises:
            InvalidRequest: ``tool_choice`` is none of these, or names a tool that is not there.
        """
        offered = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        if tool_choice is not None:
            chosen_tool(tool_choice, offered)
            kwargs["tool_choice"] = tool_choice
        return self.bind(tools=offered, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return this model with answers that fit ``schema``: the model cannot write anything else.

        Args:
            schema: a pydantic class, a typed dictionary, a JSON schema or an OpenAI function schema.
            method: "json_schema" asks for text of that form, "function_calling" forces a call of a tool of that
                form, "json_mode" asks for any JSON object and then reads it as ``schema``, if one is given.
            include_raw: whether to return ``raw``, ``parsed`` and ``parsing_error`` instead of raising.
            strict: accepted and without effect: answers always fit.
            kwargs: further options of every call.

        Raises:
            InvalidRequest: the method is unknown, or has no schema.
        """
        if method not in METHODS:
            raise InvalidRequest(f"method={method!r} is not valid: {', '.join(METHODS)}.")
        if schema is None and method != "json_mode":
            raise InvalidRequest(f"schema=None is not valid for the method {method!r}: only for json_mode.")
        shown = schema if schema is not None else {"title": "answer", "type": "object"}
        traced = {"kwargs": {"method": method, "strict": strict}, "schema": shown}
        if method == "function_calling" and schema is not None:
            tool = form_tool(schema)
            name = tool["function"]["name"]
            bound = self.bind_tools([tool], tool_choice=name, ls_structured_output_format=traced, **kwargs)
            return with_parser(bound, call_parser(schema, name), include_raw=include_raw)
        form = response_format(schema or {}, method)
        bound = self.bind(response_format=form, ls_structured_output_format=traced, **kwargs)
        return with_parser(bound, text_parser(schema), include_raw=include_raw)

    # Tokens -------------------------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        """Return the model's own tokens of ``text``; this loads the model."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._memory().encode(text)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Return the length of the prompt that ``messages`` and ``tools`` come to; this loads the model."""
        if not messages:
            return 0
        offered = tuple(convert_to_openai_tool(tool) for tool in tools or ())
        return self._memory().count_tokens(ChatRequest(to_core(messages), offered))


def _result(message: AIMessage, report: TurnReport, kwargs: Mapping[str, Any]) -> ChatResult:
    report_to(kwargs, _KEY, report)
    return ChatResult(generations=[ChatGeneration(message=message)])
