"""ModelCacheSpec: what a loaded model keeps per token, layer by layer, put together from three sources.

1. The live cache objects decide: which kind each layer keeps, how many heads, how wide, which window.
2. ``config.json`` tells what no cache can: how many layers there are, where some keep nothing of their own
   (layers that share another's KV, or have none), and the context length.
3. What else the config says of its layers (``layer_types``, ``sliding_window_pattern``, ``sliding_window``)
   only corroborates. Where it says another thing than the caches it is reported as a contradiction, and the
   caches are believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from agent_memory_core.config import EngineConfig, KvBits
from agent_memory_core.kv.codec import GROUPS

GLOBAL, SLIDING, RECURRENT, SNAPSHOT, HYBRID = "global", "sliding_window", "recurrent", "snapshot", "hybrid"
LAYER_TYPES = (GLOBAL, SLIDING, RECURRENT, SNAPSHOT, HYBRID)
"""What a layer may be: all tokens, the last ``sliding_window`` of them, a state, a whole, or several of these."""

_OF_KIND = {"append": GLOBAL, "window": SLIDING, "state": RECURRENT, "snapshot": SNAPSHOT}

_OF_CLAIM = {
    "full_attention": GLOBAL,
    "attention": GLOBAL,
    "sliding_attention": SLIDING,
    "linear_attention": RECURRENT,
    "mamba": RECURRENT,
    "conv": RECURRENT,
    "chunked_attention": SNAPSHOT,
}
"""Words of ``layer_types`` in a ``config.json``. A word that is not here claims nothing."""

_WITHOUT_CACHE = ("mlp", "moe")
"""Words there for layers that keep nothing, and have no place in the prompt cache."""

_LAYER_LISTS = ("layer_types", "layers_block_type", "hybrid_override_pattern")
"""One entry a layer, which counts them where no number does."""

_DEFAULTS: Mapping[str, Any] = {name: field.default for name, field in EngineConfig.model_fields.items()}

_LAYER_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")


class CacheGroup(Protocol):
    """A group of layers of one kind, as the layout of a loaded model has it. ``layers`` index the prompt cache.

    The kinds "append" and "window" also have ``heads``, ``key_dim`` and ``value_dim``, the latter a ``window``.
    """

    @property
    def kind(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Layers whose keys and values of one token have one form. ``window`` None: they keep every token."""

    layer_type: str
    layers: tuple[int, ...]
    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class ModelCacheSpec:
    """What a loaded model says of its own KV: the truth that a profile is held against.

    Args:
        n_layers: layers of the model, also those that keep nothing of their own.
        layer_types: one of `LAYER_TYPES` for each layer that does keep something, in order.
        shapes: the forms that keys and values have; a layer of two caches is in two of them.
        block_tokens: tokens of a block at rest.
        kv_bits: at-rest encoding, as in `EngineConfig`.
        kv_group_size: values that share one scale where KV is quantised.
        context_length: the limit that the config states, or None.
        contradictions: a sentence for each thing the config says and the live caches do not.
    """

    n_layers: int
    layer_types: tuple[str, ...]
    shapes: tuple[LayerShape, ...]
    block_tokens: int = _DEFAULTS["block_tokens"]
    kv_bits: KvBits = _DEFAULTS["kv_bits"]
    kv_group_size: int = GROUPS[0]
    context_length: int | None = None
    contradictions: tuple[str, ...] = ()

    @property
    def n_kv_heads(self) -> int | None:
        """KV heads of every layer; None where layers differ (see ``shapes``) or none keeps keys."""
        return _only(self.values_of("n_kv_heads"))

    @property
    def head_dim(self) -> int | None:
        """Width of a key of every layer; None as for `n_kv_heads`."""
        return _only(self.values_of("head_dim"))

    @property
    def v_head_dim(self) -> int | None:
        """Width of a value of every layer where it is not that of the key; None means that they are equal."""
        width = _only(self.values_of("v_head_dim"))
        return None if width == self.head_dim else width

    @property
    def sliding_window_size(self) -> int | None:
        """Tokens that a sliding-window layer keeps; None where no layer has a window, or windows differ."""
        return _only(self.values_of("sliding_window"))

    def values_of(self, key: str, layer_type: str | None = None) -> set[int]:
        """All values that a geometry ``key`` of a profile has, in all layers or in those of one type."""
        if key == "n_layers":
            return {self.n_layers}
        if key == "count":
            return {self.layer_types.count(layer_type)} if layer_type is not None else {len(self.layer_types)}
        name = {"n_kv_heads": "heads", "head_dim": "key_dim", "v_head_dim": "value_dim"}.get(key, "window")
        values = (getattr(s, name) for s in self.shapes if layer_type in (None, s.layer_type))
        return {value for value in values if value is not None}


def cache_spec(
    groups: Iterable[CacheGroup],
    config: Mapping[str, Any],
    block_tokens: int = _DEFAULTS["block_tokens"],
    kv_bits: KvBits = _DEFAULTS["kv_bits"],
) -> ModelCacheSpec:
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
        block_tokens=block_tokens,
        kv_bits=kv_bits,
        context_length=text.get("max_position_embeddings"),
        contradictions=tuple(_contradictions(types, shapes, stated, text)),
    )


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a ``config.json`` that are of its language model, which a multimodal one nests."""
    return {**config, **(config.get("text_config") or {})}


def _only(values: set[int]) -> int | None:
    return next(iter(values)) if len(values) == 1 else None


def _stated_layers(text: Mapping[str, Any]) -> int | None:
    counts = [text[key] for key in _LAYER_COUNTS if isinstance(text.get(key), int)]
    lists = [len(text[key]) for key in _LAYER_LISTS if isinstance(text.get(key), (list, str))]
    return next(iter([*counts, *lists]), None)


def _layer_types(groups: tuple[CacheGroup, ...]) -> dict[int, str]:
    """The type of each layer that keeps something, by its place in the prompt cache."""
    found: dict[int, set[str]] = {}
    for group in groups:
        for layer in group.layers:
            found.setdefault(layer, set()).add(_OF_KIND.get(group.kind, SNAPSHOT))
    return {layer: next(iter(types)) if len(types) == 1 else HYBRID for layer, types in found.items()}


def _shapes(group: Any, type_of: Mapping[int, str]) -> Iterable[LayerShape]:
    if group.kind not in ("append", "window"):
        return
    window = group.window if group.kind == "window" else None
    for layer_type in sorted({type_of[layer] for layer in group.layers}):
        layers = tuple(layer for layer in group.layers if type_of[layer] == layer_type)
        yield LayerShape(layer_type, layers, group.heads, group.key_dim, group.value_dim, window)


def _contradictions(
    types: tuple[str, ...], shapes: tuple[LayerShape, ...], stated: int | None, text: Mapping[str, Any]
) -> Iterable[str]:
    if stated is not None and stated < len(types):
        yield f"config.json says {stated} layers, but the model keeps {len(types)} caches"
    for key, claimed in _claims(text):
        # Layers that share another's KV have no cache and are the last ones, so the lists may differ in length.
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
    """What the config says of each layer, by key; None where it says nothing that is known here."""
    listed = text.get("layer_types")
    if isinstance(listed, list):
        yield "layer_types", [_OF_CLAIM.get(word) for word in listed if word not in _WITHOUT_CACHE]
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        every, layers = text.get(key), text.get("num_hidden_layers")
        if isinstance(every, int) and isinstance(layers, int) and every > 0:
            yield key, [GLOBAL if i % every == every - 1 else SLIDING for i in range(layers)]
