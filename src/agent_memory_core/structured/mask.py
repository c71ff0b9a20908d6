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

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow what was read."""
        return bool(self._matcher.is_stopped())

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Mask the logits [1, vocab] that follow ``tokens``: the prompt and what was generated."""
        allowed = self.allowed(tokens, logits)
        return mx.where(allowed, logits, -mx.inf)

    def allowed(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Which tokens may follow ``tokens``, as booleans [vocab]."""
        # Reading the last token waits for it. The logits, which depend on it, are computed at the same time.
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        new: list[int] = tokens[self._read :].tolist()  # type: ignore[assignment]
        self._read += len(new)
        if new:
            # A batch is one step ahead. So it also asks what follows an EOS, where any answer will do.
            self._matcher.try_consume_tokens(new)
        # Only EOS is allowed once the grammar is complete, or llguidance has reached a limit of its own.
        words = mx.array(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32))
        return _bits(words, logits.shape[-1])


class CallMask:
    """The logits processor of a sequence that may call tools: from a call's start delimiter to its end it is held.

    Text costs nothing. A batch is one step ahead of Python, which knows all tokens but the last. So whether that is the
    delimiter is decided in the graph, and the mask of what follows it was made beforehand. Only inside a call is each
    token waited for.
    """

    def __init__(self, start_id: int, new_mask: Callable[[int], Mask], prompt_tokens: int) -> None:
        """Hold calls that begin with the token ``start_id``; ``new_mask`` makes the mask of one, from a position on."""
        self._start_id = start_id
        self._new_mask = new_mask
        self._known = prompt_tokens
        self._mask: Mask | None = None
        self._opening: mx.array | None = None
        self._differs: mx.array | None = None
        self._asked = 0
        self.held = 0
        """Calls that were held."""
        self.saved = 0
        """Those of them in which the model would have taken a token that the grammar forbids."""

    def accept(self, token: int, *, is_call: bool) -> None:
        """Take a token that was sampled; ``is_call`` says whether a delimiter at this place begins a call."""
        self._known += 1
        if self._mask is None and token == self._start_id and is_call:
            self._mask = self._new_mask(self._known)
            self.held += 1
            if self._asked != self._known:
                # What follows the delimiter has not been asked for yet.
                self._differs = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Mask the logits [1, vocab] that follow ``tokens``, the last of which may not be known yet."""
        if self._mask is None:
            return self._free(tokens, logits)
        allowed = self._mask.allowed(tokens, logits)
        if self._mask.is_complete:
            self.end()
            return logits
        self._note(_likeliest_is_forbidden(logits, allowed))
        return mx.where(allowed, logits, -mx.inf)

    def _free(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._opening is None or self._opening.shape != logits.shape[-1:]:
            self._opening = self._new_mask(self._known).allowed(tokens[:0], logits)
        # Computed only if the last token turns out to be the delimiter.
        self._asked = tokens.shape[0]
        self._differs = _likeliest_is_forbidden(logits, self._opening)
        opens = tokens[-1] == self._start_id
        return mx.where(mx.logical_or(mx.logical_not(opens), self._opening), logits, -mx.inf)

    def _note(self, forbidden: mx.array) -> None:
        self._differs = forbidden if self._differs is None else mx.logical_or(self._differs, forbidden)
        mx.async_eval(self._differs)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """The call has ended, or the answer inside it."""
        if self._mask is not None:
            self.saved += bool(self._differs.item()) if self._differs is not None else False
        self._mask = self._differs = None


def _likeliest_is_forbidden(logits: mx.array, allowed: mx.array) -> mx.array:
    return mx.logical_not(allowed[mx.argmax(logits[0])])


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
