"""Settings: what an engine and a turn may be told. Frozen, checked when made, unknown names refused.

A value comes from the first of these that has one: the constructor, the environment, the model's profile,
the default. In the environment a field is ``AGENT_MEMORY_<FIELD>``; the ``SEMANTIC_`` names of older set-ups
are read as aliases, and those that could have no effect here are refused instead of ignored.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from agent_memory_core.errors import AgentMemoryError, InvalidRequest, InvalidSetting

KvBits = Literal[4, 8, "6/4", "8/4"] | None
Durability = Literal["process", "power"]
Prewarm = Literal["off", "idle"]


def _require(ok: bool, name: str, value: object, want: str, error: type[Exception]) -> None:
    if not ok:
        raise error(f"{name}={value!r} is not valid: {want}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is sampled.

    ``temperature`` 0 is greedy. ``top_p`` 1, ``top_k`` 0, ``min_p`` 0 and ``repetition_penalty`` 1 switch
    their filter off. A ``seed`` makes the answer repeatable at any batch size.

    ``logprobs`` asks for the log-probability of every token of the answer, ``top_logprobs`` above 0 also for those
    of so many of the likeliest tokens at each place. They are of the distribution that the model and its logits
    processors (repetition penalty, a form it is held to) give, before temperature and filters.

    Raises:
        InvalidRequest: a value is outside its range.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0

    @property
    def reports_logprobs(self) -> bool:
        """Whether log-probabilities are asked for, by either setting."""
        return self.logprobs or self.top_logprobs > 0

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, want: str) -> None:
            _require(ok, name, getattr(self, name), want, InvalidRequest)

        need(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "a whole number of at least 1")
        need(_is_number(self.temperature) and self.temperature >= 0, "temperature", "a number of at least 0")
        need(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number above 0 and up to 1")
        need(_is_int(self.top_k) and self.top_k >= 0, "top_k", "a whole number of at least 0 (0 is off)")
        need(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number from 0 to 1")
        need(
            _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "a number above 0 (1 is off)",
        )
        need(
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**64),
            "seed",
            "a whole number from 0 to 2**64 - 1, or None",
        )
        need(
            isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
            "stop",
            "a tuple of non-empty strings",
        )
        need(isinstance(self.logprobs, bool), "logprobs", "True or False")
        need(
            _is_int(self.top_logprobs) and 0 <= self.top_logprobs <= 20,
            "top_logprobs",
            "a whole number from 0 to 20",
        )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine is built from. Two equal configurations share one engine in a process.

    Args:
        model: an embedded name, a folder, or a hub id that mlx-lm can load.
        adapter_path: a folder of LoRA adapters for that model.
        cache_dir: where sessions live on disk; None keeps everything in memory.
        kv_bits: at-rest encoding of keys and values: None (model dtype), 8, 4, "6/4" or "8/4" (keys/values).
        memory_budget_mb: MiB for all KV in memory; None is the lesser of 8 GiB and a quarter of the machine.
        disk_budget_mb: MiB for the store; None is the lesser of 20 GiB and a tenth of the volume.
        min_free_mb: MiB of the volume that the store leaves free.
        max_batch_size: sequences decoded together.
        block_tokens: tokens in a full block: 64, 128 or 256.
        prefill_chunk: most prompt tokens in one forward pass while nothing decodes.
        prefill_chunk_busy: the same while other sequences decode, and for idle work.
        context_length: most tokens of a sequence; None is the model's own limit.
        prewarm: "idle" prefills, after a turn and while nobody waits, what the chat template will make of it in the
            next prompt; "off" leaves that to the next turn.
        durability: "process" survives kill -9; "power" also a power cut, at the price of an fsync a file.

    Raises:
        InvalidSetting: a value is outside its range.
    """

    model: str = "tiny-chat"
    adapter_path: str | None = None
    cache_dir: Path | None = field(default_factory=lambda: Path.home() / ".agent_memory" / "caches")
    kv_bits: KvBits = "6/4"
    memory_budget_mb: int | None = None
    disk_budget_mb: int | None = None
    min_free_mb: int = 5 * 1024
    max_batch_size: int = 8
    block_tokens: int = 128
    prefill_chunk: int = 2048
    prefill_chunk_busy: int = 256
    context_length: int | None = None
    prewarm: Prewarm = "off"
    durability: Durability = "process"

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, want: str) -> None:
            _require(ok, name, getattr(self, name), want, InvalidSetting)

        def positive_int(name: str) -> None:
            value = getattr(self, name)
            need(_is_int(value) and value >= 1, name, "a whole number of at least 1")

        need(
            isinstance(self.model, str) and bool(self.model),
            "model",
            "an embedded name, a folder or a hub id",
        )
        need(self.kv_bits in (None, 4, 8, "6/4", "8/4"), "kv_bits", 'None, 4, 8, "6/4" or "8/4"')
        need(self.block_tokens in (64, 128, 256), "block_tokens", "64, 128 or 256")
        need(self.prewarm in ("off", "idle"), "prewarm", '"off" or "idle"')
        need(self.durability in ("process", "power"), "durability", '"process" or "power"')
        for name in ("memory_budget_mb", "disk_budget_mb", "context_length"):
            if getattr(self, name) is not None:
                positive_int(name)
        for name in ("max_batch_size", "prefill_chunk", "prefill_chunk_busy"):
            positive_int(name)
        need(
            _is_int(self.min_free_mb) and self.min_free_mb >= 0, "min_free_mb", "a whole number of at least 0"
        )


