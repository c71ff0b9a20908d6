"""Runs a model in two ways that should give the same logits, and measures by how much they differ.

A *gap* is the root mean square of the difference between two rows of logits, in units of their standard deviation. It
does not grow with the size of the vocabulary, as the largest difference does. A *floor* is the gap that rounding alone
makes: it is measured in the same run, between two ways that differ in nothing but the order of their additions.
``models/parity.py`` decides which gaps are small enough; the runs are here because they need mlx-lm's caches.

All logits are compared as float32 numbers, as the model gives them: log-probabilities in bfloat16 would be rounded once
more.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache

from agent_memory_core.kv.decode_batch import BatchRow, DecodeBatch, Sampler
from agent_memory_core.kv.joint_prefill import prefill_together
from agent_memory_core.kv.layout import KvLayout, Segments

COPIES = 3
"""Rows of the batch that a floor is measured in, all of them equal."""
CLEARLY = 1.0
"""By how many standard deviations the likeliest token must lead before it counts when another one takes its place."""
PIECES = 5
"""In how many pieces a block is fed for the floor; the logits at the end of each piece are compared."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How far two runs lie apart."""

    size: float
    """The root mean square of the difference, in standard deviations; infinite if some logit is not a number."""
    other_token: bool = False
    """Whether another token is the likeliest although the first one led clearly."""

    @classmethod
    def typical(cls, gaps: Sequence[Gap]) -> Gap:
        """The median. Rounding may change a single step a lot, while a fault changes most steps."""
        changed = sum(gap.other_token for gap in gaps)
        return cls(statistics.median(gap.size for gap in gaps), 2 * changed > len(gaps))

    @classmethod
    def largest(cls, gaps: Iterable[Gap]) -> Gap:
        """The worst of several."""
        found = list(gaps)
        return cls(max(gap.size for gap in found), any(gap.other_token for gap in found))


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one comparison of two runs found."""

    gap: Gap
    """Between the two runs."""
    floor: Gap
    """Between two runs that only rounding tells apart."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt, decoded alone."""

    prompt: list[int]
    """Its token ids."""
    cache: list[Any]
    """A live cache of the prompt; whoever feeds it copies it first."""
    tokens: list[int]
    """The tokens that are fed after the prompt, one by one."""
    logits: list[mx.array]
    """The logits [vocab] after each of them, as float32."""
    first: mx.array
    """The logits [vocab] after the prompt, as float32."""


def batched_gap(model: Any, prompts: Sequence[list[int]], steps: int, *, together: bool) -> Comparison:
    """Decode ``steps`` tokens after each of several prompts: all in one batch, and each of them alone.

    With ``together`` the prompts of the batch are evaluated in one pass, too.

    The floor is the gap of a batch of equal rows, which needs no padding and no mask. Of a row's gaps the median
    counts, and the largest of these medians is returned.
    """
    with mx.stream(generation_stream):
        rows = [_alone(model, prompt, steps) for prompt in prompts]
        return Comparison(
            gap=_batch_gap(model, rows, together),
            floor=Gap.largest(_batch_gap(model, [row] * COPIES, together) for row in rows),
        )


def resumed_gap(model: Any, layout: KvLayout, ids: list[int], block_tokens: int) -> Comparison:
    """Feed ``ids`` block by block, each block also to a copy of the cache that is made as if from records.

    The floor is the gap between a block that is fed at once and the same block fed in pieces. At each boundary the
    median over several places of the block counts, and the largest of these medians is returned.
    """
    live = make_prompt_cache(model)
    gaps: list[Gap] = []
    floors: list[Gap] = []
    with mx.stream(generation_stream):
        _last_logits(model, ids[:block_tokens], live)
        for at in range(block_tokens, len(ids), block_tokens):
            block = ids[at : at + block_tokens]
            resumed = _logits_in_block(model, block, copied(layout, live, at, block_tokens))
            again = copy.deepcopy(live)
            pieces = [_last_logits(model, piece, again) for piece in _pieces(block)]
            original = _logits_in_block(model, block, live)
            gaps.append(_typical_gap(original, resumed))
            floors.append(_typical_gap(original, pieces))
    return Comparison(Gap.largest(gaps), Gap.largest(floors))


def copied(layout: KvLayout, live: list[Any], length: int, block_tokens: int) -> list[Any]:
    """A copy of a live cache of ``length`` tokens, made of what records would hold of it, without encoding."""
    spans = list(itertools.pairwise([*range(0, length, block_tokens), length]))
    start = max(0, length - layout.live_bytes.window)
    segments: Segments = {
        "block": [layout.cut(live, "block", *span) for span in spans],
        "window": [layout.cut(live, "window", max(start, a), b) for a, b in spans if b > start],
        "tail": [layout.cut(live, "tail", length, length)],
    }
    cache = layout.join(segments, length, block_tokens)
    mx.eval(layout.arrays(cache))
    return cache


