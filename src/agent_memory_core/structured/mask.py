"""Logits processors: what may be sampled next, as a mask over the logits of one sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher

LogitsProcessor = Callable[[Any, mx.array], mx.array]
"""From the tokens so far [n] and the logits [1, vocab] that follow them to the logits that are sampled from."""


class Mask:
    """The logits processor of one constrained sequence: only tokens that its grammar allows stay possible."""

    def __init__(self, matcher: LLMatcher, prompt_tokens: int) -> None:
        self._matcher = matcher
        self._read = prompt_tokens

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Mask the logits [1, vocab] that follow ``tokens``: the prompt and what was generated."""
        # Reading the last token waits for it. The logits, which depend on it, are computed at the same time.
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        new: list[int] = tokens[self._read :].tolist()  # type: ignore[assignment]
        self._read += len(new)
        if new:
            # A batch is one step ahead. So it also asks what follows an EOS, where any answer will do.
            self._matcher.try_consume_tokens(new)
        # Only EOS is allowed once the grammar is complete, or llguidance has reached a limit of its own.
        words = mx.array(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32))
        return mx.where(_bits(words, logits.shape[-1]), logits, -mx.inf)


def _bits(words: mx.array, width: int) -> mx.array:
    """The bits of 32-bit words as booleans. What a model has beyond its tokenizer's vocabulary is off."""
    bits = ((words[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).reshape(-1).astype(mx.bool_)
    return mx.pad(bits[:width], (0, max(0, width - bits.shape[0])))


@dataclass(frozen=True, slots=True)
class Ban:
    """A logits processor that makes one token impossible. Unlike a mask, it does not wait for the last token."""

    token_id: int

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Mask the logits [1, vocab]."""
        return mx.where(mx.arange(logits.shape[-1]) == self.token_id, -mx.inf, logits)