def known_settings(
    values: Mapping[str, Any], *, of: type, error: type[AgentMemoryError] = InvalidSetting
) -> dict[str, Any]:
    """Return ``values`` as keyword arguments for the dataclass ``of``.

    Raises:
        AgentMemoryError: a name is not a field of it; ``error`` says which kind.
    """
    names = {f.name for f in fields(of)}
    for name in values:
        if name not in names:
            raise error(f"unknown setting {name!r}: choose from {', '.join(sorted(names))}.")
    return dict(values)


PREFIX = "AGENT_MEMORY_"
_PREFIXES = (PREFIX, "SEMANTIC_MLX_", "SEMANTIC_AGENT_")

_ALIASES = {
    "SEMANTIC_MLX_MODEL_ID": "model",
    "SEMANTIC_MLX_CACHE_BUDGET_MB": "memory_budget_mb",
    "SEMANTIC_MLX_MAX_BATCH_SIZE": "max_batch_size",
    "SEMANTIC_MLX_KV_BITS": "kv_bits",
    "SEMANTIC_MLX_BLOCK_TOKENS": "block_tokens",
    "SEMANTIC_MLX_MAX_CONTEXT_LENGTH": "context_length",
    "SEMANTIC_MLX_PREFILL_STEP_SIZE": "prefill_chunk",
    "SEMANTIC_MLX_CHUNKED_PREFILL_MAX_CHUNK": "prefill_chunk",
    "SEMANTIC_MLX_CHUNKED_PREFILL_MIN_CHUNK": "prefill_chunk_busy",
    "SEMANTIC_MLX_DEFAULT_TEMPERATURE": "temperature",
    "SEMANTIC_MLX_DEFAULT_MAX_TOKENS": "max_tokens",
    "SEMANTIC_AGENT_CACHE_DIR": "cache_dir",
}

ALWAYS_ON = {
    "scheduler_enabled": "requests are always scheduled together; max_batch_size 1 decodes them one by one",
    "chunked_prefill_enabled": "prompts are always prefilled in chunks; prefill_chunk sets their size",
    "evict_to_disk": "whole turns are always written to cache_dir; without one, nothing is",
    "lru_eviction_enabled": "memory that is full always lets its oldest blocks go",
    "validate_model_tag": "stored KV is only ever used with the model that made it",
}
"""Switches of older set-ups that cannot be off here, each with what to use instead."""

RETIRED = {
    "kv_group_size": "kv_bits chooses the encoding with its groups",
    "chunked_prefill_threshold": "every prompt longer than prefill_chunk is prefilled in chunks",
    "scheduler_interleave_threshold": "prefill and decode always take turns; see prefill_chunk_busy",
    "batch_window_ms": "requests join a running batch at once, without a window",
    "max_agents_in_memory": "memory is counted in bytes: set memory_budget_mb",
    "reasoning_extra_tokens": "reasoning counts as part of the answer: set max_tokens",
}
"""Settings of older set-ups that mean nothing here, each with what to use instead."""

_OTHER_VARIABLES = frozenset({"AGENT_MEMORY_MODEL_CONFIGS"})
"""Read elsewhere (model_profile), not fields of a configuration."""


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else parse(text)


def _text(text: str) -> str:
    if not text:
        raise ValueError("it is empty")
    return text


def _path(text: str) -> Path:
    return Path(_text(text)).expanduser()


def _kv_bits(text: str) -> KvBits:
    apart: dict[str, KvBits] = {"6/4": "6/4", "8/4": "8/4"}
    return apart[text] if text in apart else _optional(int)(text)


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "model": _text,
    "adapter_path": _optional(_text),
    "cache_dir": _optional(_path),
    "kv_bits": _kv_bits,
    "memory_budget_mb": _optional(int),
    "disk_budget_mb": _optional(int),
    "min_free_mb": int,
    "max_batch_size": int,
    "block_tokens": int,
    "prefill_chunk": int,
    "prefill_chunk_busy": int,
    "context_length": _optional(int),
    "prewarm": str,
    "durability": str,
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": _optional(int),
}
"""How a field is read from text. ``stop`` is missing on purpose, since its strings may hold any separator, and
so are ``logprobs`` and ``top_logprobs``: only who reads them asks for them."""

