"""Logits processors: what may be sampled next, as a mask over the logits of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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

    def begins_with(self, token_ids: Sequence[int]) -> bool:
        """Read tokens that stand before those that are still to come; say whether the grammar allows them."""
        return len(token_ids) == int(self._matcher.try_consume_tokens(list(token_ids)))

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


class CallMask(Protocol):
    """The logits processor of a sequence that may call tools: from a call's start delimiter to its end it is held."""

    held: int
    """Calls that were held."""
    saved: int
    """Those of them in which the model would have taken a token that the grammar forbids."""

    def accept(self, token: int, *, is_call: bool) -> None:
        """Take a token that was sampled; ``is_call`` says whether a delimiter at this place begins a call."""

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Mask the logits [1, vocab] that follow ``tokens``, the last of which may not be known yet."""

    def end(self) -> None:
        """The call has ended, or the answer inside it."""


class _HeldCalls:
    """What both ways of finding a call's start do once it has begun."""

    def __init__(self, new_mask: Callable[[int], Mask], prompt_tokens: int) -> None:
        self._new_mask = new_mask
        self._known = prompt_tokens
        self._mask: Mask | None = None
        self._differs: mx.array | None = None
        self.held = 0
        self.saved = 0

    def _hold(self, mask: Mask, tokens: mx.array, logits: mx.array) -> mx.array:
        allowed = mask.allowed(tokens, logits)
        if mask.is_complete:
            self.end()
            return logits
        forbidden = _likeliest_is_forbidden(logits, allowed)
        self._differs = forbidden if self._differs is None else mx.logical_or(self._differs, forbidden)
        mx.async_eval(self._differs)  # type: ignore[no-untyped-call]
        return mx.where(allowed, logits, -mx.inf)

    def end(self) -> None:
        """See `CallMask.end`."""
        if self._mask is not None:
            self.saved += bool(self._differs.item()) if self._differs is not None else False
        self._mask = self._differs = None


class TokenCallMask(_HeldCalls):
    """A `CallMask` where the start delimiter is one token.

    Text costs nothing. A batch is one step ahead of Python, which knows all tokens but the last. So whether that is the
    delimiter is decided in the graph, and the mask of what follows it was made beforehand. Only inside a call is each
    token waited for.
    """

    def __init__(self, start_id: int, new_mask: Callable[[int], Mask], prompt_tokens: int) -> None:
        """Hold calls that begin with the token ``start_id``; ``new_mask`` makes the mask of one, from a position on."""
        super().__init__(new_mask, prompt_tokens)
        self._start_id = start_id
        self._opening: mx.array | None = None
        self._asked = 0

    def accept(self, token: int, *, is_call: bool) -> None:
        """See `CallMask.accept`."""
        self._known += 1
        if self._mask is None and token == self._start_id and is_call:
            self._mask = self._new_mask(self._known)
            self.held += 1
            if self._asked != self._known:
                # What follows the delimiter has not been asked for yet.
                self._differs = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """See `CallMask.__call__`."""
        if self._mask is None:
            return self._free(tokens, logits)
        return self._hold(self._mask, tokens, logits)

    def _free(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._opening is None or self._opening.shape != logits.shape[-1:]:
            self._opening = self._new_mask(self._known).allowed(tokens[:0], logits)
        # Computed only if the last token turns out to be the delimiter.
        self._asked = tokens.shape[0]
        self._differs = _likeliest_is_forbidden(logits, self._opening)
        opens = tokens[-1] == self._start_id
        return mx.where(mx.logical_or(mx.logical_not(opens), self._opening), logits, -mx.inf)


class SpelledCallMask(_HeldCalls):
    """A `CallMask` where the start delimiter is spelled in several tokens.

    Where the text so far ends like the beginning of a delimiter, the last token is waited for; elsewhere text costs
    nothing.
    """

    def __init__(
        self,
        start: str,
        decode: Callable[[Sequence[int]], str],
        encode: Callable[[str], Sequence[int]],
        new_mask: Callable[[int], Mask],
        prompt_tokens: int,
    ) -> None:
        """Hold calls that begin with the text ``start``. The other arguments but the last are functions.

        Args:
            start: the start delimiter.
            decode: the text of ids that stand after others.
            encode: the ids of a text that stands after others.
            new_mask: makes the mask of one call, from a position on.
            prompt_tokens: the length of the prompt.
        """
        super().__init__(new_mask, prompt_tokens)
        self._start, self._decode, self._encode = start, decode, encode
        self._tail: list[int] = []

    def accept(self, token: int, *, is_call: bool) -> None:
        """See `CallMask.accept`."""
        self._known += 1
        # A token is at least one character long, or a part of one, of which delimiters have none.
        self._tail = [*self._tail, token][-len(self._start) :] if is_call and self._mask is None else []

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """See `CallMask.__call__`."""
        if self._mask is None:
            self._mask = self._begun(tokens)
        return logits if self._mask is None else self._hold(self._mask, tokens, logits)

    def _begun(self, tokens: mx.array) -> Mask | None:
        """The mask of the call that the last token begins, if it begins one."""
        known = self._decode(self._tail)
        if not any(known.endswith(self._start[:size]) for size in range(1, len(self._start) + 1)):
            return None
        new: list[int] = tokens[self._known :].tolist()  # type: ignore[assignment]
        last = [*self._tail, *new]
        before, text = self._decode(last[:-1]), self._decode(last)
        _, found, rest = text.rpartition(self._start)
        if not found or len(text) - len(rest) <= len(before):
            return None
        mask = self._new_mask(tokens.shape[0])
        if rest and not mask.begins_with(self._encode(rest)):
            return None
        self.held += 1
        return mask

    def end(self) -> None:
        """See `CallMask.end`."""
        super().end()
        self._tail = []


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
