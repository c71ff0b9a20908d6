"""Between live caches and stored records: restore a stored prefix, seal full blocks, take windows and tails.

A full block is encoded once, when it is sealed, and never again. What window layers keep of it is a record of its own,
because that is needed for a while only. A tail is kept in the model's dtype, so that resuming at the end of a branch
computes nothing again and adds no rounding; only a tail can hold the state of layers that cannot be cut at a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence as ReadOnly
from typing import Any

import mlx.core as mx

from agent_memory_core.blocks.block import Block, BlockHash, RecordKind, record_hash
from agent_memory_core.blocks.chain import TokenChain
from agent_memory_core.blocks.live_caches import LiveCache
from agent_memory_core.blocks.match import Match
from agent_memory_core.blocks.resume_policy import ResumePolicy
from agent_memory_core.config import KvBits
from agent_memory_core.kv.append import GROWTH, round_up
from agent_memory_core.kv.codec import KvCodec, Segment, nbytes
from agent_memory_core.kv.layer_kind import shapes_of
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.restoration import Restoration

ENCODED_RECORDS: tuple[RecordKind, ...] = ("block", "window")
"""Kinds of records that are made of full blocks and encoded."""


class KvBlocks:
    """Makes records of the KV of one model, under one codec and block size, and live caches of records."""

    def __init__(self, layout: KvLayout, kv_bits: KvBits, block_tokens: int, *, resumes: bool = True) -> None:
        """``resumes`` False means that nothing of this model may be stored."""
        self.layout = layout
        self._block_tokens = block_tokens
        self.resume = ResumePolicy(
            block_tokens,
            tuple(dict.fromkeys(group.requirement for group in layout.groups)),
            unsupported=bool(layout.unknown) or not resumes,
        )
        self._codecs = {record: KvCodec(kv_bits, layout.dims(record)) for record in ENCODED_RECORDS}
        self._empty = {
            record: codec.encode(layout.empty(record, block_tokens)) for record, codec in self._codecs.items()
        }

    def identity(self) -> dict[str, str]:
        """What records made here depend on besides the model and the tokens."""
        return {
            "layout": self.layout.describe(),
            "codec": ",".join(codec.name() for codec in self._codecs.values() if not codec.is_empty),
            "block_tokens": str(self._block_tokens),
        }

    @property
    def block_bytes(self) -> int:
        """Bytes of one full block, its window record included."""
        return sum(map(nbytes, self._empty.values()))

    @property
    def tail_bytes(self) -> int:
        """The most bytes that a tail can have."""
        live = self.layout.live_bytes
        return self._block_tokens * (live.per_token + live.per_window_token) + live.fixed

    # -- from records to a live cache ---------------------------------------------------------------------

    def restore(self, match: Match, room: int) -> list[Any]:
        """Build a live cache from a match whose records are all in memory, with space for ``room`` more tokens."""
        return self.restoring(match, room).finish()

    def restoring(self, match: Match, room: int) -> Restoration:
        """Do what `restore` does while records still come from disk."""
        return Restoration(self.layout, self._codecs, self._block_tokens, match, room)

    # -- live caches that are kept ------------------------------------------------------------------------

    def settle(self, cache: list[Any], blocks: ReadOnly[Block], start: int, length: int) -> None:
        """Make a live cache of ``length`` tokens what `restore` would build, and leave it room to grow.

        ``blocks`` are those from token ``start`` on that were sealed from it. Only where the layout `stays_live`.
        """
        decoded = [self._codecs["block"].decode([block.kv]) for block in blocks]
        self.layout.settle(cache, {"block": decoded, "window": (), "tail": ()}, start, length, GROWTH)

    def resume_live(self, live: LiveCache, match: Match) -> list[Any]:
        """The tokens of a match out of a live cache that `LiveCache.holds` it: itself, or a copy if it has more."""
        if live.tokens == match.tokens:
            cache: list[Any] = live.kv
            return cache
        return self.layout.trimmed(live.kv, match.tokens, GROWTH)

    def live_bytes(self, length: int) -> int:
        """Bytes of a live cache that `settle` leaves."""
        live = self.layout.live_bytes
        return round_up(length + GROWTH) * live.per_token

    # -- from a live cache to records ---------------------------------------------------------------------

    def seal(self, sequence: TokenChain, cache: list[Any], first: int, last: int) -> list[Block]:
        """Encode full blocks ``first`` up to ``last`` of a sequence from its live cache, and evaluate them."""
        kvs = self._encoded("block", sequence, cache, range(first, last))
        return [
            Block(sequence.hashes[index], sequence.parent_of(index), _tokens(sequence, index), nbytes(kv), kv)
            for index, kv in kvs.items()
        ]

    def windows(self, sequence: TokenChain, cache: list[Any], indices: ReadOnly[int]) -> list[Block]:
        """Make the window records of full blocks that a live cache still holds, and evaluate them."""
        kvs = self._encoded("window", sequence, cache, indices)
        named = [(sequence.hashes[index], kv) for index, kv in kvs.items()]
        return [
            Block(record_hash("window", parent), parent, (), nbytes(kv), kv, "window") for parent, kv in named
        ]

    def _encoded(
        self, record: RecordKind, sequence: TokenChain, cache: list[Any], indices: Iterable[int]
    ) -> dict[int, Segment]:
        kvs = {
            index: self._codecs[record].encode(self.layout.cut(cache, record, *sequence.block_range(index)))
            for index in indices
        }
        mx.eval(list(kvs.values()))
        return kvs

    def tail(self, sequence: TokenChain, cache: list[Any], length: int, fed: int) -> Block | None:
        """Keep what follows the last full block of the first ``length`` tokens of a cache that was fed ``fed``.

        None if there is nothing to keep. If the cache no longer holds what it takes to resume there, because it was
        fed more tokens than ``length``, only the token ids are kept.
        """
        full = length // self._block_tokens
        start = full * self._block_tokens
        tokens, parent = tuple(sequence.token_ids[start:length]), sequence.parent_of(full)
        if self.resume.unsupported or not self.layout.holds(cache, length, fed):
            return _token_tail(parent, tokens)
        kv = {name: mx.contiguous(x) for name, x in self.layout.cut(cache, "tail", start, length).items()}
        if not kv:
            return _token_tail(parent, tokens)
        mx.eval(kv)
        return Block(record_hash("tail", parent, tokens), parent, tokens, nbytes(kv), kv, "tail")

    # -- checks -------------------------------------------------------------------------------------------

    def fits(self, kv: Mapping[str, mx.array], tokens: int, kind: RecordKind) -> bool:
        """Whether loaded arrays have the names, shapes and dtypes of a record made here."""
        if kind in ENCODED_RECORDS:
            return shapes_of(kv) == shapes_of(self._empty[kind])
        return self.layout.fits_tail(dict(kv), tokens)


def _token_tail(parent: BlockHash, tokens: tuple[int, ...]) -> Block | None:
    """The record of an end that cannot be resumed; None if it has no tokens."""
    if not tokens:
        return None
    return Block(record_hash("token_tail", parent, tokens), parent, tokens, 0, {}, "token_tail")


def _tokens(sequence: TokenChain, index: int) -> tuple[int, ...]:
    start, stop = sequence.block_range(index)
    return tuple(sequence.token_ids[start:stop])
