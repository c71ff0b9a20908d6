"""From log-probabilities to a token: mlx-lm's filters, with a random key of one's own for every draw.

Explicit keys make a seeded answer the same at any batch size and in any thread, since MLX's implicit random
state is neither per request nor shared between threads.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, greedy_sampler, make_logits_processors

from agent_memory_core.config import SamplingParams
from agent_memory_core.structured.mask import LogitsProcessor

Sampler = Callable[[mx.array], mx.array]


class KeyedSampler:
    """Draws one token a call from log-probabilities [1, vocab], the n-th call with the n-th key of the seed."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self._params = params
        self._top_k = params.top_k if params.top_k < vocab_size else 0
        self._key = mx.random.key(params.seed if params.seed is not None else secrets.randbits(64))

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Return one token id as an array [1]."""
        params = self._params
        if params.top_p < 1:
            logprobs = apply_top_p(logprobs, params.top_p)
        if params.min_p > 0:
            logprobs = apply_min_p(logprobs, params.min_p)
        if self._top_k > 0:
            logprobs = apply_top_k(logprobs, self._top_k)
        self._key, key = mx.random.split(self._key)
        return mx.random.categorical(logprobs * (1 / params.temperature), key=key)


def make_sampler(params: SamplingParams, vocab_size: int) -> Sampler:
    """The sampler of one sequence. All greedy sequences share one, which lets a batch sample in one call."""
    return greedy_sampler if params.temperature == 0 else KeyedSampler(params, vocab_size)


def likeliest(logprobs: mx.array, token: int, count: int) -> list[tuple[int, float]]:
    """``token`` and then the ``count`` likeliest tokens, each with its value in ``logprobs`` [vocab].

    Tokens that a processor made impossible are left out.
    """
    count = min(count, logprobs.shape[-1])
    best = mx.argpartition(-logprobs, kth=count - 1)[:count] if count else mx.array([], dtype=mx.int32)
    ids = [token, *best.tolist()]  # type: ignore[misc]
    values: list[float] = logprobs[mx.array(ids)].astype(mx.float32).tolist()  # type: ignore[assignment]
    found = sorted(zip(ids[1:], values[1:], strict=True), key=lambda pair: (-pair[1], pair[0]))
    return [(token, values[0]), *(pair for pair in found if pair[1] > -math.inf)]


def make_processors(params: SamplingParams) -> list[LogitsProcessor]:
    """The logits processors of one sequence: the repetition penalty over its last 20 tokens, if any."""
    if params.repetition_penalty == 1:
        return []
    return list(make_logits_processors(repetition_penalty=params.repetition_penalty))
