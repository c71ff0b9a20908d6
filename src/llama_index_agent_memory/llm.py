"""``MLXPersistentLLM``: a LlamaIndex model that remembers across turns, restarts and agents."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    ToolCallBlock,
)
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import BaseTool
from llama_index.core.types import PydanticProgramMode
from llama_index_instrumentation import get_dispatcher
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from agent_memory_core import (
    AdapterSettings,
    AgentMemory,
    ChatRequest,
    EngineConfig,
    TurnReport,
    sampling_for,
    settings_for,
)
from agent_memory_core.adapter import Turn, chosen_text, chosen_tool, to_response_schema
from llama_index_agent_memory.messages import (
    ResponseWriter,
    to_chat_response,
    to_completion,
    to_core,
    to_llama_index,
    to_tools,
)
from llama_index_agent_memory.sessions import Surroundings, alook_around, look_around, resolve_session
from llama_index_agent_memory.structured import (
    aobjects,
    check_called,
    end_of,
    objects,
    to_object,
    to_schema,
)

dispatcher = get_dispatcher(__name__)

_context_windows: WeakKeyDictionary[AgentMemory, int] = WeakKeyDictionary()
"""The context length of each engine, which is asked once: LlamaIndex reads a model's metadata at every step."""


class MLXPersistentLLM(AdapterSettings, FunctionCallingLLM):
    """A function calling model on MLX whose key-value memory lives as long as the conversation.

    An instance holds configuration only: nothing is loaded or opened before the first call, and instances of
    equal configuration share one engine. A field that is not given comes from the environment
    (``AGENT_MEMORY_<FIELD>``), then the model's profile, then the default.

    The session comes from the call: ``session_id=``, ``with memory_session("ada"):``, the workflow's context or
    memory, or the model's own ``session_id``; without any, nothing reaches the disk. See
    ``llama_index_agent_memory.sessions`` for the whole order.

    A call may choose its own ``model``, ``session_id``, ``namespace``, sampling and ``stop``, ``tools`` with
    ``tool_choice``, a ``response_schema`` that the answer has to fit, and hand ``chat_template_kwargs`` to the
    model's chat template; an option that means nothing here is refused.

        llm = MLXPersistentLLM(model="tiny-chat", session_id="ada")
        llm.complete("My name is Ada.")
    """

    ENGINE_FIELDS: ClassVar[Mapping[str, str]] = {
        **AdapterSettings.ENGINE_FIELDS,
        "context_window": "context_length",
    }

    OTHER_NAMES: ClassVar[Mapping[str, str]] = {
        **AdapterSettings.OTHER_NAMES,
        "allow_parallel_tool_calls": "parallel_tool_calls",
    }
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = AdapterSettings.WITHOUT_EFFECT | {"formatted", "verbose"}

    context_window: int | None = Field(
        default=None,
        description=f"LlamaIndex's name of context_length. {EngineConfig.model_fields['context_length'].description}",
    )

    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", populate_by_name=True, protected_namespaces=()
    )

    # Configuration ------------------------------------------------------------------------------------------

    @model_serializer(mode="wrap")
    def custom_model_dump(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        """Leave out fields that were not given: JSON has no value for that."""
        data = super().custom_model_dump(handler, info)
        return {name: value for name, value in data.items() if self._was_given(name)}

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex knows this class."""
        return "MLXPersistentLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex asks of every model; where no ``context_window`` is set, this loads the model once."""
        config = settings_for(self._settings())
        return LLMMetadata(
            context_window=config.context_length or self._context_window(),
            num_output=sampling_for(config.model, self._given(self.SAMPLING_FIELDS)).max_tokens,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=str(config.model),
        )

    def _context_window(self) -> int:
        memory = self._memory()
        if memory not in _context_windows:
            _context_windows[memory] = memory.context_length
        return _context_windows[memory]

    def to_payload(self) -> dict[str, Any]:
        """What events show of this model, without loading it: no sessions, namespaces or folders."""
        model = settings_for(self._settings()).model
        sampling = sampling_for(model, self._given(self.SAMPLING_FIELDS))
        return {
            "class_name": self.class_name(),
            "model": str(model),
            "model_name": str(model),
            "is_chat_model": True,
            "is_function_calling_model": True,
            **{name: getattr(sampling, name) for name in self.SAMPLING_FIELDS},
        }

    # Chat ---------------------------------------------------------------------------------------------------
    # Streams resolve the session at the call: they may be read in another thread or context.

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer ``messages``."""
        return _answer(self._turn(messages, kwargs, self._look_around()))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer ``messages`` piece by piece; each response has the answer so far and the new piece of it."""
        return _stream(self._turn(messages, kwargs, self._look_around()))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` for coroutines: no thread waits."""
        return await _aanswer(self._turn(messages, kwargs, await self._alook_around()))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` for coroutines: no thread waits."""
        return _astream(self._turn(messages, kwargs, await self._alook_around()))

    # A prompt becomes one message of the user, because the model is trained for conversations.

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer ``prompt``."""
        return to_completion(_answer(self._turn(_from_user(prompt), kwargs, self._look_around())))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer ``prompt`` piece by piece."""
        pieces = _stream(self._turn(_from_user(prompt), kwargs, self._look_around()))
        return (to_completion(piece) for piece in pieces)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` for coroutines: no thread waits."""
        return to_completion(
            await _aanswer(self._turn(_from_user(prompt), kwargs, await self._alook_around()))
        )

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """`stream_complete` for coroutines: no thread waits."""
        pieces = _astream(self._turn(_from_user(prompt), kwargs, await self._alook_around()))
        return (to_completion(piece) async for piece in pieces)

    def _look_around(self) -> Surroundings:
        return look_around(self.callback_manager.handlers)

    async def _alook_around(self) -> Surroundings:
        return await alook_around(self.callback_manager.handlers)

    def _turn(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any], seen: Surroundings) -> Turn:
        options = self._options(kwargs)
        cache_key = chosen_text(options.pop("prompt_cache_key", None), "prompt_cache_key")
        session = resolve_session(
            seen,
            session_id=options.pop("session_id", None),
            namespace=options.pop("namespace", None),
            default_session_id=cache_key or self.session_id,
            default_namespace=self.namespace,
        )
        tools = to_tools(options.pop("tools", None) or ())
        schema = to_schema(options.pop("response_schema", None))
        if (form := to_response_schema(options.pop("response_format", None))) is not None:
            schema = form
        return self._turn_of(to_core(messages), tools, session, options, response_schema=schema)

    # Tools --------------------------------------------------------------------------------------------------

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the keywords for ``chat``; the caller's list of messages stays as it is."""
        offered = to_tools(tools)
        new = [] if user_msg is None else [user_msg]
        added = [ChatMessage(role=MessageRole.USER, content=m) if isinstance(m, str) else m for m in new]
        return {
            "messages": [*(chat_history or ()), *added],
            "tools": offered,
            "tool_choice": chosen_tool(tool_choice, offered, required=tool_required),
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def _validate_chat_with_tools_response(
        self,
        response: ChatResponse,
        tools: Sequence[BaseTool],
        allow_parallel_tool_calls: bool = False,
        **kwargs: Any,
    ) -> ChatResponse:
        """Keep only the first call, if only one is allowed."""
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if len(calls) > 1 and not allow_parallel_tool_calls:
            response.message.blocks = [
                block
                for block in response.message.blocks
                if block is calls[0] or not isinstance(block, ToolCallBlock)
            ]
        return response

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the calls that ``response`` asks for.

        Raises:
            ValueError: there are none, and ``error_on_no_tool_call`` is set.
        """
        (message,) = to_core([response.message])
        if not message.tool_calls and error_on_no_tool_call:
            cut = end_of(response, "a tool call")
            raise ValueError(cut or f"expected at least one tool call; the answer was {message.content!r}.")
        return [
            ToolSelection(tool_id=call.id, tool_name=call.name, tool_kwargs=dict(call.arguments))
            for call in message.tool_calls
        ]

    # Structured answers -------------------------------------------------------------------------------------
    # By the schema of the class, or by a tool where ``pydantic_program_mode`` says so.

    @dispatcher.span
    def structured_predict(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        """Answer a prompt with an object of ``output_cls``. Arguments are those of every LlamaIndex model.

        Raises:
            ValueError: the answer ended before the object was complete.
        """
        if self.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            return super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        _told_start(output_cls, prompt, prompt_args)
        asked = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        return _told_end(to_object(output_cls, self.chat(**asked)))

    @dispatcher.span
    async def astructured_predict(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        """`structured_predict` for coroutines: no thread waits."""
        if self.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        _told_start(output_cls, prompt, prompt_args)
        asked = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        return _told_end(to_object(output_cls, await self.achat(**asked)))

    def _structured_stream_call(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        if self.pydantic_program_mode not in _OWN_MODES:
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        asked = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        return objects(output_cls, self.stream_chat(**asked))

    async def _structured_astream_call(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        if self.pydantic_program_mode not in _OWN_MODES:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        asked = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        return aobjects(output_cls, await self.astream_chat(**asked))

    def _structured(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: Mapping[str, Any] | None,
        prompt_args: Mapping[str, Any],
    ) -> dict[str, Any]:
        messages = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        asked = {**(llm_kwargs or {}), "messages": messages}
        if self.pydantic_program_mode is PydanticProgramMode.DEFAULT:
            return {**asked, "response_schema": output_cls}
        # LlamaIndex's own program forces the tool of a form, but not while streaming.
        (tool,) = to_tools([get_function_tool(output_cls)])
        return {**asked, "tools": [tool], "tool_choice": tool["function"]["name"]}

    # Ahead of time ------------------------------------------------------------------------------------------

    def prefill(
        self,
        messages: Sequence[ChatMessage] | str,
        tools: Sequence[BaseTool] = (),
        *,
        session_id: str | None = None,
        namespace: str | None = None,
        **options: Any,
    ) -> TurnReport:
        """Compute the keys and values of ``messages`` and ``tools`` now, so that a prompt that begins so is warm.

        Documents that many sessions ask about are best prefilled in a session of their own, and that one pinned: all
        sessions of the namespace then share them.

        Args:
            messages: the beginning of later prompts; text is one message of the user.
            tools: the tools of those prompts.
            session_id: whose memory it is; without one (here, around the call or of the model) it is in memory only.
            namespace: the namespace of the session.
            options: ``model``, ``chat_template_kwargs`` and ``thinking``, as of a call.

        Raises:
            InvalidRequest: a message, a tool or an option cannot be used.
        """
        turn = self._prefilling(messages, tools, session_id, namespace, options, self._look_around())
        return turn.memory.prewarm(turn.request, turn.session)

    async def aprefill(
        self,
        messages: Sequence[ChatMessage] | str,
        tools: Sequence[BaseTool] = (),
        *,
        session_id: str | None = None,
        namespace: str | None = None,
        **options: Any,
    ) -> TurnReport:
        """`prefill` for coroutines: no thread waits."""
        seen = await self._alook_around()
        turn = self._prefilling(messages, tools, session_id, namespace, options, seen)
        return await turn.memory.aprewarm(turn.request, turn.session)

    def _prefilling(
        self,
        messages: Sequence[ChatMessage] | str,
        tools: Sequence[BaseTool],
        session_id: str | None,
        namespace: str | None,
        options: Mapping[str, Any],
        seen: Surroundings,
    ) -> Turn:
        said = _from_user(messages) if isinstance(messages, str) else messages
        named = {"session_id": session_id, "namespace": namespace}
        return self._turn(said, {**options, **named, "tools": tools}, seen)

    def transcript(self, session_id: str, namespace: str | None = None) -> list[ChatMessage]:
        """Return the messages of a session, read back from what the model was given and wrote; loads the model.

        A chat engine or a ``Memory`` whose history was lost can be given them: the next turn goes on where the session
        is. The system message is as the model read it, with the tools, where its chat template writes them there.
        ``llm.memory.transcript`` also tells whether they are exact.

        Raises:
            SessionNotFound: there is no such session, or none that this model has read.
        """
        return to_llama_index(self._memory().transcript(session_id, namespace or self.namespace).messages)

    # Tokens -------------------------------------------------------------------------------------------------

    def tokenizer(self, text: str) -> list[int]:
        """Return the model's own tokens of ``text``, for LlamaIndex's counters and splitters; loads the model."""
        return self._memory().encode(text)

    def count_tokens(self, messages: Sequence[ChatMessage], tools: Sequence[BaseTool] = ()) -> int:
        """Return the length of the prompt that ``messages`` and ``tools`` come to; this loads the model."""
        if not messages:
            return 0
        return self._memory().count_tokens(ChatRequest(to_core(messages), to_tools(tools)))


_OWN_MODES = frozenset({PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION})
"""Ways to a structured answer that the model's own methods know: by its schema, and by a forced tool."""


def _from_user(prompt: str) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=prompt)]


def _answer(turn: Turn) -> ChatResponse:
    return to_chat_response(turn.memory.chat(turn.request, turn.session))


async def _aanswer(turn: Turn) -> ChatResponse:
    return to_chat_response(await turn.memory.achat(turn.request, turn.session))


def _stream(turn: Turn) -> ChatResponseGen:
    writer = ResponseWriter()
    response = None
    with turn.memory.chat(turn.request, turn.session, stream=True) as answer:
        for delta in answer:
            for response in writer.responses(delta):
                yield response
    check_called(turn.request, response)


async def _astream(turn: Turn) -> ChatResponseAsyncGen:
    writer = ResponseWriter()
    response = None
    async with await turn.memory.achat(turn.request, turn.session, stream=True) as answer:
        async for delta in answer:
            for response in writer.responses(delta):
                yield response
    check_called(turn.request, response)


def _told_start(output_cls: type[Any], prompt: PromptTemplate, prompt_args: dict[str, Any]) -> None:
    dispatcher.event(
        LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
    )


def _told_end(found: BaseModel) -> BaseModel:
    dispatcher.event(LLMStructuredPredictEndEvent(output=found))
    return found
