"""Every setting, declared once: how an engine is built, and how an answer is sampled.

A field's declaration holds its default, range, description, environment variables and place in a model's profile. What
reads the environment or a profile, the adapters' fields and the documentation are made from it.

Relative paths are made absolute where a setting is read, so a later change of the working directory moves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
)

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator

from agent_memory_core.errors import AgentMemoryError, InvalidRequest, InvalidSetting
from agent_memory_core.setting_words import Source, choice_of, kinds_of, shown, source_of, values_of

KvBits = Literal[4, 8, "6/4", "8/4"] | None
Durability = Literal["process", "power"]
Prewarm = Literal["off", "idle"]
Batching = Literal["auto", "always", "never"]
Wired = Literal["off", "on"]
ComputeDtype = Literal["auto", "stored", "float32"]
ControlWords = Literal["text", "tokens"]
Encryption = Literal["off", "env", "keyring"]
ColdAck = Literal["local", "remote"]

DEFAULT_MEMORY_MB = 8 * 1024
"""MiB for all KV in memory where nothing else is set and the machine is large enough."""

LEAST_MEMORY_MB = 256
"""MiB for all KV in memory where nothing else is set, however little the weights leave of the GPU's memory."""

DEFAULT_DISK_MB = 20 * 1024
"""MiB for the store where nothing else is set and the volume is large enough."""

DEFAULT_MIN_FREE_MB = 5 * 1024
"""MiB that the store leaves free where nothing else is set and the volume is large enough."""

MIN_FREE_DIVISOR = 50
"""The part of a smaller volume that is left free: one fiftieth, 2 %."""

EMBEDDED_MODELS: Mapping[str, str] = {"tiny-chat": "tiny_chat"}
"""Models that ship inside the package: the name of each, and its folder there."""


class ModelName(str):
    """A model as the user wrote it, and where that led when it was read.

    ``location`` is the absolute folder of a local model, without links, and the name itself for any other model. Two
    spellings of one folder have one location.
    """

    location: str

    def __new__(cls, name: str) -> Self:
        new = super().__new__(cls, name)
        folder = Path(name).expanduser()
        is_folder = name not in EMBEDDED_MODELS and name != "" and (looks_like_path(name) or folder.is_dir())
        new.location = str(folder.resolve()) if is_folder else name
        return new


def looks_like_path(model: str) -> bool:
    """Whether ``model`` can only be a folder, and never a hub id, whether the folder exists or not."""
    return model.startswith((".", "~", "/")) or model.count("/") > 1


def absolute(path: str | os.PathLike[str]) -> Path:
    """``path`` from the root on, without ``~`` and links."""
    return Path(path).expanduser().resolve()


def as_model_name(model: str) -> ModelName:
    """``model`` with its location; one that has a location already keeps it."""
    return model if isinstance(model, ModelName) else ModelName(model)


def check_model_name(value: Any, check: Callable[[Any], str]) -> ModelName:
    """For pydantic: the `ModelName` of a text or a path."""
    text = check(os.fspath(value) if isinstance(value, os.PathLike) else value)
    return value if isinstance(value, ModelName) else ModelName(text)


def _absolute_path(value: Any) -> Any:
    return absolute(value) if value != "" and isinstance(value, (str, os.PathLike)) else value


def _absolute_text(value: Any) -> Any:
    return str(path) if isinstance(path := _absolute_path(value), Path) else path


class _Settings(BaseModel):
    """Checked when made: a wrong value is one sentence of our own. Frozen, hashable, equal by value."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )

    ERROR: ClassVar[type[AgentMemoryError]] = InvalidSetting
    """What a wrong name or value raises."""

    if not TYPE_CHECKING:  # type checkers see one keyword for each field

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as wrong:
                name = str(wrong.errors()[0]["loc"][0])
                raise self.ERROR(_sentence(type(self), name, values.get(name))) from None

    def replace(self, **values: Any) -> Self:
        """Return these settings with other values for some fields, checked as in the constructor."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | values)


