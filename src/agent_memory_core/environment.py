"""Settings from the environment, and all sources put together.

A value comes from the first of these that has one: the constructor, the environment, the model's profile, the default.
In the environment a field is called ``AGENT_MEMORY_<FIELD>``. The ``SEMANTIC_`` names of older set-ups are read as
aliases. A variable that is unknown, or that could have no effect here, is refused instead of ignored.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import NoneType
from typing import Any, NoReturn, TypeVar

from agent_memory_core.config import (
    EngineConfig,
    SamplingParams,
    SettingsClass,
    check_setting,
    known_settings,
)
from agent_memory_core.errors import InvalidSetting
from agent_memory_core.fast_blas import OPENBLAS_VARIABLE
from agent_memory_core.setting_words import kinds_of, shown, source_of

Settings = TypeVar("Settings", EngineConfig, SamplingParams)

PREFIX = "AGENT_MEMORY_"
SERVER_PREFIX = "AGENT_MEMORY_SERVER_"
"""How variables begin that the server reads, and refuses where it does not know them."""
_PREFIXES = (PREFIX, "SEMANTIC_MLX_", "SEMANTIC_AGENT_")

ALWAYS_ON = {
    "scheduler_enabled": "requests are always scheduled together; max_batch_size 1 decodes them one by one",
    "chunked_prefill_enabled": "prompts are always prefilled in chunks; prefill_chunk sets their size",
    "evict_to_disk": "whole turns are always written to cache_dir; without one, nothing is",
    "lru_eviction_enabled": "memory that is full always lets its oldest blocks go",
    "validate_model_tag": "stored KV is only ever used with the model that made it",
}
"""Switches of the prototype that this package replaces. They cannot be off here; each with what to use instead."""

RETIRED = {
    "kv_group_size": "kv_bits chooses the encoding with its groups",
    "chunked_prefill_threshold": "every prompt longer than prefill_chunk is prefilled in chunks",
    "scheduler_interleave_threshold": "prefill and decode always take turns; see prefill_chunk_busy",
    "batch_window_ms": "requests join a running batch at once, without a window",
    "max_agents_in_memory": "memory is counted in bytes: set memory_budget_mb",
    "reasoning_extra_tokens": "reasoning counts as part of the answer: set max_tokens",
}
"""Settings of that prototype that have no effect here, each with what to use instead."""

KEY_VARIABLE = "AGENT_MEMORY_KEY"
"""The variable with the master key of encrypted stores."""

_OTHER_VARIABLES = frozenset({"AGENT_MEMORY_MODEL_CONFIGS", KEY_VARIABLE, OPENBLAS_VARIABLE})
"""Variables that are no fields: the folder of own profiles (models/profile.py), the master key, and the BLAS library.
They are read where they are needed, so that nothing here remembers a key."""


_CLASS_OF: Mapping[str, SettingsClass] = {
    name: of for of in (EngineConfig, SamplingParams) for name in of.model_fields
}


def _variables() -> Iterable[tuple[str, str]]:
    for name, of in _CLASS_OF.items():
        source = source_of(of.model_fields[name])
        if source.in_environment:
            yield from ((variable, name) for variable in (PREFIX + name.upper(), *source.older_variables))


_VARIABLES: Mapping[str, str] = dict(_variables())
"""Every environment variable that sets a field, and the field."""


def _refuse_unknown(variable: str) -> NoReturn:
    name = _field_of(variable)
    if name in RETIRED:
        raise InvalidSetting(f"{variable} has no effect here: {RETIRED[name]}. Unset it.")
    near = difflib.get_close_matches(variable, [*_VARIABLES, *_OTHER_VARIABLES], n=1, cutoff=0)[0]
    raise InvalidSetting(f"unknown environment variable {variable}: did you mean {near}? Rename or unset it.")


def _field_of(variable: str) -> str:
    for prefix in _PREFIXES:
        variable = variable.removeprefix(prefix)
    return variable.lower()


def _is_switch(variable: str, text: str) -> bool:
    """Whether ``variable`` is a switch that is always on here; a text that switches it off is refused."""
    name = _field_of(variable)
    if name not in ALWAYS_ON:
        return False
    if text.lower() not in ("1", "true", "yes", "on"):
        raise InvalidSetting(
            f"{variable}={text!r} is not possible: {ALWAYS_ON[name]}. Unset it or set it to true."
        )
    return True


def _value(variable: str, text: str) -> Any:
    name = _VARIABLES[variable]
    of, source = _CLASS_OF[name], f"environment variable {variable}={shown(name, text)}"
    try:
        value = _read_text(kinds_of(of.model_fields[name].annotation), text)
    except ValueError as wrong:
        raise InvalidSetting(f"{source} cannot be read as {name}: {wrong}.") from wrong
    return check_setting(of, name, value, source)


def _read_text(kinds: list[Any], text: str) -> Any:
    if text in kinds:
        return text
    if NoneType in kinds and text.lower() == "none":
        return None
    if any(kind is int or isinstance(kind, int) for kind in kinds):
        return int(text)
    return float(text) if float in kinds else text


@lru_cache(maxsize=64)
def _read_variables(variables: tuple[tuple[str, str], ...]) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    found_in: dict[str, tuple[str, str]] = {}
    for variable, text in variables:
        if _is_switch(variable, text):
            continue
        if variable not in _VARIABLES:
            _refuse_unknown(variable)
        name, value = _VARIABLES[variable], _value(variable, text)
        if name in values and values[name] != value:
            first, other = found_in[name]
            raise InvalidSetting(f"{first}={other!r} and {variable}={text!r} both set {name}: unset one.")
        values[name] = value
        found_in.setdefault(name, (variable, text))
    return values


def _is_ours(name: str) -> bool:
    return name not in _OTHER_VARIABLES and not name.startswith(SERVER_PREFIX)


def from_environment(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Every field, of an engine or of sampling, that ``environ`` (None: this process's) sets, checked.

    The same variables are read once in a process. So a relative path in one of them is relative to the working
    directory of that moment, whatever directory the process changes to later.

    Raises:
        InvalidSetting: a variable is unknown, cannot be read, or contradicts another name of the same field.
    """
    environ = os.environ if environ is None else environ
    names = sorted(name for name in environ if name.startswith(_PREFIXES) and _is_ours(name))
    return dict(_read_variables(tuple((name, environ[name]) for name in names)))


# All sources together ---------------------------------------------------------------------------------------


def _resolve(
    of: type[Settings],
    explicit: Mapping[str, Any],
    environ: Mapping[str, str] | None,
    profile: Mapping[str, Any] | None,
) -> Settings:
    from_variables = {n: value for n, value in from_environment(environ).items() if n in of.model_fields}
    return of(**{**known_settings(profile or {}, of=of), **from_variables, **known_settings(explicit, of=of)})


def resolve_settings(
    explicit: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> EngineConfig:
    """Return the configuration of an engine. A key in ``explicit`` counts as given even where its value is None.

    Raises:
        InvalidSetting: a name or value of any source cannot be used.
    """
    return _resolve(EngineConfig, explicit, environ, profile)


def resolve_sampling(
    explicit: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """Return how answers are sampled where a request does not set it; sources as in `resolve_settings`.

    Raises:
        InvalidSetting: a name is unknown, or a variable or profile value cannot be used.
        InvalidRequest: an explicit value is outside its range.
    """
    return _resolve(SamplingParams, explicit, environ, profile)
