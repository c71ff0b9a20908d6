"""ModelCacheSpec: what a loaded model keeps per token, layer by layer, put together from three sources.

1. The live cache objects decide which kind each layer is of, how many heads it has, how wide they are and how long its
   window is.
2. ``config.json`` tells what no cache can: how many layers there are, if some keep nothing of their own (because they
   use another layer's KV, or have none), and the context length.
3. What else the config says about its layers (``layer_types``, ``sliding_window_pattern``, ``sliding_window``) is only
   compared. If it differs from the caches, that is reported as a contradiction, and the caches are believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

GLOBAL, SLIDING, RECURRENT, SNAPSHOT, HYBRID = "global", "sliding_window", "recurrent", "snapshot", "hybrid"
LAYER_TYPES = (GLOBAL, SLIDING, RECURRENT, SNAPSHOT, HYBRID)
"""What a layer may keep: all tokens, the last ``sliding_window`` of them, a state, a snapshot, or several of these."""

LAYER_TYPE_BY_CONFIG_WORD = {
    "full_attention": GLOBAL,
    "attention": GLOBAL,
    "sliding_attention": SLIDING,
    "linear_attention": RECURRENT,
    "mamba": RECURRENT,
    "conv": RECURRENT,
    "chunked_attention": SNAPSHOT,
}
"""The meaning of the words in ``layer_types`` of a ``config.json``. Other words are not compared with anything."""

CONFIG_WORDS_WITHOUT_CACHE = ("mlp", "moe")
"""Words in ``layer_types`` for layers that keep nothing, and so have no place in the prompt cache."""

CONFIG_LAYER_LISTS = ("layer_types", "layers_block_type", "hybrid_override_pattern")
"""Keys of a ``config.json`` with one entry for each layer; they tell the number of layers if no number does."""

CONFIG_LAYER_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")
"""Keys of a ``config.json`` that tell the number of layers."""

SHAPE_FIELD_BY_GEOMETRY_KEY = {
    "n_kv_heads": "heads",
    "head_dim": "key_dim",
    "v_head_dim": "value_dim",
    "sliding_window": "window",
}
"""Keys of a profile's geometry, and the field of `LayerShape` that each one means."""


class TokenShape(Protocol):
    """The shape of one token's keys and values in the layers of one group."""

    @property
    def heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def window(self) -> int | None: ...


class CacheGroup(Protocol):
    """A group of layers of one kind, as the layout of a loaded model has it."""

    @property
    def layer_type(self) -> str:
        """One of `LAYER_TYPES`, except "hybrid"."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, as places in the prompt cache."""
        ...

    @property
    def shape(self) -> TokenShape | None:
        """None if the layers do not keep keys and values token by token."""
        ...


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Layers of one type in which one token's keys and values have one shape."""

    layer_type: str
    layers: tuple[int, ...]
    """Places in the prompt cache."""
    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    """How many tokens they keep; None means all."""


@dataclass(frozen=True, slots=True)
class ModelCacheSpec:
    """What a loaded model keeps, as its own caches tell. A profile is checked against this."""

    n_layers: int
    """Layers of the model, also those that keep nothing of their own."""
    layer_types: tuple[str, ...]
    """One of `LAYER_TYPES` for each layer that keeps something, in order."""
    shapes: tuple[LayerShape, ...]
    """The shapes that keys and values have; a layer of several caches is in several of them."""
    context_length: int | None = None
    """The limit in the config, if there is one."""
    contradictions: tuple[str, ...] = ()
    """A sentence for each thing that the config says and that the live caches do not confirm."""

    def values_of(self, key: str, layer_type: str | None = None) -> set[int]:
        """All values that a ``key`` of a profile's geometry has, in all layers or in those of one type."""
        if key == "n_layers":
            return {self.n_layers}
        if key == "count":
            return {self.layer_types.count(layer_type)} if layer_type is not None else {len(self.layer_types)}
        name = SHAPE_FIELD_BY_GEOMETRY_KEY[key]
        values = (getattr(s, name) for s in self.shapes if layer_type in (None, s.layer_type))
        return {value for value in values if value is not None}


