"""The text of a new profile: what a model's live caches and files tell, and every key that could be set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from agent_memory_core.config import (
    DEFAULT_DISK_MB,
    DEFAULT_MEMORY_MB,
    EngineConfig,
    SamplingParams,
    check_setting,
    profile_keys,
)
from agent_memory_core.errors import InvalidSetting
from agent_memory_core.models.cache_spec import GLOBAL, LAYER_TYPES, ModelCacheSpec
from agent_memory_core.models.folder import DEFAULT_CONTEXT

_GENERATION_CONFIG_KEYS = {
    name: {"max_tokens": "max_new_tokens"}.get(name, name)
    for name in profile_keys(SamplingParams, "inference")
}
"""Each sampling default that a profile may hold, and its key in a ``generation_config.json``."""


def stated_sampling(folder: Path) -> dict[str, Any]:
    """What a model's own ``generation_config.json`` recommends; nothing where it has none that can be used."""
    try:
        stated = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(stated, dict):
        return {}
    found = {
        name: stated[key]
        for name, key in _GENERATION_CONFIG_KEYS.items()
        if _is_usable(name, stated.get(key))
    }
    # There "do_sample" switches sampling on, at temperature 1 unless another is given; here temperature 0 is off.
    if stated.get("do_sample") is True:
        return {"temperature": 1.0, **found}
    return {"temperature": 0.0} if stated.get("do_sample") is False else found


def _is_usable(name: str, value: Any) -> bool:
    try:
        check_setting(SamplingParams, name, value, "")
    except InvalidSetting:
        return False
    return True


def stated_thinking(tokenizer: Any) -> bool | None:
    """Whether the model thinks if nothing is asked of its chat template; None if the template has no such choice."""
    if not tokenizer.has_chat_template:
        return None
    on, off = (_rendered(tokenizer, {"enable_thinking": thinks}) for thinks in (True, False))
    return None if on is None or on == off else _rendered(tokenizer, {}) == on


def _rendered(tokenizer: Any, arguments: Mapping[str, Any]) -> str | None:
    probe = [{"role": "user", "content": "hello"}]
    try:
        text: str = tokenizer.apply_chat_template(
            probe, add_generation_prompt=True, tokenize=False, **arguments
        )
    except TemplateError:
        return None
    return text


def profile_text(
    model_id: str, spec: ModelCacheSpec, sampling: Mapping[str, Any], thinks: bool | None
) -> str:
    """A commented profile. Every key that could be set stands there behind a #, with its default."""
    sections = [
        _head(model_id, spec),
        _model(model_id, spec),
        *_layer_tables(spec),
        _inference(sampling, thinks),
        _optimal(),
        _thresholds(spec),
        _BENCHMARK,
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


_BENCHMARK = (
    "# What was measured, on which machine: recorded, never acted on.",
    "# [benchmark]",
    '# machine = "M4 Pro, 24 GB"',
)


def _line(key: str, value: Any) -> str:
    # TOML has no null, and a JSON string is a TOML string but for DEL.
    value = "none" if value is None else value
    return f"{key} = " + json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _head(model_id: str, spec: ModelCacheSpec) -> Iterable[str]:
    yield f"# {json.dumps(model_id)[1:-1]}, as its live caches and its own files describe it."
    yield "# A line that begins with # shows a default; to change it, remove the # and write another value."
    for sentence in spec.contradictions:
        yield f"# Note: {sentence}."


def _geometry(spec: ModelCacheSpec, keys: Iterable[str], layer_type: str | None) -> Iterable[str]:
    for key in keys:
        values = sorted(spec.values_of(key, layer_type))
        if values:
            yield _line(key, values if len(values) > 1 else values[0])


def _geometry_keys(spec: ModelCacheSpec) -> list[str]:
    """The keys to write; the width of values only where it differs from that of keys."""
    equal_widths = all(shape.key_dim == shape.value_dim for shape in spec.shapes)
    return ["n_kv_heads", "head_dim", *([] if equal_widths else ["v_head_dim"]), "sliding_window"]


def _model(model_id: str, spec: ModelCacheSpec) -> Iterable[str]:
    yield "# Checked whenever the model is loaded, so that no other model runs with this profile."
    yield "[model]"
    yield _line("model_id", model_id)
    if len(spec.layer_types) < spec.n_layers:
        yield f"# {spec.n_layers - len(spec.layer_types)} of these layers store no keys or values of their own."
    same = [key for key in _geometry_keys(spec) if len(spec.values_of(key)) == 1]
    yield from _geometry(spec, ["n_layers", *same], None)


def _layer_tables(spec: ModelCacheSpec) -> Iterable[Iterable[str]]:
    differing = [key for key in _geometry_keys(spec) if len(spec.values_of(key)) > 1]
    if set(spec.layer_types) <= {GLOBAL} and not differing:
        return
    for layer_type in LAYER_TYPES:
        if layer_type in spec.layer_types:
            lines = _geometry(spec, ("count", *differing), layer_type)
            yield (f"[model.layers.{layer_type}]", *lines)


def _inference(sampling: Mapping[str, Any], thinks: bool | None) -> Iterable[str]:
    yield "[inference]"
    if sampling:
        yield "# From the model's generation_config.json."
    for key in _GENERATION_CONFIG_KEYS:
        if key in sampling:
            yield _line(key, sampling[key])
        else:
            yield "# " + _line(key, getattr(SamplingParams(), key))
    if thinks is not None:
        yield "# From its chat template: whether it can think, and whether it does if a request does not choose."
        yield _line("supports_thinking", True)
        yield _line("extended_thinking", thinks)


def _optimal() -> Iterable[str]:
    yield "# Settings that suit this model; the constructor and AGENT_MEMORY_* variables come first."
    yield "[optimal]"
    yield from _offered("optimal", {})


def _thresholds(spec: ModelCacheSpec) -> Iterable[str]:
    yield "[thresholds]"
    if spec.context_length is None:
        yield "# The model's config states no limit: write the one from its model card."
    yield "# The budgets below are the most that is used without them: a share of the machine's memory and volume."
    known = {
        "context_length": spec.context_length or DEFAULT_CONTEXT,
        "memory_budget_mb": DEFAULT_MEMORY_MB,
        "disk_budget_mb": DEFAULT_DISK_MB,
    }
    yield from _offered("thresholds", known)


def _offered(section: str, known: Mapping[str, int]) -> Iterable[str]:
    """A line behind # for each setting of a section, with its default, or one of ``known`` in place of None."""
    defaults = EngineConfig()
    for name in dict.fromkeys(profile_keys(EngineConfig, section).values()):
        yield "# " + _line(name, known.get(name, getattr(defaults, name)))
