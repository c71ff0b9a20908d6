"""``ChatMLXPersistent``: a LangChain chat model that remembers across turns, restarts and branches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, model_validator

from agent_memory_core import (
    ChatRequest,
    InvalidRequest,
    TurnReport,
    sampling_for,
    settings_for,
)
from agent_memory_core.adapter import Turn, chosen_tool, to_response_schema
from langchain_agent_memory.ending import Ending, OwnForm
from langchain_agent_memory.entry_points import CALL_KEY, SessionChatModel
from langchain_agent_memory.errors import understood
from langchain_agent_memory.messages import (
    PROVIDER,
    ChunkWriter,
    to_ai_message,
    to_core,
    to_langchain,
)
from langchain_agent_memory.profile import profile_of
from langchain_agent_memory.structured import (
    METHODS,
    Method,
    call_parser,
    form_tool,
    response_format,
    shown_schema,
    text_parser,
    to_tool,
    with_parser,
)

_PRIVATE = frozenset(
    {"session_id", "namespace", "cache_dir", "adapter_path", "metadata", "profile", "callbacks", "cache"}
)
"""Fields that traces do not show."""


class ChatMLXPersistent(SessionChatModel):
    """A chat model on MLX whose key-value memory lives as long as the conversation.

    Setup:
        ``pip install 'agent-memory-mlx[langchain]'``; on Linux add ``cpu``, ``cuda12`` or ``cuda13``. No key is needed.

    Key init args:
        model: an embedded name ("tiny-chat"), a folder with an MLX model, or a hub id.
        temperature, max_tokens, top_p, top_k, min_p, seed, stop: how an answer is sampled.
        session_id: the session of calls that name none; without any, nothing reaches the disk.
        namespace: whose sessions these are; nothing is shared between namespaces.
        cache_dir: where sessions are kept; None keeps them in memory only.
        timeout: seconds that an answer may take.

        The other fields are the settings of the engine. What is not given comes from the environment
        (``AGENT_MEMORY_<FIELD>``), then the model's profile, then the default. An instance holds configuration only:
        nothing is loaded or opened before the first call, and instances of equal configuration share one engine.

    Instantiate:
        ```python
        from langchain_agent_memory import ChatMLXPersistent

        llm = ChatMLXPersistent(model="tiny-chat", temperature=0, max_tokens=64)
        ```

    Invoke:
        The session comes from the call: ``session_id=``, ``session_id`` or ``thread_id`` of its configuration, the
        LangGraph thread it runs in, or the model's own; `langchain_agent_memory.sessions` has the whole order.

        ```python
        config = {"configurable": {"thread_id": "ada"}}
        history = [("system", "You are a helpful assistant."), ("user", "My name is Ada.")]
        history.append(llm.invoke(history, config))
        answer = llm.invoke([*history, ("user", "What is my name?")], config)
        ```

    Stream:
        ```python
        for chunk in llm.stream("Hello!"):
            print(chunk.text, end="")
        ```

    Async:
        ``ainvoke``, ``astream`` and ``abatch`` wait without a thread.

        ```python
        import asyncio

        answers = asyncio.run(llm.abatch(["Hello!", "My name is Tom."]))
        ```

    Tool calling:
        A call that ``tool_choice`` forces fits its tool's schema; where no tool is offered, the answer is text.

        ```python
        from pydantic import BaseModel, Field

        class GetWeather(BaseModel):
            city: str = Field(max_length=20)

        llm.bind_tools([GetWeather], tool_choice="any").invoke("What is the weather in Rome?").tool_calls
        ```

    Structured output:
        The answer is held to the schema while it is written; one that was cut is an error that says so.

        ```python
        llm.with_structured_output(GetWeather).invoke("Rome")
        ```

    Ahead of time:
        ``prefill`` computes the beginning of later prompts before anybody waits for it.

        ```python
        llm.prefill([("system", "You are a helpful assistant.")], [GetWeather], session_id="rome")
        ```

    Usage:
        ``cache_read`` counts the tokens that were not computed again; ``miss_reason`` says why others were.

        ```python
        answer.usage_metadata["input_token_details"]["cache_read"]
        answer.response_metadata["miss_reason"]
        ```

    A call may choose its own ``model``, ``session_id``, ``namespace``, sampling, ``stop`` and ``timeout``, and hand
    ``chat_template_kwargs`` to the model's chat template; an option that means nothing here is refused.
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

    @model_validator(mode="after")
    def _with_profile(self) -> Self:
        """The profile on releases of LangChain that do not ask for it themselves."""
        if self.profile is None and not hasattr(BaseChatModel, "_resolve_model_profile"):
            self.__dict__["profile"] = self._resolve_model_profile()
        return self

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # LangChain's own fields, which it or the line above fills in.
        return (
            (name, value) for name, value in super().__repr_args__() if name not in ("profile", "metadata")
        )

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """What traces show of this model: nothing of its session, its namespace or its folders."""
        shown = [f"{name}={value!r}" for name, value in self.__repr_args__() if name not in _PRIVATE]
        said = super().to_json()
        if said["type"] == "not_implemented":
            said["repr"] = f"{type(self).__name__}({', '.join(shown)})"
        return said

    # One turn -----------------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        ending = Ending(kwargs, CALL_KEY, run_manager)
        turn = self._turn(messages, stop, run_manager, kwargs)
        with understood():
            result = turn.memory.chat(turn.request, turn.session)
        ending.take(result)
        ending.check()
        return ChatResult(generations=[ChatGeneration(message=to_ai_message(result))])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        ending = Ending(kwargs, CALL_KEY, run_manager)
        turn = self._turn(messages, stop, run_manager, kwargs)
        with understood():
            result = await turn.memory.achat(turn.request, turn.session)
        ending.take(result)
        ending.check()
        return ChatResult(generations=[ChatGeneration(message=to_ai_message(result))])

    # Token callbacks are LangChain's to call: run_manager is here for the session alone.
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        ending = Ending(kwargs, CALL_KEY, run_manager)
        turn = self._turn(messages, stop, run_manager, kwargs)
        writer = ChunkWriter(blocks=self.output_version == "v1")
        answer = turn.memory.chat(turn.request, turn.session, stream=True)
        try:
            with understood():
                for delta in answer:
                    ending.take(delta)
                    for chunk in writer.chunks(delta):
                        yield ChatGenerationChunk(message=chunk)
                ending.check()
        finally:
            answer.close()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        ending = Ending(kwargs, CALL_KEY, run_manager)
        turn = self._turn(messages, stop, run_manager, kwargs)
        writer = ChunkWriter(blocks=self.output_version == "v1")
        answer = await turn.memory.achat(turn.request, turn.session, stream=True)
        try:
            with understood():
                async for delta in answer:
                    ending.take(delta)
                    for chunk in writer.chunks(delta):
                        yield ChatGenerationChunk(message=chunk)
                ending.check()
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
        tools = [to_tool(tool) for tool in options.pop("tools", None) or ()]
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

    def transcript(self, session_id: str, namespace: str | None = None) -> list[BaseMessage]:
        """Return the messages of a session, read back from what the model was given and wrote; loads the model.

        Their history can be lost: a turn that begins with these messages goes on where the session is. The system
        message is as the model read it, with the tools, where its chat template writes them there.
        `AgentMemory.transcript`, as ``llm.memory.transcript``, also tells whether they are exact.

        Raises:
            SessionNotFound: there is no such session, or none that this model has read.
        """
        return to_langchain(self._memory().transcript(session_id, namespace or self.namespace).messages)

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
        offered = [to_tool(tool, strict=strict) for tool in tools]
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
            schema: a pydantic class, a typed dictionary, a Python type such as ``list[int]``, an enum or a union, a
                JSON schema or an OpenAI function schema.
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
        traced = {"kwargs": {"method": method, "strict": strict}, "schema": shown_schema(schema)}
        if method == "function_calling" and schema is not None:
            tool = form_tool(schema)
            name = tool["function"]["name"]
            bound = self.bind_tools([tool], tool_choice=name, ls_structured_output_format=traced, **kwargs)
            return with_parser(bound, call_parser(schema, name), include_raw=include_raw)
        form = OwnForm(response_format(schema or {}, method))
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
        offered = tuple(to_tool(tool) for tool in tools or ())
        return self._memory().count_tokens(ChatRequest(to_core(messages), offered))
