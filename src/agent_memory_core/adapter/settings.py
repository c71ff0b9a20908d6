"""A model's fields, which of them the user has set, and the steps from a framework's call to a turn."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import (
    BaseModel,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from agent_memory_core.adapter.options import (
    CALL_OPTIONS,
    OTHER_NAMES,
    REASONING_EFFORTS,
    WITHOUT_EFFECT,
    check_neutral,
    check_timeout,
    nearest,
    one_name_each,
    template_kwargs,
)
from agent_memory_core.adapter.tools import chosen_tool
from agent_memory_core.config import (
    Batching,
    ColdAck,
    ComputeDtype,
    ControlWords,
    Durability,
    Encryption,
    EngineConfig,
    KvBits,
    Prewarm,
    SamplingParams,
    Wired,
    absolute,
    as_model_name,
    check_model_name,
)
from agent_memory_core.errors import InvalidRequest, InvalidSetting
from agent_memory_core.memory import AgentMemory
from agent_memory_core.messages import ChatRequest, Message, SessionKey
from agent_memory_core.models.profile import sampling_for
from agent_memory_core.setting_words import choice_of

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


class UnknownSetting(UserWarning):
    """A name was given to a constructor that means nothing to it."""


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
        name for name in SamplingParams.model_fields if name != "stop"
    )
    """Fields that a call may choose anew. ``stop`` is one too, but its values are lists here."""
    OTHER_NAMES: ClassVar[Mapping[str, str]] = OTHER_NAMES
    """Other names of fields and of a call's options."""
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset(WITHOUT_EFFECT)
    """Names that are ignored on purpose, see `options`."""
    REFUSES_UNKNOWN: ClassVar[bool] = True
    """Whether a constructor's unknown name is an error; else it is one only where it is a slip of a field's name."""

    model: str = _engine_field("model", default=_NotGiven("tiny-chat"))
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
    namespace_budget_mb: int | None = _engine_field("namespace_budget_mb")
    min_free_mb: int | None = _engine_field("min_free_mb")
    max_batch_size: int | None = _engine_field("max_batch_size")
    max_waiting: int | None = _engine_field("max_waiting")
    batching: Batching | None = _engine_field("batching")
    block_tokens: int | None = _engine_field("block_tokens")
    prefill_chunk: int | None = _engine_field("prefill_chunk")
    prefill_chunk_busy: int | None = _engine_field("prefill_chunk_busy")
    context_length: int | None = _engine_field("context_length")
    control_words: ControlWords | None = _engine_field("control_words")
    compute_dtype: ComputeDtype | None = _engine_field("compute_dtype")
    wired: Wired | None = _engine_field("wired")
    prewarm: Prewarm | None = _engine_field("prewarm")
    session_ttl_days: float | None = _engine_field("session_ttl_days")
    durability: Durability | None = _engine_field("durability")
    encryption: Encryption | None = _engine_field("encryption")
    cold_url: str | None = _engine_field("cold_url")
    cold_ack: ColdAck | None = _engine_field("cold_ack")
    cold_timeout_seconds: float | None = _engine_field("cold_timeout_seconds")
    cold_ttl_days: float | None = _engine_field("cold_ttl_days")
    temperature: float | None = _sampling_field("temperature")
    top_p: float | None = _sampling_field("top_p")
    top_k: int | None = _sampling_field("top_k")
    min_p: float | None = _sampling_field("min_p")
    repetition_penalty: float | None = _sampling_field("repetition_penalty")
    seed: int | None = _sampling_field("seed")
    max_tokens: int | None = _sampling_field("max_tokens")
    stop: list[str] | None = _sampling_field("stop")
    logprobs: bool | None = _sampling_field("logprobs")
    top_logprobs: int | None = _sampling_field("top_logprobs")
    timeout: float | None = Field(
        default=None,
        description="Seconds that an answer may take, waiting included; then it is given up with an error.",
    )
    thinking: bool | str | dict[str, Any] | None = Field(
        default=None,
        description="Whether the model thinks before it answers, where its chat template knows enable_thinking; or, "
        "in one word or as other packages write it, how much.",
    )
    reasoning_effort: str | None = Field(
        default=None,
        description="How much the model thinks, where its chat template knows reasoning_effort: "
        f"{', '.join(REASONING_EFFORTS)}.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further arguments of the chat template; those of a call go before them."
    )

    @model_validator(mode="before")
    @classmethod
    def _by_our_names(cls, values: Any) -> Any:
        """What was given, by the names of the fields."""
        if not isinstance(values, Mapping):
            return values
        given = {name: value for name, value in values.items() if not isinstance(value, _NotGiven)}
        known = _names_of(cls)
        found = check_neutral(one_name_each(given, cls.OTHER_NAMES, known))
        if (key := found.pop("prompt_cache_key", None)) is not None:
            found.setdefault("session_id", key)
        for name in [name for name in found if name not in known]:
            cls._unknown(name, known)
            del found[name]
        if isinstance(found.get("stop"), str):
            found["stop"] = [found["stop"]]
        return found

    @classmethod
    def _unknown(cls, name: str, known: frozenset[str]) -> None:
        """Refuse a name that is no field, or warn of it; nothing where it is ignored on purpose."""
        if name in cls.WITHOUT_EFFECT:
            return
        near = nearest(name, {*known, *cls.OTHER_NAMES})
        hint = f"did you mean {near}?" if near else choice_of(name, known)
        if near or cls.REFUSES_UNKNOWN:
            raise InvalidSetting(f"unknown setting {name!r}: {hint}")
        warnings.warn(
            f"{name!r} is no setting of {cls.__name__} and has no effect: {hint}",
            UnknownSetting,
            stacklevel=2,
        )

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
        check_timeout(self.timeout)
        self._template_kwargs()
        return self

    def _template_kwargs(self) -> dict[str, Any]:
        """What every call tells the chat template."""
        return template_kwargs(self.thinking, self.reasoning_effort, self.chat_template_kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; the value is checked as at construction, together with the others that were given."""
        own = {*AdapterSettings.model_fields, *self.ENGINE_FIELDS, *self.SAMPLING_FIELDS}
        if name in own:
            given = {other: getattr(self, other) for other in self.model_fields_set & own}
            value = getattr(type(self)(**given | {name: value}), name)
        super().__setattr__(name, value)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            if name not in AdapterSettings.model_fields or (
                name in self.model_fields_set and self._was_given(name)
            ):
                yield name, value

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
        """A call's keywords by our own names, without those that change nothing.

        Raises:
            InvalidRequest: a value that changes nothing is the only one there can be, and it is another.
            InvalidSetting: one thing was given two values under two names.
        """
        return check_neutral(one_name_each(keywords, self.OTHER_NAMES, frozenset()))

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
        said = (options.pop(name, None) for name in ("thinking", "reasoning_effort", "chat_template_kwargs"))
        timeout = options.pop("timeout", self.timeout)
        request = ChatRequest(
            messages=messages,
            tools=tuple(tools),
            template_kwargs=self._template_kwargs() | template_kwargs(*said),
            tool_choice=chosen_tool(options.pop("tool_choice", None), tools),
            parallel_tool_calls=parallel is None or bool(parallel),
            response_schema=response_schema,
            continue_final_message=bool(options.pop("continue_final_message", False)),
            sampling=self._sampling(memory.config.model, options, stop),
            timeout=check_timeout(timeout),
        )
        return Turn(memory, request, session)

    def _sampling(
        self, model: str, options: Mapping[str, Any], stop: Sequence[str] | None = None
    ) -> SamplingParams:
        """How one answer is sampled: the call's options before the model's fields."""
        known = {*self.SAMPLING_FIELDS, "stop"}
        for name in sorted(set(options) - known - self.WITHOUT_EFFECT):
            if name in self.ENGINE_FIELDS:
                raise InvalidRequest(
                    f"{name!r} is a setting of the model and not of a call: give it to its constructor."
                )
            raise InvalidRequest(f"unknown option {name!r}: {choice_of(name, {*known, *CALL_OPTIONS})}")
        own = {name: options[name] for name in self.SAMPLING_FIELDS if options.get(name) is not None}
        if own.get("logprobs") is False:
            own.setdefault("top_logprobs", 0)
        ends = next((e for e in (stop, options.get("stop"), self.stop) if e is not None), ())
        own["stop"] = (ends,) if isinstance(ends, str) else tuple(ends)
        return sampling_for(model, {**self._given(self.SAMPLING_FIELDS), **own})


@cache
def _names_of(cls: type[BaseModel]) -> frozenset[str]:
    """The names by which a class takes its fields."""
    fields = cls.model_fields.items()
    aliases = {field.alias for _, field in fields if field.alias is not None}
    return frozenset({name for name, _ in fields} | aliases)