class SamplingParams(_Settings):
    """How one answer is sampled.

    Raises:
        InvalidRequest: a name is unknown, or a value is outside its range.
    """

    ERROR = InvalidRequest

    max_tokens: Annotated[int, Source("inference", older_variables=("SEMANTIC_MLX_DEFAULT_MAX_TOKENS",))] = (
        Field(default=512, ge=1, description="Most tokens of an answer.")
    )
    temperature: Annotated[
        float, Source("inference", older_variables=("SEMANTIC_MLX_DEFAULT_TEMPERATURE",))
    ] = Field(
        default=0.0, ge=0, description="How freely tokens are chosen; 0 always takes the likeliest (greedy)."
    )
    top_p: Annotated[float, Source("inference")] = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Sample from the likeliest tokens of this total probability; 1 is off.",
    )
    top_k: Annotated[int, Source("inference")] = Field(
        default=0, ge=0, description="Sample from this many of the likeliest tokens; 0 is off."
    )
    min_p: Annotated[float, Source("inference")] = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Leave out tokens less likely than this share of the likeliest one's probability; 0 is off.",
    )
    repetition_penalty: Annotated[float, Source("inference")] = Field(
        default=1.0, gt=0, description="Above 1 makes tokens that were there before less likely; 1 is off."
    )
    seed: Annotated[int | None, Source()] = Field(
        default=None, ge=0, le=2**64 - 1, description="Makes a sampled answer repeatable, at any batch size."
    )
    # Its strings may hold any separator, so no variable sets it.
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Source(in_environment=False, values="a tuple of non-empty strings"),
    ] = Field(default=(), description="Texts that end an answer; they are not part of it.")
    logprobs: Annotated[bool, Source(in_environment=False)] = Field(
        default=False,
        description="Report the log-probability of every token of the answer, as the model and its logits "
        "processors (repetition penalty, grammar) give it, before temperature and filters.",
    )
    top_logprobs: Annotated[int, Source(in_environment=False)] = Field(
        default=0,
        ge=0,
        le=20,
        description="Report also the log-probabilities of this many of the likeliest tokens at each place, up to "
        "20; more than 0 implies logprobs.",
    )

    @property
    def reports_logprobs(self) -> bool:
        """Whether log-probabilities are asked for, by either setting."""
        return self.logprobs or self.top_logprobs > 0