_VARIABLES: Mapping[str, str] = {**{PREFIX + name.upper(): name for name in _PARSERS}, **_ALIASES}

Settings = TypeVar("Settings", EngineConfig, SamplingParams)


def check_setting(of: type[EngineConfig | SamplingParams], name: str, value: Any, source: str) -> None:
    """Check one value of ``of`` by itself, naming ``source`` (a variable, a file and key) where it is wrong.

    Raises:
        InvalidSetting: the value is outside its range.
    """
    try:
        of(**{name: value})
    except (InvalidSetting, InvalidRequest) as wrong:
        raise InvalidSetting(f"{source}: {wrong}") from wrong


def _field_of(variable: str) -> str:
    for prefix in _PREFIXES:
        variable = variable.removeprefix(prefix)
    return variable.lower()


def _refuse_unknown(variable: str) -> NoReturn:
    name = _field_of(variable)
    if name in RETIRED:
        raise InvalidSetting(f"{variable} has no effect here: {RETIRED[name]}. Unset it.")
    near = difflib.get_close_matches(variable, [*_VARIABLES, *_OTHER_VARIABLES], n=1, cutoff=0)[0]
    raise InvalidSetting(f"unknown environment variable {variable}: did you mean {near}? Rename or unset it.")


def _is_switch(variable: str, text: str) -> bool:
    """Whether ``variable`` is a switch that is always on; being told to switch it off is refused."""
    name = _field_of(variable)
    if name not in ALWAYS_ON:
        return False
    if text.lower() not in ("1", "true", "yes", "on"):
        raise InvalidSetting(
            f"{variable}={text!r} is not possible: {ALWAYS_ON[name]}. Unset it or set it to true."
        )
    return True


def _parse(variable: str, text: str) -> Any:
    name = _VARIABLES[variable]
    source = f"environment variable {variable}={text!r}"
    try:
        value = _PARSERS[name](text)
    except ValueError as wrong:
        raise InvalidSetting(f"{source} cannot be read as {name}: {wrong}.") from wrong
    check_setting(EngineConfig if name in _names(EngineConfig) else SamplingParams, name, value, source)
    return value


def _names(of: type) -> set[str]:
    return {f.name for f in fields(of)}


def from_environment(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Every field, of an engine or of sampling, that ``environ`` (None: this process's) sets, checked.

    Raises:
        InvalidSetting: a variable is unknown, cannot be read, or contradicts another name of the same field.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for variable in sorted(name for name in environ if name.startswith(_PREFIXES)):
        if variable in _OTHER_VARIABLES or _is_switch(variable, environ[variable]):
            continue
        if variable not in _VARIABLES:
            _refuse_unknown(variable)
        name, value = _VARIABLES[variable], _parse(variable, environ[variable])
        if name in values and values[name] != value:
            first = said_by[name]
            raise InvalidSetting(
                f"{first}={environ[first]!r} and {variable}={environ[variable]!r} both set {name}: unset one."
            )
        values[name] = value
        said_by.setdefault(name, variable)
    return values


def _resolve(
    of: type[Settings],
    explicit: Mapping[str, Any],
    environ: Mapping[str, str] | None,
    profile: Mapping[str, Any] | None,
) -> Settings:
    surroundings = {name: value for name, value in from_environment(environ).items() if name in _names(of)}
    return of(**{**known_settings(profile or {}, of=of), **surroundings, **known_settings(explicit, of=of)})


def resolve_settings(
    explicit: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> EngineConfig:
    """The configuration of an engine. A key in ``explicit`` is given, also with None; a missing key is not.

    Raises:
        InvalidSetting: a name or value of any source cannot be used.
    """
    given = dict(explicit)
    if isinstance(given.get("cache_dir"), str):
        given["cache_dir"] = Path(given["cache_dir"]).expanduser()
    return _resolve(EngineConfig, given, environ, profile)


def resolve_sampling(
    explicit: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """How answers are sampled unless a request says otherwise; sources as in `resolve_settings`.

    Raises:
        InvalidSetting: a name is unknown, or a variable or profile value cannot be used.
        InvalidRequest: an explicit value is outside its range.
    """
    return _resolve(SamplingParams, explicit, environ, profile)


def default_memory_budget_bytes() -> int:
    """Bytes for all KV in memory where nothing else is said: 8 GiB, or a quarter of a smaller machine."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(8 * 1024**3, physical // 4)
