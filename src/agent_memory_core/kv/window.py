"""The kind "window": mlx-lm's RotatingKVCache, which keeps a key and a value of the last tokens only.

A window of n tokens covers the token that is being evaluated and the n - 1 before it, which are its *reach*. Older
tokens are overwritten or no longer used. Once the cache is full, its tokens are no longer in token order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from agent_memory_core.blocks.resume_policy import LastTokens, ResumeRequirement
from agent_memory_core.kv.codec import Segment
from agent_memory_core.kv.layer_kind import Leaf, LiveBytes, TokenShape
from agent_memory_core.kv.token_layers import TokenLayers, token_shape


@dataclass(frozen=True, slots=True)
class WindowLayers(TokenLayers):
    """Leaves that keep a window of one length. A segment holds the last tokens of its range, at most the reach."""

    kind = "window"
    layer_type = "sliding_window"
    home = "window"

    @classmethod
    def key_of(cls, leaf: Leaf) -> TokenShape | None:
        """A cache that keeps its first tokens for ever (``keep``) is not accepted: its window is not one range."""
        cache = leaf.cache
        return (
            token_shape(cache, cache.max_size) if type(cache) is RotatingKVCache and not cache.keep else None
        )

    @property
    def reach(self) -> int:
        """How many tokens before the next one it still uses."""
        assert self.token.window is not None
        return self.token.window - 1

    @property
    def requirement(self) -> ResumeRequirement:
        """The tokens of the window, from window records and tails."""
        return LastTokens(self.reach)

    @property
    def live_bytes(self) -> LiveBytes:
        """They stop growing when the window is full."""
        return LiveBytes(per_window_token=self.nbytes, window=self.reach)

    def empty(self, tokens: int) -> Segment:
        """Zeros in the shapes of as many of the tokens as the window covers."""
        return TokenLayers.empty(self, min(tokens, self.reach or tokens))

    def holds(self, caches: Sequence[Any], position: int, fed: int) -> bool:
        """Whether no token of the window before ``position`` is lost yet."""
        return all(_first_token(cache) <= max(0, position - self.reach) for cache in caches)

    def cut(self, caches: Sequence[Any], start: int, stop: int) -> Segment:
        """Copy the keys and values of the last tokens of [start, stop)."""
        return TokenLayers.cut(self, caches, max(start, stop - self.reach), stop)

    def tokens(self, cache: Any, x: mx.array, start: int, stop: int) -> mx.array:
        """Brings the tokens that are left into token order first."""
        first = _first_token(cache)
        assert first <= start, f"tokens from {start} on are needed, but those before {first} are lost"
        ordered: mx.array = cache._temporal_order(x)
        return ordered[0, :, start - first : stop - first]

    def join(self, caches: Sequence[Any], segments: Sequence[Segment], length: int, room: int) -> None:
        """Give each leaf the last tokens of all segments."""
        kept = min(length, self.reach)
        for row, cache in enumerate(caches):
            arrays = {name: _window([s[name] for s in segments], row, kept, length) for name in self.dims()}
            self.fill(cache, arrays)
            cache.offset, cache._idx = length, cache.keys.shape[2]


def _first_token(cache: Any) -> int:
    """The position of the oldest token that a cache still holds."""
    held = cache._idx if cache._idx >= cache.offset else cache.keys.shape[2]
    return int(cache.offset - held)


def _window(pieces: Sequence[mx.array], row: int, kept: int, length: int) -> mx.array:
    """One leaf's window [1, heads, tokens, dim]: the last ``kept`` tokens of its row of all pieces.

    A window that is full begins with the token that the next one will replace: here, zeros.
    """
    joined = mx.concatenate([piece[row : row + 1] for piece in pieces], axis=2)
    assert joined.shape[2] >= kept, f"{kept - joined.shape[2]} tokens of a window have no KV"
    joined = joined[:, :, joined.shape[2] - kept :]
    return mx.pad(joined, [(0, 0), (0, 0), (min(1, length - kept), 0), (0, 0)])
