"""What is known of a model: its geometry, its settings and the cost of its KV, each with where it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from agent_memory_core.config import KvBits
from agent_memory_core.environment import from_environment
from agent_memory_core.errors import InvalidSetting
from agent_memory_core.kv.codec import KvCodec
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.models.cache_spec import (
    GLOBAL,
    HYBRID,
    RECURRENT,
    SLIDING,
    SNAPSHOT,
    LayerShape,
    ModelCacheSpec,
    cache_spec,
)
from agent_memory_core.models.loader import LoadedModel, load_model
from agent_memory_core.models.profile import Profile, find_profile, sampling_for, settings_for
from agent_memory_core.storage.block_file import ALIGNMENT

ENCODINGS: tuple[KvBits, ...] = (None, 8, "8/4", "6/4", 4)
"""The values of ``kv_bits`` whose cost is computed, the largest first."""

_PROFILE, _CACHES = "profile", "live caches"


@dataclass(frozen=True, slots=True)
class KnownValue:
    """A value of a model."""

    name: str
    value: Any
    source: str
    """Where it comes from: profile, environment, default, live caches, config.json."""


@dataclass(frozen=True, slots=True)
class KvCost:
    """The size of stored KV in one encoding, in bytes."""

    kv_bits: KvBits
    memory_per_token: float
    """For layers that keep every token."""
    disk_per_token: float
    """The same, with the header of a file shared by the tokens of a block."""
    windows: float
    """For all sliding-window layers together, once their windows are full; 0 if there is none."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What is known of one model."""

    profile: Profile | None
    geometry: tuple[KnownValue, ...]
    settings: tuple[KnownValue, ...]
    """Settings of the engine, of sampling and of the chat template, as they would be used now."""
    block_tokens: int
    costs: tuple[KvCost, ...]
    """One for each of `ENCODINGS`; empty if the profile tells too little to compute it."""
    keeps_states: bool
    """Whether some layers keep states or snapshots, which ``costs`` does not count."""
    contradictions: tuple[str, ...]
    """Where the model's config.json differs from its live caches."""


def describe_model(model: str, *, load: bool = False) -> ModelDescription:
    """Put together what the profile of ``model`` says or, with ``load``, what the loaded model shows.

    Raises:
        InvalidSetting: there is no profile and ``load`` is not set, or the profile is of another model.
        ModelError: the model cannot be loaded.
    """
    profile = find_profile(model)
    if profile is None and not load:
        raise InvalidSetting(
            f"there is no profile for {model!r}: write one with `agent-memory models new`, or add --load "
            "to look at the model itself."
        )
    spec, item_bytes = None, 2
    if load:
        name = profile.model_id if profile is not None and profile.name == model else model
        spec, item_bytes = inspect_caches(load_model(name))
        if profile is not None:
            profile.check(spec)
    shapes = spec.shapes if spec is not None else profile_shapes(profile)
    types = spec.layer_types if spec is not None else (profile.layers if profile is not None else ())
    block_tokens = settings_for({"model": model}).block_tokens
    return ModelDescription(
        profile=profile,
        geometry=tuple(_profile_geometry(profile) if spec is None else _live_geometry(spec)),
        settings=tuple(_settings(model, profile)),
        block_tokens=block_tokens,
        costs=kv_costs(shapes, item_bytes, block_tokens) if shapes else (),
        keeps_states=bool({RECURRENT, HYBRID, SNAPSHOT} & set(types)),
        contradictions=spec.contradictions if spec is not None else (),
    )


def inspect_caches(loaded: LoadedModel) -> tuple[ModelCacheSpec, int]:
    """What the live caches of a model show, and the bytes of one number in them."""
    groups = KvLayout(loaded.model).groups
    sizes = [group.shape.dtype.size for group in groups if group.shape is not None]
    return cache_spec(groups, loaded.config), max(sizes, default=2)


def _profile_geometry(profile: Profile | None) -> Iterable[KnownValue]:
    if profile is None:
        return
    for key, value in profile.geometry.items():
        yield KnownValue(key, value, _PROFILE)
    for layer_type, geometry in profile.layers.items():
        for key, value in geometry.items():
            yield KnownValue(f"{layer_type} layers: {key}", value, _PROFILE)


