"""A live cache that is built from stored records while the last of them are still on their way from disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from agent_memory_core.blocks.block import Block, RecordKind
from agent_memory_core.blocks.match import Hit, Match
from agent_memory_core.kv.codec import KvCodec, Segment
from agent_memory_core.kv.layout import KvLayout


class Restoration:
    """The live cache of one match. Records come in any order, and go into the cache in the order of tokens.

    Args:
        layout: of the model.
        codecs: what decodes records made of full blocks, by their kind.
        block_tokens: tokens of a full block.
        match: what is restored; its hits get their blocks when these are in memory.
        room: how many more tokens there is to be space for.
    """

    def __init__(
        self,
        layout: KvLayout,
        codecs: Mapping[RecordKind, KvCodec],
        block_tokens: int,
        match: Match,
        room: int,
    ) -> None:
        self._layout = layout
        self._codecs = codecs
        self._match = match
        end = match.end
        self._tail = end if end is not None and end.kind == "tail" else None
        self._blocks = [*match.blocks, *([end] if end is not None and self._tail is None else [])]
        self._surplus = block_tokens - end.take if end is not None and self._tail is None else 0
        self._building = layout.building(match.tokens, room)
        self._next = 0

    def advance(self) -> None:
        """Decode the blocks that are in memory by now, up to the first one that is not.

        It returns while the last of them is still being decoded; those before it are waited for.
        """
        if self._codecs["block"].is_empty:
            return
        while self._next < len(self._blocks) and (block := self._blocks[self._next].block) is not None:
            self._next += 1
            self._decode("block", block, is_last=self._next == len(self._blocks))

    def finish(self) -> list[Any]:
        """The evaluated cache; by now all records of the match are in memory."""
        assert not self._match.missing
        self.advance()
        self._add_tail("block")
        windows = self._match.windows if not self._codecs["window"].is_empty else []
        for left, hit in enumerate(windows, 1 - len(windows)):
            self._decode("window", _block(hit), is_last=left == 0)
        self._add_tail("window")
        if self._tail is not None:
            self._building.add("tail", _block(self._tail).kv)
        cache = self._building.finish()
        mx.eval(self._layout.arrays(cache))
        return cache

    def _decode(self, record: RecordKind, block: Block, *, is_last: bool) -> None:
        """Put in the KV of a full block; of the last one, only the tokens that the match takes."""
        segment = self._codecs[record].decode([block.kv])
        if is_last:
            segment = {name: x[:, :, : x.shape[2] - self._surplus] for name, x in segment.items()}
        self._building.add(record, segment)

    def _add_tail(self, record: RecordKind) -> None:
        """Put in what a tail holds of layers that can be cut: the tokens that the match takes."""
        if self._tail is None or not self._tail.take:
            return
        own: Segment = self._layout.at_home(_block(self._tail).kv, record)
        if own:
            take = self._tail.take
            self._building.add(record, {name: x[:, :, :take] for name, x in own.items()})


def _block(hit: Hit) -> Block:
    assert hit.block is not None
    return hit.block
