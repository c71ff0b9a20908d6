"""What the adapters of all frameworks share: a model's fields, and the steps from a framework's call to a turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self
from uuid import UUID, uuid4

from pydantic import (
    AliasChoices,
    BaseModel,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from agent_memory_core.config import (
    Batching,
    Durability,
    EngineConfig,
    KvBits,
    Prewarm,
    SamplingParams,
    Wired,
    absolute,
    as_model_name,
    check_model_name,
    choice_of,
    source_of,
)
from agent_memory_core.errors import InvalidRequest, InvalidSetting
from agent_memory_core.memory import AgentMemory
from agent_memory_core.messages import ChatRequest, InvalidToolCall, Message, SessionKey, ToolCall, TurnReport
from agent_memory_core.models.profile import sampling_for

_NONE_MEANS_SOMETHING = frozenset({"cache_dir", "kv_bits"})


class _NotGiven(str):
    """The value of a field that was not given, spelled as the default.

    ``model_fields_set`` alone cannot tell: pickling, and LangChain's ``configurable_fields``, make a new instance
    from every field of the old one. The defaults would then count as the user's choice, before environment and
    profile.
    """


def _engine_field(name: str, **more: Any) -> Any:
    """A field for one setting of the engine, described as there."""
    return Field(**{"default": None, "description": EngineConfig.model_fields[name].description} | more)


def _sampling_field(name: str, **more: Any) -> Any:
    """A field for one sampling value, described as there."""
    return Field(**{"default": None, "description": SamplingParams.model_fields[name].description} | more)


class Turn(NamedTuple):
    """A framework's call as the core runs it."""

    memory: AgentMemory
    """Who runs it."""
    request: ChatRequest
    """What is asked."""
    session: SessionKey
    """Whose memory it continues."""