class EngineConfig(_Settings):
    """How an engine is built. Two equal configurations share one engine in a process.

    Configurations are equal where all fields are, and where ``model`` leads to the same folder however it is spelled.

    Raises:
        InvalidSetting: a name is unknown, or a value is outside its range.
    """

    model: Annotated[
        str,
        WrapValidator(check_model_name),
        Source(older_variables=("SEMANTIC_MLX_MODEL_ID",), values="an embedded name, a folder or a hub id"),
    ] = Field(
        default="tiny-chat",
        min_length=1,
        description="An embedded name, a folder, or a hub id that mlx-lm can load.",
    )
    adapter_path: Annotated[
        str | None, BeforeValidator(_absolute_text), Source(values="the path of a folder, or None")
    ] = Field(default=None, min_length=1, description="A folder of LoRA adapters for that model.")
    cache_dir: Annotated[
        Path | None,
        BeforeValidator(_absolute_path),
        Source(older_variables=("SEMANTIC_AGENT_CACHE_DIR",), values="the path of a folder, or None"),
    ] = Field(
        default_factory=lambda: Path.home() / ".agent_memory" / "caches",
        description="The folder in which sessions are stored; None keeps everything in memory.",
    )
    kv_bits: Annotated[KvBits, Source("optimal", older_variables=("SEMANTIC_MLX_KV_BITS",))] = Field(
        default="6/4",
        description="Bits of a stored key or value: 8, 4, 6 for keys and 4 for values (6/4), 8 for keys and 4 for "
        "values (8/4), or None for the model's own dtype.",
    )
    memory_budget_mb: Annotated[
        int | None, Source("thresholds", older_variables=("SEMANTIC_MLX_CACHE_BUDGET_MB",))
    ] = Field(
        default=None,
        ge=1,
        description="MiB for all keys and values in memory; None is the least of "
        f"{DEFAULT_MEMORY_MB // 1024} GiB, a quarter of the machine's memory, and half of what the weights leave of "
        f"the GPU's memory (at least {LEAST_MEMORY_MB} MiB).",
    )
    disk_budget_mb: Annotated[int | None, Source("thresholds")] = Field(
        default=None,
        ge=1,
        description="MiB for the folder of the store, with everything in it; None is the lesser of "
        f"{DEFAULT_DISK_MB // 1024} GiB and a tenth of the volume.",
    )
    namespace_budget_mb: Annotated[int | None, Source("thresholds")] = Field(
        default=None,
        ge=1,
        description="MiB of the store that the sessions of one namespace may take; None sets no limit of its own. "
        "Where the whole store is full, namespaces with more than their equal share give way first.",
    )
    min_free_mb: Annotated[int | None, Source("thresholds")] = Field(
        default=None,
        ge=0,
        description="MiB of the volume that the store leaves free; None is the lesser of "
        f"{DEFAULT_MIN_FREE_MB // 1024} GiB and {100 // MIN_FREE_DIVISOR} % of the volume. On macOS purgeable space "
        "counts as free.",
    )
    max_batch_size: Annotated[int, Source("optimal", older_variables=("SEMANTIC_MLX_MAX_BATCH_SIZE",))] = (
        Field(
            default=32, ge=1, description="Most sequences that are decoded together, as far as memory allows."
        )
    )
    max_waiting: Annotated[int, Source("optimal")] = Field(
        default=1024,
        ge=1,
        description="Most turns that wait for their place; one more is refused with QueueFull.",
    )
    batching: Annotated[Batching, Source("optimal")] = Field(
        default="auto",
        description='"auto" decodes sequences together where comparing logits shows that this does not change a '
        'model\'s answers; "always" and "never" decide without comparing.',
    )
    block_tokens: Annotated[
        Literal[64, 128, 256], Source("optimal", older_variables=("SEMANTIC_MLX_BLOCK_TOKENS",))
    ] = Field(default=128, description="Tokens of a full block: 64, 128 or 256.")
    prefill_chunk: Annotated[
        int | None,
        Source(
            "optimal",
            older_keys=("prefill_step_size", "chunked_prefill_max_chunk"),
            older_variables=(
                "SEMANTIC_MLX_PREFILL_STEP_SIZE",
                "SEMANTIC_MLX_CHUNKED_PREFILL_MAX_CHUNK",
            ),
        ),
    ] = Field(
        default=None,
        ge=1,
        description="Most prompt tokens of one forward pass while nothing is decoded; None is as many as this machine "
        "evaluates in a quarter of a second, which is measured once and recorded (at most 2048).",
    )
    prefill_chunk_busy: Annotated[
        int | None,
        Source(
            "optimal",
            older_keys=("chunked_prefill_min_chunk",),
            older_variables=("SEMANTIC_MLX_CHUNKED_PREFILL_MIN_CHUNK",),
        ),
    ] = Field(
        default=None,
        ge=1,
        description="Most prompt tokens of one forward pass while other sequences are decoded, and of background work; "
        "None is half of what it is otherwise, and at most 256.",
    )
    context_length: Annotated[
        int | None, Source("thresholds", older_variables=("SEMANTIC_MLX_MAX_CONTEXT_LENGTH",))
    ] = Field(
        default=None,
        ge=1,
        description="Most tokens of prompt and answer together; None is the model's own limit.",
    )
    prewarm: Annotated[Prewarm, Source("optimal")] = Field(
        default="off",
        description='"idle" prefills after a turn, while no request waits, the conversation as the chat template '
        'will write it in the next prompt; "off" leaves that to the next turn.',
    )
    control_words: Annotated[ControlWords, Source()] = Field(
        default="text",
        description="What a user's or a tool's text means that spells a special token, such as <|im_end|>: \"text\" "
        'tokenises it as any other text, so that nobody can forge a message; "tokens" as that token.',
    )
    compute_dtype: Annotated[ComputeDtype, Source()] = Field(
        default="auto",
        description='What a model without quantised weights computes in: "stored" is the dtype of its weights; '
        '"float32" takes twice the memory of 16-bit weights; "auto" is float32 on a Linux CPU for which OpenBLAS was '
        "found, where it is about 30 times as fast, and the weights' own dtype everywhere else.",
    )
    wired: Annotated[Wired, Source()] = Field(
        default="off",
        description='"on" keeps the weights and the KV resident in memory while the model is loaded, which a model '
        'that nearly fills a Mac needs to be fast; "off" lets macOS decide. It counts on macOS 15 and newer only.',
    )
    session_ttl_days: Annotated[float | None, Source()] = Field(
        default=None,
        gt=0,
        description="Days after its last use after which a session is deleted, looked at when the first turn runs and "
        "then every hour; None keeps sessions until their room is needed. Pinned ones stay.",
    )
    durability: Annotated[Durability, Source()] = Field(
        default="process",
        description='"process" keeps a finished turn through kill -9; "power" through a power cut too, at the '
        "price of an fsync for each file.",
    )
    encryption: Annotated[Encryption, Source()] = Field(
        default="off",
        description="What seals the store (AES-256-GCM, a key for each namespace): the master key in the variable "
        'AGENT_MEMORY_KEY ("env"), the one in the system\'s keyring ("keyring"), or nothing ("off").',
    )

    cold_url: Annotated[str | None, Source(values="the address of a bucket or a folder, or None")] = Field(
        default=None,
        min_length=1,
        description="Where a copy of every session is kept for other machines: s3://bucket/folder, gs://..., az://... "
        "or file:///folder, with credentials from the environment as obstore reads them; None keeps none.",
    )
    cold_ack: Annotated[ColdAck, Source()] = Field(
        default="local",
        description='When a turn counts as saved: "local", when it is on this disk, and is uploaded afterwards; '
        '"remote", when it is in the object store too, so that it outlives this machine.',
    )
    cold_timeout_seconds: Annotated[float, Source()] = Field(
        default=10.0,
        gt=0,
        description="Seconds that a turn waits for the object store, at its beginning and where it is to be uploaded "
        "at its end; then it goes on without.",
    )
    cold_ttl_days: Annotated[float | None, Source()] = Field(
        default=None,
        gt=0,
        description="Days after its last use after which a sweep deletes a session from the object store; None keeps "
        "them there.",
    )

    @property
    def model_location(self) -> str:
        """The absolute folder of a local model, and the name itself of any other."""
        return as_model_name(self.model).location

    def _identity(self) -> tuple[Any, ...]:
        return (
            self.model_location,
            *(getattr(self, name) for name in type(self).model_fields if name != "model"),
        )

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, EngineConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())