def cache_spec(groups: Iterable[CacheGroup], config: Mapping[str, Any]) -> ModelCacheSpec:
    """Put together what the live caches (``groups``) and the model's ``config.json`` say."""
    groups = tuple(groups)
    text = text_config(config)
    type_of = _layer_types(groups)
    types = tuple(type_of[layer] for layer in sorted(type_of))
    shapes = tuple(shape for group in groups for shape in _shapes(group, type_of))
    stated = _stated_layers(text)
    return ModelCacheSpec(
        n_layers=max(len(types), stated or 0),
        layer_types=types,
        shapes=shapes,
        context_length=text.get("max_position_embeddings"),
        contradictions=tuple(_contradictions(types, shapes, stated, text)),
    )


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` with the keys of its language model, which multimodal models nest, at the top."""
    return {**config, **(config.get("text_config") or {})}


def _stated_layers(text: Mapping[str, Any]) -> int | None:
    counts = [text[key] for key in CONFIG_LAYER_COUNTS if isinstance(text.get(key), int)]
    lists = [len(text[key]) for key in CONFIG_LAYER_LISTS if isinstance(text.get(key), (list, str))]
    return next(iter([*counts, *lists]), None)


def _layer_types(groups: tuple[CacheGroup, ...]) -> dict[int, str]:
    """The type of each layer that keeps something, by its place in the prompt cache."""
    found: dict[int, set[str]] = {}
    for group in groups:
        for layer in group.layers:
            found.setdefault(layer, set()).add(group.layer_type)
    return {layer: next(iter(types)) if len(types) == 1 else HYBRID for layer, types in found.items()}


def _shapes(group: CacheGroup, type_of: Mapping[int, str]) -> Iterable[LayerShape]:
    shape = group.shape
    if shape is None:
        return
    for layer_type in sorted({type_of[layer] for layer in group.layers}):
        layers = tuple(layer for layer in group.layers if type_of[layer] == layer_type)
        yield LayerShape(layer_type, layers, shape.heads, shape.key_dim, shape.value_dim, shape.window)


def _contradictions(
    types: tuple[str, ...], shapes: tuple[LayerShape, ...], stated: int | None, text: Mapping[str, Any]
) -> Iterable[str]:
    if stated is not None and stated < len(types):
        yield f"config.json says {stated} layers, but the model keeps {len(types)} caches"
    for key, claimed in _claims(text):
        # Layers that use another layer's KV have no cache and come last, so the lists may differ in length.
        wrong = [i for i, (a, b) in enumerate(zip(claimed, types, strict=False)) if a and a != b]
        if wrong:
            yield (
                f"config.json says by {key} that layer {wrong[0]} is {claimed[wrong[0]]}, "
                f"but its live cache is {types[wrong[0]]} ({len(wrong)} such layers)"
            )
    window, kept = text.get("sliding_window"), sorted({s.window for s in shapes if s.window is not None})
    if window is not None and text.get("use_sliding_window", True) and kept != [window]:
        has = f"windows of {', '.join(map(str, kept))}" if kept else "no window: all tokens are kept"
        yield f"config.json says sliding_window = {window}, but the live caches have {has}"


def _claims(text: Mapping[str, Any]) -> Iterable[tuple[str, list[str | None]]]:
    """What each key of the config says about the type of each layer; None where its word is not known here."""
    listed = text.get("layer_types")
    if isinstance(listed, list):
        yield "layer_types", _known_types(listed)
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        every, layers = text.get(key), text.get("num_hidden_layers")
        if isinstance(every, int) and isinstance(layers, int) and every > 0:
            yield key, [GLOBAL if i % every == every - 1 else SLIDING for i in range(layers)]


def _known_types(words: list[str]) -> list[str | None]:
    with_cache = (word for word in words if word not in CONFIG_WORDS_WITHOUT_CACHE)
    return [LAYER_TYPE_BY_CONFIG_WORD.get(word) for word in with_cache]