class AdapterSettings(BaseModel):
    """The fields of a framework's model, and which of them the user has set.

    A base class for adapters, named before the framework's own class. An instance holds configuration only, and
    instances of equal configuration share one engine. A field that is not given comes from the environment
    (``AGENT_MEMORY_<FIELD>``), then the model's profile, then the default.
    """

    ENGINE_FIELDS: ClassVar[Mapping[str, str]] = {name: name for name in EngineConfig.model_fields}
    """Fields that the engine is built from, and the setting that each one is."""
    SAMPLING_FIELDS: ClassVar[tuple[str, ...]] = tuple(
        name for name, field in SamplingParams.model_fields.items() if source_of(field).in_environment
    )
    """Fields that a call may choose anew. ``stop`` is one too, but its values are lists here."""
    OTHER_NAMES: ClassVar[Mapping[str, str]] = {
        "max_completion_tokens": "max_tokens",
        "model_name": "model",
        "stop_sequences": "stop",
    }
    """Other names of a call's options."""
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"stream", "strict", "timeout"})
    """Options that frameworks pass to every model and that have no effect here."""

    model: str = _engine_field(
        "model", default=_NotGiven("tiny-chat"), validation_alias=AliasChoices("model", "model_name")
    )
    adapter_path: str | None = _engine_field("adapter_path")
    cache_dir: str | Path | None = _engine_field("cache_dir", default=_NotGiven("~/.agent_memory/caches"))
    session_id: str | None = Field(
        default=None,
        description="The session of calls that name none; without one, nothing reaches the disk.",
    )
    namespace: str = Field(
        default="default",
        min_length=1,
        description="Whose sessions these are: nothing is shared between namespaces.",
    )
    kv_bits: KvBits = _engine_field("kv_bits", default=_NotGiven("6/4"))
    memory_budget_mb: int | None = _engine_field("memory_budget_mb")
    disk_budget_mb: int | None = _engine_field("disk_budget_mb")
    min_free_mb: int | None = _engine_field("min_free_mb")
    max_batch_size: int | None = _engine_field("max_batch_size")
    batching: Batching | None = _engine_field("batching")
    block_tokens: int | None = _engine_field("block_tokens")
    prefill_chunk: int | None = _engine_field("prefill_chunk")
    prefill_chunk_busy: int | None = _engine_field("prefill_chunk_busy")
    context_length: int | None = _engine_field("context_length")
    wired: Wired | None = _engine_field("wired")
    prewarm: Prewarm | None = _engine_field("prewarm")
    durability: Durability | None = _engine_field("durability")
    temperature: float | None = _sampling_field("temperature")
    top_p: float | None = _sampling_field("top_p")
    top_k: int | None = _sampling_field("top_k")
    min_p: float | None = _sampling_field("min_p")
    repetition_penalty: float | None = _sampling_field("repetition_penalty")
    seed: int | None = _sampling_field("seed")
    max_tokens: int | None = _sampling_field(
        "max_tokens", validation_alias=AliasChoices("max_tokens", "max_completion_tokens")
    )
    stop: list[str] | None = _sampling_field("stop", validation_alias=AliasChoices("stop", "stop_sequences"))

    @model_validator(mode="before")
    @classmethod
    def _forget_what_was_not_given(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if not isinstance(value, _NotGiven)}

    @field_validator("model", mode="wrap")
    @classmethod
    def _remember_where_the_model_is(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        return check_model_name(value, check)

    @field_validator("cache_dir", "adapter_path", mode="before")
    @classmethod
    def _make_absolute(cls, value: Any) -> Any:
        # Kept as text, which frameworks can write as JSON.
        return str(absolute(value)) if value != "" and isinstance(value, (str, Path)) else value

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        """Refuse impossible values now; what the environment and a profile say is read at the first call."""
        EngineConfig(**self._settings())
        SamplingParams(**self._given(self.SAMPLING_FIELDS), stop=tuple(self.stop or ()))
        return self

    def _was_given(self, name: str) -> bool:
        """Whether the field ``name`` has a value to write down, and not what stands for none."""
        return not isinstance(getattr(self, name, None), _NotGiven)

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        """The fields of ``names`` that the user has set, with their values."""
        given = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        return {n: value for n, value in given.items() if value is not None or n in _NONE_MEANS_SOMETHING}

    def _settings(self, model: str | None = None) -> dict[str, Any]:
        """The settings of the engine that the user has given; ``model`` is a call's own choice."""
        settings: dict[str, Any] = {}
        for field, value in self._given(self.ENGINE_FIELDS).items():
            name = self.ENGINE_FIELDS[field]
            if settings.setdefault(name, value) != value:
                raise InvalidSetting(
                    f"{field}={value!r} and {name}={settings[name]!r} disagree: give one of them."
                )
        if model is not None:
            chosen, own = as_model_name(model), settings.get("model")
            if own is None or chosen.location != as_model_name(own).location:
                # LoRA adapters fit one model: those that the fields or the environment name are not for this one.
                settings |= {"model": chosen, "adapter_path": None}
        return settings

    @property
    def memory(self) -> AgentMemory:
        """The memory behind this model, to list, fork, pin or forget its sessions."""
        return self._memory()

    def _memory(self, model: str | None = None) -> AgentMemory:
        return AgentMemory.shared(**self._settings(model))

    def _options(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """A call's keywords by our own names."""
        return {self.OTHER_NAMES.get(name, name): value for name, value in keywords.items()}

    def _turn_of(
        self,
        messages: tuple[Message, ...],
        tools: Sequence[Mapping[str, Any]],
        session: SessionKey,
        options: dict[str, Any],
        *,
        response_schema: Mapping[str, Any] | None = None,
        stop: Sequence[str] | None = None,
    ) -> Turn:
        """Put a turn together from what the framework's adapter has translated and the options that are left.

        Raises:
            InvalidRequest: an option is unknown, or its value cannot be used.
        """
        memory = self._memory(options.pop("model", None))
        parallel = options.pop("parallel_tool_calls", None)
        request = ChatRequest(
            messages=messages,
            tools=tuple(tools),
            template_kwargs=options.pop("chat_template_kwargs", None) or {},
            tool_choice=chosen_tool(options.pop("tool_choice", None), tools),
            parallel_tool_calls=parallel is None or bool(parallel),
            response_schema=response_schema,
            sampling=self._sampling(memory.config.model, options, stop),
        )
        return Turn(memory, request, session)

    def _sampling(
        self, model: str, options: Mapping[str, Any], stop: Sequence[str] | None = None
    ) -> SamplingParams:
        """How one answer is sampled: the call's options before the model's fields."""
        known = {*self.SAMPLING_FIELDS, "stop"}
        for name in sorted(set(options) - known - self.WITHOUT_EFFECT):
            raise InvalidRequest(f"unknown option {name!r}: {choice_of(name, known)}")
        own = {name: options[name] for name in self.SAMPLING_FIELDS if options.get(name) is not None}
        if own.get("logprobs") is False:
            own.setdefault("top_logprobs", 0)
        ends = next((e for e in (stop, options.get("stop"), self.stop) if e is not None), ())
        own["stop"] = (ends,) if isinstance(ends, str) else tuple(ends)
        return sampling_for(model, {**self._given(self.SAMPLING_FIELDS), **own})


# Messages and tools -----------------------------------------------------------------------------------------


def merge_leading_systems(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return ``messages`` with the leading system messages as one: most chat templates read the first one only.

    Raises:
        InvalidRequest: there are no messages.
    """
    if not messages:
        raise InvalidRequest("messages=[] is not valid: at least one message.")
    count = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    if count < 2:
        return tuple(messages)
    text = "\n\n".join(message.content for message in messages[:count] if message.content)
    return (Message("system", text, name=messages[0].name), *messages[count:])


def chosen_tool(
    value: object, tools: Sequence[Mapping[str, Any]], *, required: bool = False
) -> Literal["none", "required"] | str | None:
    """Return a ``tool_choice``, in any form that is in use, as the core's: None (auto), "none", "required" or a name.

    Args:
        value: a word, True, the name of a tool, ``{"type": "any"}``, ``{"name": ...}`` or OpenAI's nested form.
        tools: OpenAI function schemas.
        required: a tool has to be called, whichever it is.

    Raises:
        InvalidRequest: the form is unknown, or no such tool is there.
    """
    word = _word_of(value)
    if word == "auto" and required:
        word = "required"
    names = [str(tool["function"]["name"]) for tool in tools]
    if word in ("auto", "none"):
        return "none" if word == "none" else None
    if word in ("any", "required") and names:
        return "required"
    if word in names:
        return word
    known = ", ".join(names) or "the name of a tool, but no tool is offered"
    raise InvalidRequest(f'tool_choice={value!r} is not valid: "auto", "none", "any", "required" or {known}.')


def _word_of(value: object) -> str | None:
    if value is None or isinstance(value, bool):
        return "required" if value else "auto"
    if isinstance(value, Mapping):
        function = value.get("function")
        named = function if isinstance(function, Mapping) else value
        value = named.get("name", named.get("type"))
    return value if isinstance(value, str) else None


def id_of(call: ToolCall | InvalidToolCall) -> str:
    """The id of a call; a new one where the model gave none."""
    return (call.id if isinstance(call, ToolCall) else "") or f"call_{uuid4().hex}"


def measurements(report: TurnReport) -> dict[str, Any]:
    """What an answer's metadata tells of its turn, in every framework. Times are in milliseconds."""
    return {
        "finish_reason": report.finish_reason,
        "hit_tier": report.hit_tier,
        "miss_reason": report.miss_reason,
        "restore_ms": round(report.restore_seconds * 1000, 3),
        "ttft_ms": round(report.time_to_first_token * 1000, 3),
        "session_id": report.session_id,
        "branch_id": report.branch_id,
        "persisted": report.persisted,
    }


# Sessions ---------------------------------------------------------------------------------------------------


def session_text(value: object) -> str | None:
    """A session id or namespace as text; None for what is not text, a whole number or a UUID."""
    if isinstance(value, (str, int, UUID)) and not isinstance(value, bool) and value != "":
        return str(value)
    return None


def chosen_text(value: object, name: str) -> str | None:
    """The same for a value that the caller has chosen, which is not passed over where it cannot be used.

    Raises:
        InvalidRequest: it is neither text, a whole number nor a UUID.
    """
    text = session_text(value)
    if text is None and value is not None and value != "":
        raise InvalidRequest(f"{name}={value!r} is not valid: text, a whole number or a UUID.")
    return text