SettingsClass = type[EngineConfig] | type[SamplingParams]


def may_be_none(of: SettingsClass, name: str) -> bool:
    """Whether None is a value of a field; text writes it as "none"."""
    return NoneType in kinds_of(of.model_fields[name].annotation)


def profile_keys(of: SettingsClass, section: str) -> dict[str, str]:
    """The keys of one section of a model's profile, and the field of ``of`` that each sets; older keys last."""
    fields = {n: source_of(f) for n, f in of.model_fields.items() if source_of(f).section == section}
    older = {key: name for name, source in fields.items() for key in source.older_keys}
    return {name: name for name in fields} | older


# Errors -----------------------------------------------------------------------------------------------------


def _sentence(of: type[_Settings], name: str, value: object) -> str:
    field = of.model_fields.get(name)
    if field is None:
        return f"unknown setting {name!r}: {choice_of(name, of.model_fields)}"
    return f"{name}={shown(name, value)} is not valid: {values_of(field)}."


def known_settings(
    values: Mapping[str, Any], *, of: SettingsClass, error: type[AgentMemoryError] = InvalidSetting
) -> dict[str, Any]:
    """Return ``values`` as keyword arguments for ``of``.

    Raises:
        AgentMemoryError: a name is not a field of it; ``error`` says which kind.
    """
    for name in values:
        if name not in of.model_fields:
            raise error(_sentence(of, name, None))
    return dict(values)


def check_setting(of: SettingsClass, name: str, value: Any, source: str) -> Any:
    """Check one value of ``of`` by itself and return it as the field keeps it.

    Args:
        of: the class of the field.
        name: the field.
        value: its value.
        source: where the value was read (a variable, a file and key), for the error.

    Raises:
        InvalidSetting: the value is outside its range.
    """
    try:
        return getattr(of(**{name: value}), name)
    except (InvalidSetting, InvalidRequest) as wrong:
        raise InvalidSetting(f"{source}: {wrong}") from wrong


def with_tuples(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling values with ``stop`` as the tuple it is kept as."""
    values = dict(sampling)
    stop = values.get("stop")
    if stop is not None and not isinstance(stop, tuple):
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return values
