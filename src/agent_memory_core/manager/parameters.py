"""What may stand in the ``parameters`` of a model, by its type: how answers are sampled, and how it is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import SecretStr

from agent_memory_core import EngineConfig, InvalidRequest, InvalidSetting, SamplingParams

ModelType = Literal["mlx", "gguf", "huggingface", "openai"]

SAMPLING = frozenset(
    {"temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"}
)
"""Values that every type knows. They are the defaults of each call, whose own values win."""

_NATIVE: Mapping[str, frozenset[str]] = {
    "mlx": frozenset(EngineConfig.model_fields) - {"model", "context_length"},
    "gguf": frozenset(
        {
            "n_gpu_layers",
            "n_batch",
            "n_threads",
            "chat_format",
            "flash_attn",
            "type_k",
            "type_v",
            "use_mmap",
            "verbose",
            "embedding",
        }
    ),
    "huggingface": frozenset({"dtype", "device_map", "trust_remote_code", "attn_implementation"}),
    "openai": frozenset({"api_base", "api_key", "api_key_env", "timeout", "max_retries", "default_headers"}),
}
"""Values that say how a model of each type is loaded or reached."""

_OTHER_NAMES = {"max_new_tokens": "max_tokens", "torch_dtype": "dtype", "base_url": "api_base"}


def by_our_names(type_: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters under one name each, checked.

    Raises:
        InvalidSetting: a name is unknown to the type, is given twice, or a value cannot be used.
    """
    known = SAMPLING | _NATIVE[type_] | {"do_sample"}
    found: dict[str, Any] = {}
    for given, value in parameters.items():
        name = _OTHER_NAMES.get(given, given)
        if name not in known:
            raise InvalidSetting(
                f"unknown parameter {given!r} of a model of the type {type_!r}: {near(given, known)}"
            )
        if name in found and found[name] != value:
            raise InvalidSetting(f"parameter {given!r} is another name of {name!r}: give one of them.")
        found[name] = SecretStr(value) if name == "api_key" and isinstance(value, str) else value
    sampling_of(found)
    return found


def sampling_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling values of parameters; ``do_sample: false`` means greedy, whatever ``temperature`` says.

    Raises:
        InvalidSetting: a value is outside its range.
    """
    sampling = {name: value for name, value in parameters.items() if name in SAMPLING and value is not None}
    if parameters.get("do_sample") is False:
        sampling["temperature"] = 0.0
    return checked_sampling(sampling, InvalidSetting)


def checked_sampling(
    values: Mapping[str, Any], error: type[InvalidSetting | InvalidRequest]
) -> dict[str, Any]:
    """Sampling values as `SamplingParams` keeps them, for those that are given.

    Raises:
        InvalidSetting: or what ``error`` is: a name is unknown, or a value is outside its range.
    """
    given = {_OTHER_NAMES.get(name, name): value for name, value in values.items()}
    for name in given:
        if name not in SamplingParams.model_fields:
            raise error(f"unknown option {name!r}: {near(name, SamplingParams.model_fields)}")
    stop = given.get("stop")
    if stop is not None:
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if isinstance(given.get("temperature"), int):
        given["temperature"] = float(given["temperature"])
    try:
        params = SamplingParams(**given)
    except InvalidRequest as wrong:
        raise error(str(wrong)) from None
    return {name: getattr(params, name) for name in given}


def native_of(type_: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that say how a model is loaded or reached."""
    return {name: value for name, value in parameters.items() if name in _NATIVE[type_]}


def near(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the nearest one, or all."""
    names = sorted(known)
    found = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {found[0]!r}?" if found else f"choose from {', '.join(names)}."