def _live_geometry(spec: ModelCacheSpec) -> Iterable[KnownValue]:
    yield KnownValue("n_layers", spec.n_layers, f"{_CACHES}, config.json")
    for layer_type in sorted(set(spec.layer_types)):
        for key in ("count", "n_kv_heads", "head_dim", "v_head_dim", "sliding_window"):
            if values := spec.values_of(key, layer_type):
                yield KnownValue(f"{layer_type} layers: {key}", tuple(sorted(values)), _CACHES)
    yield KnownValue("context_length", spec.context_length, "config.json")


def _settings(model: str, profile: Profile | None) -> Iterable[KnownValue]:
    in_environment = from_environment()
    settings, sampling = settings_for({"model": model}), sampling_for(model, {})
    for values, in_profile in (
        (settings, profile.settings if profile is not None else {}),
        (sampling, profile.sampling if profile is not None else {}),
    ):
        for name, value in values:
            if name in ("model", "seed", "stop"):
                continue
            source = (
                "environment" if name in in_environment else _PROFILE if name in in_profile else "default"
            )
            yield KnownValue(name, value, source)
    for key, value in (profile.template_kwargs if profile is not None else {}).items():
        yield KnownValue(key, value, _PROFILE)


def profile_shapes(profile: Profile | None) -> tuple[LayerShape, ...]:
    """The shapes that a profile tells; none unless it tells one head count and one width for each type of layer."""
    if profile is None:
        return ()
    shapes = []
    for layer_type, own in (profile.layers or {GLOBAL: {}}).items():
        if layer_type in (RECURRENT, SNAPSHOT):
            continue
        keys: dict[str, Any] = {"count": profile.geometry.get("n_layers"), **profile.geometry, **own}
        keys.setdefault("v_head_dim", keys.get("head_dim"))
        form = [keys.get(key) for key in ("count", "n_kv_heads", "head_dim", "v_head_dim")]
        window = keys.get("sliding_window") if layer_type == SLIDING else None
        numbers = [number for number in form if isinstance(number, int)]
        if len(numbers) < len(form) or isinstance(window, tuple):
            return ()
        count, heads, key_dim, value_dim = numbers
        shapes.append(LayerShape(layer_type, tuple(range(count)), heads, key_dim, value_dim, window))
    return tuple(shapes)


def kv_costs(shapes: tuple[LayerShape, ...], item_bytes: int, block_tokens: int) -> tuple[KvCost, ...]:
    """The cost of layers in each of `ENCODINGS`; ``item_bytes`` is the size of one number of the model."""
    return tuple(_cost(shapes, kv_bits, item_bytes, block_tokens) for kv_bits in ENCODINGS)


def _cost(shapes: tuple[LayerShape, ...], kv_bits: KvBits, item_bytes: int, block_tokens: int) -> KvCost:
    sizes = [(shape.window, _stored_bytes(shape, kv_bits, item_bytes, block_tokens)) for shape in shapes]
    growing = sum(size for window, size in sizes if window is None)
    windows = sum(size * window for window, size in sizes if window is not None)
    return KvCost(kv_bits, growing, growing + ALIGNMENT / block_tokens, windows)


def _stored_bytes(shape: LayerShape, kv_bits: KvBits, item_bytes: int, block_tokens: int) -> float:
    """Bytes that one token takes in the layers of ``shape``: the codec encodes zeros, which are never evaluated."""
    dtype = mx.float32 if item_bytes == 4 else mx.bfloat16
    size = (len(shape.layers), shape.heads, block_tokens)
    raw = {"0.k": mx.zeros((*size, shape.key_dim), dtype), "0.v": mx.zeros((*size, shape.value_dim), dtype)}
    encoded = KvCodec(kv_bits, {"0.k": shape.key_dim, "0.v": shape.value_dim}).encode(raw)
    return sum(array.nbytes for array in encoded.values()) / block_tokens
