"""Between live caches and records at rest: restore a known prefix, seal full blocks, keep tails and windows.

A full block is encoded once, when it is sealed, and never re-encoded; what the window layers keep of it is a
record of its own, since it is wanted only for a while. A tail is kept in the model's dtype, so that resuming at the
end of a branch computes nothing again and adds no rounding, and it alone holds the state of layers that sum up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence as ReadOnly
from typing import Any

import mlx.core as mx

from agent_memory_core.blocks.block import Block, RecordKind, record_hash
from agent_memory_core.blocks.chain import TokenChain
from agent_memory_core.blocks.prefix_cache import Match
from agent_memory_core.blocks.resume_policy import ResumePolicy
from agent_memory_core.config import KvBits
from agent_memory_core.kv.codec import Encoded, KvCodec, Raw
from agent_memory_core.kv.layout import SCALARS, KvLayout, TokenGroup, nbytes, slice_tokens

_Shapes = dict[str, tuple[tuple[int, ...], mx.Dtype]]


class KvBlocks:
    """Cuts and joins the KV of one model under one codec and block size. ``resume`` says where it can be resumed."""

    def __init__(self, layout: KvLayout, kv_bits: KvBits, block_tokens: int, *, resumes: bool = True) -> None:
        """``resumes`` False says that nothing of this model shall be kept."""
        self.layout = layout
        self._block_tokens = block_tokens
        append, window = layout.dims("append"), layout.dims("window")
        self.codec = KvCodec(kv_bits, append)
        self._window_codec = KvCodec(kv_bits, window)
        self.resume = ResumePolicy(
            block_tokens,
            window=layout.reach,
            whole=bool(layout.whole),
            in_blocks=bool(append),
            unsupported=bool(layout.unknown) or not resumes,
        )
        self._block_shapes = _shapes(self.codec.encode(self._empty("append", block_tokens)))
        self._window_shapes = _shapes(self._window_codec.encode(self._empty("window", block_tokens)))

    def identity(self) -> dict[str, str]:
        """What blocks made here depend on besides the model and the tokens."""
        codecs = [codec.name() for codec in (self.codec, self._window_codec)]
        return {
            "layout": self.layout.describe(),
            "codec": ",".join(filter(None, codecs)),
            "block_tokens": str(self._block_tokens),
        }

    @property
    def block_bytes(self) -> int:
        """Bytes of one full block at rest, its window record included."""
        return sum(_size(*array) for array in (*self._block_shapes.values(), *self._window_shapes.values()))

    @property
    def tail_bytes(self) -> int:
        """Most bytes of a tail."""
        tokens = self.layout.bytes_per_token + self.layout.window_bytes
        return self._block_tokens * tokens + self.layout.fixed_bytes

    # -- out of rest --------------------------------------------------------------------------------------

    def restore(self, match: Match, room: int) -> list[Any]:
        """Build a live cache from a match, all in memory, with space for ``room`` more tokens."""
        assert not match.missing
        cache = self.layout.join(
            self._parts(match), self._windows(match), self._whole(match), match.tokens, room
        )
        mx.eval(self.layout.arrays(cache))
        return cache

    def _parts(self, match: Match) -> list[Raw]:
        """The append layers of a match, in token order."""
        parts: list[Raw] = []
        if match.blocks and self.resume.in_blocks:
            parts.append(self.codec.decode([hit.block.kv for hit in match.blocks if hit.block is not None]))
        if match.end is not None and match.end.take and self.resume.in_blocks:
            end = _block(match.end)
            raw = self._of(end.kv, "append") if end.kind == "tail" else self.codec.decode([end.kv])
            parts.append(slice_tokens(raw, 0, match.end.take))
        return parts

    def _windows(self, match: Match) -> list[Raw]:
        """The window layers of a match, in token order, the last token of the match at their end."""
        parts = [self._window_codec.decode([_block(hit).kv]) for hit in match.windows]
        if match.end is None or not self.resume.window or not match.end.take:
            return parts
        end = _block(match.end)
        if end.kind == "tail":
            return [*parts, slice_tokens(self._of(end.kv, "window"), 0, match.end.take)]
        # The last window is that of the block which is only taken in part.
        return [*parts[:-1], slice_tokens(parts[-1], 0, match.end.take)]

    def _whole(self, match: Match) -> Raw:
        """The states of a match, which its tail holds."""
        return _block(match.end).kv if self.resume.whole and match.end is not None else {}

    def _of(self, kv: Mapping[str, mx.array], kind: RecordKind | str) -> Raw:
        return {name: kv[name] for name in self.layout.dims("append" if kind == "append" else "window")}

    # -- to rest ------------------------------------------------------------------------------------------

    def seal(self, sequence: TokenChain, cache: list[Any], first: int, last: int) -> list[Block]:
        """Encode full blocks ``first`` up to ``last`` of a sequence from its live cache, evaluated."""
        sealed: list[Block] = []
        for index in range(first, last):
            start, stop = sequence.block_range(index)
            kv = self.codec.encode(self.layout.cut(cache, start, stop))
            tokens = tuple(sequence.token_ids[start:stop])
            sealed.append(Block(sequence.hashes[index], sequence.parent_of(index), tokens, nbytes(kv), kv))
        mx.eval([block.kv for block in sealed])
        return sealed

    def windows(self, sequence: TokenChain, cache: list[Any], indices: ReadOnly[int]) -> list[Block]:
        """What the window layers keep of full blocks that their live cache still holds, evaluated."""
        made: list[Block] = []
        for index in indices:
            kv = self._window_codec.encode(self.layout.cut_window(cache, *sequence.block_range(index)))
            parent = sequence.hashes[index]
            made.append(Block(record_hash("window", parent), parent, (), nbytes(kv), kv, "window"))
        mx.eval([block.kv for block in made])
        return made

    def tail(self, sequence: TokenChain, cache: list[Any], length: int, fed: int) -> Block | None:
        """Keep what follows the last full block of the first ``length`` tokens of a cache that was fed ``fed``.

        None where nothing follows. Where the cache has gone on too far to be cut back, only its token ids are kept.
        """
        full = length // self._block_tokens
        start = full * self._block_tokens
        tokens, parent = tuple(sequence.token_ids[start:length]), sequence.parent_of(full)
        if not self._restorable(cache, length, fed):
            return (
                Block(record_hash("token_tail", parent, tokens), parent, tokens, 0, {}, "token_tail")
                if tokens
                else None
            )
        if not tokens and not self.resume.whole:
            return None
        kv = self.layout.snapshot(cache)
        if tokens:
            kv |= self.layout.cut(cache, start, length) | self.layout.cut_window(cache, start, length)
        kv = {name: mx.contiguous(x) for name, x in kv.items()}
        mx.eval(kv)
        return Block(record_hash("tail", parent, tokens), parent, tokens, nbytes(kv), kv, "tail")

    def _restorable(self, cache: list[Any], length: int, fed: int) -> bool:
        if self.resume.unsupported or (self.resume.whole and fed != length):
            return False
        return not self.resume.window or self.layout.reaches(cache, length)

    # -- checks -------------------------------------------------------------------------------------------

    def fits(self, kv: Mapping[str, mx.array], tokens: int, kind: RecordKind) -> bool:
        """Whether loaded arrays have the names, shapes and dtypes of a record made here."""
        if kind == "block":
            return _shapes(kv) == self._block_shapes
        if kind == "window":
            return _shapes(kv) == self._window_shapes
        whole = {name: x for name, x in kv.items() if int(name.partition(".")[0]) >= len(self.layout.tokens)}
        rest = {name: x for name, x in kv.items() if name not in whole}
        wanted = self._empty("append", tokens) | self._empty("window", tokens) if tokens else {}
        return _shapes(rest) == _shapes(wanted) and self._fits_whole(whole)

    def _fits_whole(self, kv: Mapping[str, mx.array]) -> bool:
        for number, leaf in enumerate(self.layout.whole, len(self.layout.tokens)):
            if f"{number}.{SCALARS}" not in kv:
                return False
            found = {name: kv.get(f"{number}.{name}") for name in leaf.arrays}
            for name, (shape, dtype) in leaf.arrays.items() if leaf.fixed else ():
                x = found[name]
                if x is None or (tuple(x.shape), x.dtype) != (shape, dtype):
                    return False
        return True

    def _empty(self, kind: str, tokens: int) -> Raw:
        """Zeros in the shape of a raw part; never evaluated."""
        raw: Raw = {}
        for number, group in enumerate(self.layout.tokens):
            if group.kind == kind:
                raw |= _zeros(group, group.dims(number), tokens)
        return raw


def _zeros(group: TokenGroup, dims: Mapping[str, int], tokens: int) -> Raw:
    kept = min(tokens, group.reach or tokens)
    return {
        name: mx.zeros((len(group.leaves), group.heads, kept, dim), group.dtype) for name, dim in dims.items()
    }


def _shapes(kv: Encoded | Mapping[str, mx.array]) -> _Shapes:
    return {name: (tuple(x.shape), x.dtype) for name, x in kv.items()}


def _block(hit: Any) -> Block:
    assert hit is not None
    assert hit.block is not None
    block: Block = hit.block
    return block


def _size(shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    size = dtype.size
    for n in shape:
        size *= n
    return size
