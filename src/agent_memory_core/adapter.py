"""What an adapter's model is set up with: the same fields, in the same words, for every framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import AliasChoices, BaseModel, Field, field_validator, model_validator

from agent_memory_core.config import EngineConfig, SamplingParams
from agent_memory_core.memory import AgentMemory

_NONE_MEANS_SOMETHING = frozenset({"cache_dir", "kv_bits"})


class _NotGiven(str):
    """The value of a field that was not given, spelled as what it usually comes to.

    ``model_fields_set`` alone cannot tell: pickling, and LangChain's ``configurable_fields``, make a new instance
    from every field of the old one, and would so pass the defaults on as the user's own words, over environment
    and profile.
    """


def _not_given(usually: str) -> Any:
    return _NotGiven(usually)


class AdapterSettings(BaseModel):
    """The fields of a framework's model, and what of them the user really set.

    A base for adapters, to stand before the framework's own class. An instance holds configuration only, and those
    of equal configuration share one engine. A field that is not given comes from the environment
    (``AGENT_MEMORY_<FIELD>``), then the model's profile, then the default.
    """

    ENGINE_FIELDS: ClassVar[Mapping[str, str]] = {
        name: name
        for name in (
            "model",
            "adapter_path",
            "cache_dir",
            "kv_bits",
            "memory_budget_mb",
            "disk_budget_mb",
            "max_batch_size",
            "prewarm",
        )
    }
    """Fields that the engine is built from, and its own names for them."""
    SAMPLING_FIELDS: ClassVar[tuple[str, ...]] = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "seed",
        "max_tokens",
    )
    """Fields that a call may choose anew; ``stop`` is one too, and is joined in by each adapter."""

    model: str = Field(default=_not_given("tiny-chat"), validation_alias=AliasChoices("model", "model_name"))
    """An embedded name, a hub id or a folder."""
    adapter_path: str | None = None
    """A folder of LoRA adapters for that model."""
    cache_dir: str | Path | None = _not_given("~/.agent_memory/caches")
    """Where sessions live on disk; None keeps everything in memory."""
    session_id: str | None = None
    """The session of calls that name none."""
    namespace: str = Field(default="default", min_length=1)
    """Whose sessions these are: nothing is shared between namespaces."""
    kv_bits: Literal[4, 8, "6/4", "8/4"] | None = _not_given("6/4")
    """Encoding of keys and values at rest: 4 or 8 bits, ``"6/4"`` or ``"8/4"`` for each apart, None as computed."""
    memory_budget_mb: int | None = None
    """MiB for all keys and values in memory."""
    disk_budget_mb: int | None = None
    """MiB for the store."""
    max_batch_size: int | None = None
    """Sequences decoded together."""
    prewarm: Literal["off", "idle"] | None = None
    """``"idle"`` prefills, between turns, an answer as the chat template will write it in the next prompt."""
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    """Sample from the likeliest tokens of this total probability; 1 is off."""
    top_k: int | None = None
    """Sample from this many of the likeliest tokens; 0 is off."""
    min_p: float | None = None
    """Leave out tokens less likely than this share of the likeliest; 0 is off."""
    repetition_penalty: float | None = None
    """Above 1 makes repetition less likely; 1 is off."""
    seed: int | None = None
    """Makes sampled answers repeatable."""
    max_tokens: int | None = Field(
        default=None, validation_alias=AliasChoices("max_tokens", "max_completion_tokens")
    )
    """Most tokens of an answer."""
    stop: list[str] | None = Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
    """Texts that end an answer; they are not part of it."""

    @model_validator(mode="before")
    @classmethod
    def _forget_what_was_not_given(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if not isinstance(value, _NotGiven)}

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _expand_home(cls, value: object) -> object:
        # Kept as text, which frameworks can write as JSON.
        return str(Path(value).expanduser()) if isinstance(value, (str, Path)) else value

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
        """Fields that the user set, by name."""
        given = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        return {n: value for n, value in given.items() if value is not None or n in _NONE_MEANS_SOMETHING}

    def _settings(self, model: str | None = None) -> dict[str, Any]:
        """What the engine is asked for; ``model`` is a call's own choice."""
        settings = {
            self.ENGINE_FIELDS[name]: value for name, value in self._given(self.ENGINE_FIELDS).items()
        }
        if model is not None and model != settings.get("model"):
            # Adapters fit one model: those of the model's own settings, or the environment's, are not for this one.
            settings |= {"model": model, "adapter_path": None}
        return settings

    @property
    def memory(self) -> AgentMemory:
        """The memory behind this model, for what is no chat: list, fork, pin or forget sessions."""
        return self._memory()

    def _memory(self, model: str | None = None) -> AgentMemory:
        return AgentMemory.shared(**self._settings(model))
