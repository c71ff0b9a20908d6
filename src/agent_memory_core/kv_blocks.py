"""Between live caches and blocks at rest: restore a known prefix, seal full blocks, keep a tail.

A full block is encoded once, when it is sealed, and never re-encoded. A tail is kept in the model's dtype, so
that resuming at the end of a branch computes nothing again and adds no rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from agent_memory_core.block import Block, tail_hash
from agent_memory_core.config import KvBits
from agent_memory_core.kv_codec import Encoded, KvCodec, Raw
from agent_memory_core.kv_layout import KvLayout, nbytes, slice_tokens
from agent_memory_core.prefix_cache import Match
from agent_memory_core.sequence import Sequence


class KvBlocks:
    """Cuts and joins the KV of one model under one codec and block size."""

    def __init__(self, layout: KvLayout, kv_bits: KvBits, block_tokens: int) -> None:
        self.layout = layout
        self.codec = KvCodec(kv_bits, layout.head_dims)
        self._block_tokens = block_tokens
        self._block_shapes = {name: (tuple(x.shape), x.dtype) for name, x in self._empty_block().items()}

    def identity(self) -> dict[str, str]:
        """What blocks made here depend on besides the model and the tokens."""
        return {
            "layout": self.layout.describe(),
            "codec": self.codec.name(),
            "block_tokens": str(self._block_tokens),
        }

    @property
    def block_bytes(self) -> int:
        """Bytes of one full block at rest."""
        return sum(_size(shape) * dtype.size for shape, dtype in self._block_shapes.values())

    def restore(self, match: Match, room: int) -> list[Any]:
        """Build a live cache from matched blocks, all in memory, with space for ``room`` more tokens."""
        blocks = [hit.block for hit in match.blocks]
        assert all(block is not None for block in blocks)
        parts: list[Raw] = []
        if blocks:
            parts.append(self.codec.decode([block.kv for block in blocks if block is not None]))
        if match.end is not None:
            end = match.end.block
            assert end is not None
            parts.append(
                slice_tokens(end.kv if end.is_tail else self.codec.decode([end.kv]), 0, match.end.take)
            )
        cache = self.layout.join(parts, match.tokens, room)
        mx.eval(self.layout.arrays(cache))
        return cache

    def seal(self, sequence: Sequence, cache: list[Any], first: int, last: int) -> list[Block]:
        """Encode full blocks ``first`` up to ``last`` of a sequence from its live cache, evaluated."""
        sealed: list[Block] = []
        for index in range(first, last):
            start, stop = sequence.block_range(index)
            kv = self.codec.encode(self.layout.cut(cache, start, stop))
            tokens = tuple(sequence.token_ids[start:stop])
            sealed.append(Block(sequence.hashes[index], sequence.parent_of(index), tokens, nbytes(kv), kv))
        mx.eval([block.kv for block in sealed])
        return sealed

    def tail(self, sequence: Sequence, cache: list[Any], length: int) -> Block | None:
        """Keep what follows the last full block of the first ``length`` tokens; None where nothing does."""
        full = length // self._block_tokens
        start = full * self._block_tokens
        if start == length:
            return None
        kv = {name: mx.contiguous(x) for name, x in self.layout.cut(cache, start, length).items()}
        mx.eval(kv)
        tokens = tuple(sequence.token_ids[start:length])
        parent = sequence.parent_of(full)
        return Block(tail_hash(parent, tokens), parent, tokens, nbytes(kv), kv, is_tail=True)

    def fits(self, kv: Mapping[str, mx.array], tokens: int, *, is_tail: bool) -> bool:
        """Whether loaded arrays have the names, shapes and dtypes of a block made here."""
        shapes = {name: (tuple(x.shape), x.dtype) for name, x in kv.items()}
        return shapes == (self._tail_shapes(tokens) if is_tail else self._block_shapes)

    def _tail_shapes(self, tokens: int) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        return {name: (tuple(x.shape), x.dtype) for name, x in self._empty(tokens).items()}

    def _empty(self, tokens: int) -> Raw:
        """Zeros in the shape of a raw part; never evaluated."""
        raw: Raw = {}
        for number, group in enumerate(self.layout.groups):
            shape = (len(group.layers), group.heads, tokens)
            raw[f"{number}.k"] = mx.zeros((*shape, group.key_dim), group.dtype)
            raw[f"{number}.v"] = mx.zeros((*shape, group.value_dim), group.dtype)
        return raw

    def _empty_block(self) -> Encoded:
        return self.codec.encode(self._empty(self._block_tokens))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
