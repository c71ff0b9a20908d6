"""Layers that keep a key and a value for each token: what is common to the kinds "append" and "window".

A segment holds the keys of all leaves of the group as one array ``k`` of shape [leaves, heads, tokens, key_dim], and
their values as ``v``, in the model's dtype.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from agent_memory_core.kv.codec import Segment
from agent_memory_core.kv.layer_kind import LayerGroup, Leaf, TokenShape, shapes_of


@dataclass(frozen=True, slots=True)
class TokenLayers(LayerGroup):
    """Leaves whose keys and values of one token have one shape and dtype."""

    layers: tuple[int, ...]
    leaves: tuple[int, ...]
    token: TokenShape

    @classmethod
    @abstractmethod
    def key_of(cls, leaf: Leaf) -> TokenShape | None:
        """The shape of its keys and values, None if a leaf is not of this kind."""

    @classmethod
    def of(cls, leaves: Sequence[Leaf]) -> Self:
        """The group of leaves whose tokens have one shape."""
        token = cls.key_of(leaves[0])
        assert token is not None
        return cls(tuple(dict.fromkeys(leaf.layer for leaf in leaves)), tuple(x.index for x in leaves), token)

    def describe(self) -> str:
        """Kind, leaves and the shape of a token."""
        token, leaves = self.token, ",".join(map(str, self.leaves))
        window = f" window={token.window}" if token.window else ""
        shape = f"heads={token.heads} k={token.key_dim} v={token.value_dim} {token.dtype}"
        return f"{self.kind} leaves={leaves} {shape}{window}"

    @property
    def shape(self) -> TokenShape:
        """The shape of one token's keys and values."""
        return self.token

    @property
    def nbytes(self) -> int:
        """Bytes of one token over all leaves."""
        return len(self.leaves) * self.token.nbytes

    def dims(self) -> dict[str, int]:
        """Widths of keys and values."""
        return {"k": self.token.key_dim} | ({"v": self.token.value_dim} if self.token.value_dim else {})

    def empty(self, tokens: int) -> Segment:
        """Zeros in the shapes of so many tokens."""
        size = (len(self.leaves), self.token.heads, tokens)
        return {name: mx.zeros((*size, dim), self.token.dtype) for name, dim in self.dims().items()}

    def cut(self, caches: Sequence[Any], start: int, stop: int) -> Segment:
        """Copy the keys and values of tokens [start, stop); nothing if there are none."""
        if start == stop:
            return {}
        attributes = {"k": "keys", "v": "values"}
        return {
            # The stack of a single leaf would be a view of its buffer; `mx.contiguous` makes a copy.
            name: mx.contiguous(
                mx.stack([self.tokens(c, getattr(c, attributes[name]), start, stop) for c in caches])
            )
            for name in self.dims()
        }

    @abstractmethod
    def tokens(self, cache: Any, x: mx.array, start: int, stop: int) -> mx.array:
        """Tokens [start, stop) of ``x``, the keys or values of one leaf, as [heads, tokens, dim]."""

    def fits(self, arrays: Segment, tokens: int) -> bool:
        """Whether the arrays are keys and values of so many tokens."""
        return shapes_of(arrays) == shapes_of(self.empty(tokens) if tokens else {})

    def fill(self, cache: Any, arrays: Segment) -> None:
        """Set the keys and values of one leaf; a leaf without values gets an array of width 0."""
        cache.keys = arrays["k"]
        cache.values = arrays.get("v", mx.zeros((*cache.keys.shape[:3], 0), cache.keys.dtype))


def token_shape(cache: Any, window: int | None = None) -> TokenShape | None:
    """The shape of one token in a cache with ``keys`` and ``values`` of shape [1, heads, tokens, dim].

    None if there are none, or if keys and values differ in dtype.
    """
    keys, values = cache.keys, cache.values
    if keys is None or keys.dtype != values.dtype:
        return None
    return TokenShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, window)
