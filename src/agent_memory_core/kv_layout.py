"""The only room that knows mlx-lm's cache classes: which layers keep what, and how to cut and join it.

A model's prompt cache is a list with one object per layer. Every layer is of one *kind*:

    append    KVCache: one key and one value per token; any range of tokens can be cut out and put back

The plan is derived from the live cache objects after one token was run through them, never from a model's
name. Layers of one kind, one shape and one dtype form a *group*, and a group's keys (and values) of a token
range travel as one array stacked over its layers. Kinds are found by exact class, since a subclass may keep
its tokens in another order; a class that is not listed is refused by name.

mlx-lm's own ``state`` is never stored: its form changed between releases without a version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from agent_memory_core.errors import ModelUnsupported
from agent_memory_core.kv_codec import Raw

GROW = 256
"""mlx-lm's KVCache grows by this many tokens; buffers made here end on the same step."""


def round_up(tokens: int, step: int = GROW) -> int:
    """The least multiple of ``step`` that is not below ``tokens``."""
    return -(-tokens // step) * step


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose KV has one kind, shape and dtype. ``layers`` index the prompt cache."""

    kind: str
    layers: tuple[int, ...]
    heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype

    def describe(self) -> str:
        """One line that two groups share exactly when their blocks may be exchanged."""
        layers = ",".join(map(str, self.layers))
        return (
            f"{self.kind} layers={layers} heads={self.heads} k={self.key_dim} v={self.value_dim} {self.dtype}"
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers of the group, unencoded."""
        return len(self.layers) * self.heads * (self.key_dim + self.value_dim) * self.dtype.size


def _group_key(index: int, cache: Any) -> tuple[str, int, int, int, mx.Dtype]:
    if type(cache) is not KVCache:
        raise ModelUnsupported(
            f"layer {index} keeps a {type(cache).__name__}, which cannot be cut into blocks yet: "
            "choose a model whose layers all keep a KVCache (Llama, Qwen 2 and 3, Mistral, Phi, ...)."
        )
    _, heads, _, key_dim = cache.keys.shape
    if cache.values.dtype != cache.keys.dtype:
        raise ModelUnsupported(
            f"layer {index} keeps keys as {cache.keys.dtype} and values as {cache.values.dtype}: "
            "one dtype a layer is needed."
        )
    return "append", heads, key_dim, cache.values.shape[3], cache.keys.dtype


class KvLayout:
    """How the KV of one model is laid out, and the way in and out of its prompt caches."""

    def __init__(self, model: Any) -> None:
        """Probe ``model`` with one token.

        Raises:
            ModelUnsupported: a layer keeps a kind of cache that has no place here.
        """
        self._model = model
        probe = make_prompt_cache(model)
        model(mx.array([[0]]), cache=probe)
        found: dict[tuple[str, int, int, int, mx.Dtype], list[int]] = {}
        for index, cache in enumerate(probe):
            found.setdefault(_group_key(index, cache), []).append(index)
        self.groups = tuple(
            LayerGroup(kind, tuple(layers), heads, key_dim, value_dim, dtype)
            for (kind, heads, key_dim, value_dim, dtype), layers in found.items()
        )
        self.num_layers = len(probe)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's KV in a live cache."""
        return sum(group.bytes_per_token for group in self.groups)

    @property
    def head_dims(self) -> dict[str, int]:
        """Width of each raw tensor by name."""
        dims: dict[str, int] = {}
        for number, group in enumerate(self.groups):
            dims |= {f"{number}.k": group.key_dim, f"{number}.v": group.value_dim}
        return dims

    def describe(self) -> str:
        """The layer plan, for the root identity of blocks."""
        return "; ".join(group.describe() for group in self.groups)

    def cut(self, cache: Sequence[Any], start: int, stop: int) -> Raw:
        """Copy the KV of tokens [start, stop) out of a live cache. The result is lazy."""
        raw: Raw = {}
        for number, group in enumerate(self.groups):
            keys = [cache[layer].keys[0, :, start:stop] for layer in group.layers]
            values = [cache[layer].values[0, :, start:stop] for layer in group.layers]
            raw |= {f"{number}.k": mx.stack(keys), f"{number}.v": mx.stack(values)}
        return raw

    def join(self, parts: Sequence[Raw], length: int, room: int) -> list[Any]:
        """Build a live cache of ``length`` tokens from consecutive raw parts, with space for ``room`` more.

        Every layer gets a buffer of its own: views into one shared buffer would all be copied at the first
        write. The last part may hold more tokens than are wanted. The buffers are lazy.
        """
        cache: list[Any] = make_prompt_cache(self._model)
        if length == 0:
            return cache
        capacity = round_up(length + room)
        for number, group in enumerate(self.groups):
            for row, layer in enumerate(group.layers):
                target = cache[layer]
                target.keys = _assemble([p[f"{number}.k"] for p in parts], row, length, capacity)
                target.values = _assemble([p[f"{number}.v"] for p in parts], row, length, capacity)
                target.offset = length
        return cache

    def arrays(self, cache: Sequence[Any]) -> list[mx.array]:
        """The arrays behind a live cache, to evaluate."""
        return [x for c in cache if c.keys is not None for x in (c.keys, c.values)]

    def length(self, cache: Sequence[Any]) -> int:
        """Tokens in a live cache."""
        return int(cache[0].offset)


def _assemble(parts: Sequence[mx.array], row: int, length: int, capacity: int) -> mx.array:
    """One layer's buffer [1, heads, capacity, dim]: its row of every part, then zeros."""
    pieces: list[mx.array] = []
    left = length
    for part in parts:
        take = min(left, part.shape[2])
        pieces.append(part[row : row + 1, :, :take])
        left -= take
    assert left == 0, f"{left} tokens of {length} have no KV"
    _, heads, _, dim = pieces[0].shape
    pieces.append(mx.zeros((1, heads, capacity - length, dim), pieces[0].dtype))
    return mx.concatenate(pieces, axis=2)


def slice_tokens(raw: Raw, start: int, stop: int) -> Raw:
    """Tokens [start, stop) of a raw part. The result is lazy."""
    return {name: x[:, :, start:stop] for name, x in raw.items()}


def nbytes(part: Raw) -> int:
    """Bytes of a raw or encoded part."""
    return sum(x.nbytes for x in part.values())