def gap_between(one: mx.array, other: mx.array) -> Gap:
    """The gap of two rows of logits [vocab]."""
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    spread = mx.std(one) + 1e-9
    size: float = (mx.sqrt(mx.mean(mx.square(one - other))) / spread).item()  # type: ignore[assignment]
    if math.isnan(size):
        return Gap(math.inf)
    best = mx.argmax(one)
    # How far the token that is the likeliest in the other row lies below the likeliest one here.
    lead: float = ((one[best] - one[mx.argmax(other)]) / spread).item()  # type: ignore[assignment]
    return Gap(size, lead > CLEARLY)


def coarsest_dtype(model: Any) -> mx.Dtype:
    """The least exact floating-point dtype among a model's weights, which decides how large rounding errors are."""
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    found = {weight.dtype for _, weight in weights}
    return next((dtype for dtype in (mx.bfloat16, mx.float16) if dtype in found), mx.float32)


def _alone(model: Any, prompt: list[int], steps: int) -> _Row:
    """Decode greedily after a prompt."""
    cache = make_prompt_cache(model)
    logits = [_last_logits(model, prompt, cache)]
    row = _Row(prompt, copy.deepcopy(cache), [], [], logits[0])
    for _ in range(steps):
        token: int = mx.argmax(logits[-1]).item()  # type: ignore[assignment]
        row.tokens.append(token)
        row.logits.append(_last_logits(model, [token], cache))
        logits = row.logits
    return row


def _batch_gap(model: Any, rows: Sequence[_Row], together: bool) -> Gap:
    """The gap between rows that are decoded in one batch and the same rows alone."""
    batch = DecodeBatch(model)
    found: list[list[mx.array]] = [[] for _ in rows]
    first: list[Gap] = []
    caches = [row.cache for row in rows]
    if together:
        prompts = [row.prompt for row in rows]
        ends, caches = prefill_together(model, [make_prompt_cache(model) for _ in rows], prompts)
        first = [gap_between(row.first, end) for row, end in zip(rows, ends, strict=True)]
    for uid, (row, cache, logits) in enumerate(zip(rows, caches, found, strict=True)):
        tokens = [*row.prompt, row.tokens[0]]
        sampler, recorder = _forced(row.tokens), _recorder(logits)
        batch.insert(BatchRow(uid, copy.deepcopy(cache), tokens, len(row.tokens), sampler, [recorder]))
    for _ in rows[0].tokens:
        batch.next()
    decoded = [_typical_gap(row.logits, logits) for row, logits in zip(rows, found, strict=True)]
    return Gap.largest([*first, *decoded])


def _forced(tokens: list[int]) -> Sampler:
    """A sampler that gives the tokens after the first one, one after the other, and then the last one for ever."""
    left = itertools.chain(tokens[1:], itertools.repeat(tokens[-1]))
    return lambda logprobs: mx.array([next(left)], mx.uint32)


def _recorder(found: list[mx.array]) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor that changes nothing and keeps the logits of every step."""

    def keep(tokens: mx.array, logits: mx.array) -> mx.array:
        found.append(logits[0].astype(mx.float32))
        return logits

    return keep


def _typical_gap(ones: Sequence[mx.array], others: Sequence[mx.array]) -> Gap:
    """The typical gap of two runs; the second may have gone on for longer."""
    return Gap.typical([gap_between(one, other) for one, other in zip(ones, others, strict=False)])


def _pieces(block: list[int]) -> list[list[int]]:
    """A block in pieces of about equal length, none of them empty."""
    ends = _ends(len(block))
    return [block[start:stop] for start, stop in itertools.pairwise([0, *ends])]


def _ends(length: int) -> list[int]:
    """Where the pieces of a block end."""
    return [piece * length // PIECES for piece in range(1, PIECES + 1)]


def _last_logits(model: Any, ids: list[int], cache: list[Any]) -> mx.array:
    """The logits [vocab] after the last of some tokens, as float32."""
    return _logits(model, ids, cache, [len(ids)])[0]


def _logits_in_block(model: Any, ids: list[int], cache: list[Any]) -> list[mx.array]:
    """The logits [vocab] at the end of each piece of a block that is fed at once, as float32."""
    return _logits(model, ids, cache, _ends(len(ids)))


def _logits(model: Any, ids: list[int], cache: list[Any], ends: Sequence[int]) -> list[mx.array]:
    logits = model(mx.array([ids]), cache=cache)
    found = [logits[0, end - 1].astype(mx.float32) for end in ends]
    mx.eval(found)
    return found
