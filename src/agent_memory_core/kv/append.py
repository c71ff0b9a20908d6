"""The kind "append": mlx-lm's KVCache, which keeps a key and a value of every token in token order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from agent_memory_core.blocks.resume_policy import EveryToken, ResumeRequirement
from agent_memory_core.kv.codec import Segment
from agent_memory_core.kv.layer_kind import Joining, Leaf, LiveBytes, SettledLayers, TokenShape
from agent_memory_core.kv.token_layers import TokenLayers, token_shape

GROWTH = 256
"""mlx-lm's KVCache grows by this many tokens; buffers that are made here end on the same step."""


def round_up(tokens: int, step: int = GROWTH) -> int:
    """The least multiple of ``step`` that is not less than ``tokens``."""
    return -(-tokens // step) * step


@dataclass(frozen=True, slots=True)
class AppendLayers(TokenLayers, SettledLayers):
    """Leaves that keep every token: any range of tokens can be cut out and put back."""

    kind = "append"
    layer_type = "global"
    home = "block"
    may_pad = True

    @classmethod
    def key_of(cls, leaf: Leaf) -> TokenShape | None:
        """A subclass of KVCache is not accepted, since it may keep its tokens in another order."""
        return token_shape(leaf.cache) if type(leaf.cache) is KVCache else None

    @property
    def requirement(self) -> ResumeRequirement:
        """All tokens, from block records and tails."""
        return EveryToken()

    @property
    def live_bytes(self) -> LiveBytes:
        """Every token adds to them."""
        return LiveBytes(per_token=self.nbytes)

    def holds(self, caches: Sequence[Any], position: int, fed: int) -> bool:
        """No token is ever lost."""
        return True

    def tokens(self, cache: Any, x: mx.array, start: int, stop: int) -> mx.array:
        """Tokens lie in their order, from the first on."""
        return x[0, :, start:stop]

    def join(self, caches: Sequence[Any], segments: Sequence[Segment], length: int, room: int) -> None:
        """Give each leaf a buffer of its own: views into a shared one would all be copied at the first write."""
        joining = self.joining(caches, length, room)
        for segment in segments:
            joining.add(segment)
        joining.finish()

    def joining(self, caches: Sequence[Any], length: int, room: int) -> Joining:
        """Each segment is written into the buffers at once, and can be freed then."""
        capacity = round_up(length + room)
        buffers = {name: [self._zeros(capacity, dim) for _ in caches] for name, dim in self.dims().items()}
        return _Filling(self, caches, length, buffers)

    def _zeros(self, tokens: int, dim: int) -> mx.array:
        return mx.zeros((1, self.token.heads, tokens, dim), self.token.dtype)

    def settle(
        self, caches: Sequence[Any], segments: Sequence[Segment], start: int, length: int, room: int
    ) -> None:
        """Attention reads the first tokens of a buffer, wherever these came from.

        Leaf by leaf is evaluated, so that no more than one of them is there twice.
        """
        capacity = round_up(length + room)
        for row, cache in enumerate(caches):
            live = {"k": cache.keys, "v": cache.values}
            arrays = {
                name: _settled(
                    live[name], [s[name][row : row + 1] for s in segments], start, length, capacity
                )
                for name in self.dims()
            }
            self.fill(cache, arrays)
            cache.offset = length
            mx.eval(cache.keys, cache.values)


@dataclass(slots=True)
class _Filling:
    """Buffers that are filled from the first token on."""

    group: AppendLayers
    caches: Sequence[Any]
    length: int
    buffers: dict[str, list[mx.array]]
    at: int = 0

    def add(self, segment: Segment) -> None:
        stop = self.at + next(iter(segment.values())).shape[2]
        mx.async_eval(*segment.values())  # type: ignore[no-untyped-call]
        # MLX writes into a buffer only if what was written before is done, and else into a copy of all of it.
        mx.eval(*self.buffers.values())
        for name, rows in self.buffers.items():
            for row, buffer in enumerate(rows):
                buffer[:, :, self.at : stop] = segment[name][row : row + 1]
        self.at = stop
        mx.async_eval(*self.buffers.values())  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        assert self.at == self.length, f"there is KV of {self.at} tokens, not of {self.length}"
        for row, cache in enumerate(self.caches):
            self.group.fill(cache, {name: rows[row] for name, rows in self.buffers.items()})
            cache.offset = self.length


def _settled(live: mx.array, stored: Sequence[mx.array], start: int, length: int, capacity: int) -> mx.array:
    """A new buffer [1, heads, capacity, dim] of ``live``, in which ``stored`` has its place from ``start`` on."""
    stop = start + sum(piece.shape[2] for piece in stored)
    zeros = mx.zeros((*live.shape[:2], capacity - length, live.shape[3]), live.dtype)
    return mx.concatenate([live[:, :, :start], *stored, live[:, :, stop:length], zeros], axis=2)
