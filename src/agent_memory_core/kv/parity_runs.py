"""Runs a model in two ways that should give the same logits, and measures by how much they differ.

A *gap* is the largest difference of two rows of logits in units of their standard deviation. ``models/parity.py`` says
which gaps are small enough; the runs themselves are here, because they need mlx-lm's caches.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache

from agent_memory_core.kv.decode_batch import BatchRow, DecodeBatch
from agent_memory_core.kv.layout import KvLayout, Segments


@dataclass(frozen=True, slots=True)
class Gap:
    """What one comparison found."""

    size: float
    """The gap; infinite if some logit is not a number."""
    dtype: mx.Dtype
    """Dtype of the logits, on which the size of rounding errors depends."""


def batched_gap(model: Any, rows: Sequence[list[int]], steps: int) -> Gap:
    """Decode ``steps`` tokens after each of several prompts, in a batch and each prompt alone.

    The median of a prompt's gaps counts, and the largest of these medians is returned: rounding may flip a single
    step, while a model that is wrong in a batch is wrong on most steps.
    """
    with mx.stream(generation_stream):
        caches = [make_prompt_cache(model) for _ in rows]
        firsts = [_likeliest(_logits(model, ids, cache)) for ids, cache in zip(rows, caches, strict=True)]
        answers = _decoded(model, rows, firsts, caches, steps)
        gaps = []
        for ids, first, answer in zip(rows, firsts, answers, strict=True):
            tokens = [first, *(response.token for response in answer)]
            alone = _logprobs_alone(model, ids, tokens[:-1])
            pairs = zip((response.logprobs for response in answer), alone, strict=True)
            gaps.append(statistics.median(gap_between(one, other) for one, other in pairs))
        return Gap(max(gaps), alone[0].dtype)


def resumed_gap(model: Any, layout: KvLayout, ids: list[int], block_tokens: int) -> Gap:
    """Feed ``ids`` block by block, each block also to a copy of the cache that is made as if from records.

    The largest gap between the two is returned.
    """
    live = make_prompt_cache(model)
    gaps: list[Gap] = []
    with mx.stream(generation_stream):
        _logits(model, ids[:block_tokens], live)
        for at in range(block_tokens, len(ids), block_tokens):
            copy = copied(layout, live, at, block_tokens)
            new = ids[at : at + block_tokens]
            original, resumed = _logits(model, new, live), _logits(model, new, copy)
            gaps.append(Gap(gap_between(original, resumed), original.dtype))
    return max(gaps, key=lambda gap: gap.size)


def copied(layout: KvLayout, live: list[Any], length: int, block_tokens: int) -> list[Any]:
    """A copy of a live cache of ``length`` tokens, made of what records would hold of it, without encoding."""
    spans = list(itertools.pairwise([*range(0, length, block_tokens), length]))
    start = max(0, length - layout.live_bytes.window)
    segments: Segments = {
        "block": [layout.cut(live, "block", *span) for span in spans],
        "window": [layout.cut(live, "window", max(start, a), b) for a, b in spans if b > start],
        "tail": [layout.cut(live, "tail", length, length)],
    }
    copy = layout.join(segments, length, block_tokens)
    mx.eval(layout.arrays(copy))
    return copy


def gap_between(one: mx.array, other: mx.array) -> float:
    """The gap of two rows of logits."""
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    gap: float = (mx.abs(one - other).max() / (mx.std(one) + 1e-9)).item()  # type: ignore[assignment]
    return float("inf") if math.isnan(gap) else gap


def _decoded(
    model: Any, rows: Sequence[list[int]], firsts: Sequence[int], caches: Sequence[list[Any]], steps: int
) -> list[list[Any]]:
    """What mlx-lm's batch answers for each row, step by step, after its prompt and first token."""
    batch = DecodeBatch(model)
    for uid, (row, first, cache) in enumerate(zip(rows, firsts, caches, strict=True)):
        batch.insert(BatchRow(uid, cache, [*row, first], steps))
    found: list[list[Any]] = [[] for _ in rows]
    for _ in range(steps):
        for response in batch.next():
            found[response.uid].append(response)
    return found


def _logprobs_alone(model: Any, prompt: list[int], tokens: list[int]) -> list[mx.array]:
    """The log-probabilities after each of ``tokens``, which are fed one by one after the prompt."""
    cache = make_prompt_cache(model)
    _logits(model, prompt, cache)
    found = []
    for token in tokens:
        logits = _logits(model, [token], cache)
        found.append((logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0])
    return found


def _logits(model: Any, ids: list[int], cache: list[Any]) -> mx.array:
    logits: mx.array = model(mx.array([ids]), cache=cache)[:, -1, :]
    mx.eval(logits)
    return logits


def _likeliest(logits: mx.array) -> int:
    token: int = mx.argmax(logits).item()  # type: ignore[assignment]
    return token
