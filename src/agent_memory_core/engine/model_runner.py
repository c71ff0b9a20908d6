"""The model at work: evaluate a chunk of a prompt, sample its first token, decode many sequences together.

Prefill runs one chunk at a time on the sequence's own cache, or the ends of several short prompts together where all
layers keep every token: padding on the right, which that takes, silently corrupts recurrent layers. A row that
decodes joins a `DecodeBatch` with a cache that is filled already and a first token that is sampled already. Rows of
very different lengths decode in separate groups, because a batch pads every row to the length of its longest. Where a
batch gives other logits than a row by itself, or where mlx-lm cannot batch the model's caches, every row decodes by
itself.

Either way the model is one step ahead: it computes the next token while the last one is handed out.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream

from agent_memory_core.config import SamplingParams
from agent_memory_core.engine.sampling import (
    Sampler,
    likeliest,
    make_processors,
    make_sampler,
)
from agent_memory_core.kv.decode_batch import BatchRow, DecodeBatch
from agent_memory_core.kv.joint_prefill import prefill_together
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.structured.mask import LogitsProcessor

PADDING_FLOOR = 512
"""Rows up to this many tokens long always share a group: padding them costs little."""


@dataclass(slots=True, eq=False)
class DecodeSlot:
    """One sequence on the model."""

    seq_id: int
    """The turn's number in the engine."""
    sampling: SamplingParams
    """How its tokens are chosen."""
    sampler: Sampler
    """Chooses them."""
    processors: list[LogitsProcessor]
    """Change its logits before a token is chosen."""
    cache: list[Any]
    """Its live cache; empty while it is in a group."""
    fed: int = 0
    """Tokens that the cache covers; in a group this is brought up to date when the row leaves."""
    group: _Group | None = None
    """The rows it decodes with."""
    alone: _Alone | None = None
    """Where it stands if it decodes by itself."""
    logprobs: list[tuple[int, float]] = field(default_factory=list)
    """Of the token sampled last and the likeliest in its place, if its request asked for them."""

    def sampled(self, token: int, logprobs: mx.array) -> None:
        """Keep what is wanted of the distribution [vocab] that ``token`` was drawn from."""
        if self.sampling.reports_logprobs:
            self.logprobs = likeliest(logprobs, token, self.sampling.top_logprobs)


@dataclass(frozen=True, slots=True)
class Step:
    """What one decode step gave one row: ``token`` now has KV. ``cache`` is set when the row has ended."""

    slot: DecodeSlot
    token: int
    finish_reason: str | None
    cache: list[Any] | None
    logprobs: ReadOnly[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Sampled:
    """A token that the model may still be computing."""

    token: mx.array
    """Its id [1]."""
    logprobs: mx.array
    """The log-probabilities [vocab] that it was sampled from."""


@dataclass(slots=True, eq=False)
class _Alone:
    """A row that decodes by itself."""

    tokens: list[int]
    """Its tokens so far."""
    left: int
    """How many more it may get."""
    next: _Sampled | None = None
    """The token after these; None before the first step."""


@dataclass(slots=True, eq=False)
class _Group:
    """Rows that share a batch and have about the same length."""

    batch: DecodeBatch
    """The rows at work, each under the number of its turn."""
    rows: dict[int, DecodeSlot] = field(default_factory=dict)
    """The rows by the number of their turn."""
    shortest: int = 0
    """Tokens of the shortest row when it joined."""
    longest: int = 0
    """Tokens of the longest row when it joined."""

    def admits(self, length: int) -> bool:
        """Whether padding stays below half of what the longest row needs."""
        longest = max(self.longest, length)
        return longest <= PADDING_FLOOR or 2 * min(self.shortest, length) >= longest


class ModelRunner:
    """Runs one model for one engine."""

    def __init__(
        self,
        model: Any,
        layout: KvLayout,
        eos_token_ids: ReadOnly[int],
    ) -> None:
        self._model = model
        self._layout = layout
        self._eos = frozenset(eos_token_ids)
        self._groups: list[_Group] = []
        self._alone: list[DecodeSlot] = []
        self.batches: bool | None = None if layout.batches else False
        """Whether rows may share a batch; None until somebody has found out, see `must_decide`."""
        self.vocab_size = 0

    def must_decide(self, length: int) -> bool:
        """Whether a row of ``length`` tokens would be the first to share a batch, so that ``batches`` has to be set."""
        return self.batches is None and any(group.admits(length) for group in self._groups)

    def slot(
        self,
        seq_id: int,
        sampling: SamplingParams,
        cache: list[Any],
        fed: int = 0,
        processors: ReadOnly[LogitsProcessor] = (),
    ) -> DecodeSlot:
        """A new sequence whose live cache holds ``fed`` tokens; ``processors`` have the last word on its logits."""
        sampler = make_sampler(sampling, self.vocab_size or 2**31)
        return DecodeSlot(seq_id, sampling, sampler, [*make_processors(sampling), *processors], cache, fed)

    def prefill(self, row: DecodeSlot, token_ids: ReadOnly[int], *, logits: bool) -> mx.array | None:
        """Evaluate prompt tokens on the row's cache; return the logits [1, vocab] after the last one if asked.

        Without ``logits`` the output head is never computed.
        """
        with mx.stream(generation_stream):
            output = self._model(mx.array([list(token_ids)]), cache=row.cache)
            last = output[:, -1, :] if logits else None
            mx.eval(self._layout.arrays(row.cache), [] if last is None else last)
        row.fed += len(token_ids)
        if last is not None:
            self.vocab_size = last.shape[-1]
        return last

    @property
    def may_prefill_together(self) -> bool:
        """Whether several prompts may be evaluated in one pass, once rows may share a batch."""
        return self.batches is not False and self._layout.may_pad

    def prefill_together(self, work: ReadOnly[tuple[DecodeSlot, ReadOnly[int]]]) -> list[mx.array]:
        """Evaluate two or more prompt tokens on the cache of each row; return the logits [1, vocab] after the last."""
        assert self.batches
        with mx.stream(generation_stream):
            logits, caches = prefill_together(
                self._model, [row.cache for row, _ in work], [ids for _, ids in work]
            )
            mx.eval(logits, [self._layout.arrays(cache) for cache in caches])
        for (row, ids), cache in zip(work, caches, strict=True):
            row.cache = cache
            row.fed += len(ids)
        self.vocab_size = logits.shape[-1]
        return [logits[row : row + 1] for row in range(len(work))]

    def sample(self, row: DecodeSlot, logits: mx.array, token_ids: ReadOnly[int]) -> int:
        """Sample the first token of a row from the logits of its prompt ``token_ids``."""
        with mx.stream(generation_stream):
            context = mx.array(list(token_ids)) if row.processors else None
            sampled = _sampled(row, logits, context)
            token: int = sampled.token.item()  # type: ignore[assignment]
            row.sampled(token, sampled.logprobs)
            return token

    def join(self, row: DecodeSlot, token_ids: ReadOnly[int], max_tokens: int) -> None:
        """Let a row decode: ``token_ids`` are its prompt and its first token."""
        length = len(token_ids)
        assert not self.must_decide(length)
        group = next((g for g in self._groups if g.admits(length)), None)
        if self.batches is False:
            row.alone = _Alone(list(token_ids), max_tokens)
            self._alone.append(row)
            return
        if group is None:
            group = _Group(DecodeBatch(self._model, sorted(self._eos)), shortest=length)
            self._groups.append(group)
        group.shortest, group.longest = min(group.shortest, length), max(group.longest, length)
        group.batch.insert(
            BatchRow(row.seq_id, row.cache, token_ids, max_tokens, row.sampler, row.processors)
        )
        row.group, row.cache = group, []
        group.rows[row.seq_id] = row

    def decode(self) -> list[Step]:
        """One decode step for every row."""
        steps = [self._step(group, response) for group in self._groups for response in group.batch.next()]
        self._groups = [group for group in self._groups if group.rows]
        return steps + [self._step_alone(row) for row in list(self._alone)]

    def rows(self) -> list[DecodeSlot]:
        """The rows that decode."""
        return [*self._alone, *(row for group in self._groups for row in group.rows.values())]

    def settle(self) -> None:
        """Wait for the steps that the model has begun ahead, so that what they lack is not blamed on what follows."""
        if self._groups or self._alone:
            mx.synchronize(generation_stream)

    def _step_alone(self, row: DecodeSlot) -> Step:
        """What a group does for its rows: feed the next token, and hand it out while the model computes on."""
        alone = row.alone
        assert alone is not None
        with mx.stream(generation_stream):
            sampled = alone.next or self._feed(row, mx.array(alone.tokens[-1:]))
            alone.left -= 1
            if alone.left:
                alone.next = self._feed(row, sampled.token)
            else:
                self._feed_last(row, sampled.token)
            token: int = sampled.token.item()  # type: ignore[assignment]
        alone.tokens.append(token)
        row.sampled(token, sampled.logprobs)
        reason = "stop" if token in self._eos else "length" if alone.left <= 0 else None
        if reason is None:
            return Step(row, token, None, None, row.logprobs)
        self._alone.remove(row)
        return Step(row, token, reason, row.cache, row.logprobs)

    def _feed(self, row: DecodeSlot, token: mx.array) -> _Sampled:
        """Let the model begin with the token [1] that follows those of a row that decodes by itself."""
        assert row.alone is not None
        logits = self._model(token[None], cache=row.cache)[:, -1, :]
        row.fed += 1
        context = None
        if row.processors:
            # Before the first step the row's tokens end with the one that is fed.
            known = row.alone.tokens[: row.fed - 1]
            context = mx.concatenate([mx.array(known), token.astype(mx.int32)])
        sampled = _sampled(row, logits, context)
        mx.async_eval(sampled.token, sampled.logprobs, self._layout.arrays(row.cache))  # type: ignore[no-untyped-call]
        return sampled

    def _feed_last(self, row: DecodeSlot, token: mx.array) -> None:
        """Feed the last token of a row, after which nothing is sampled: the output head is not computed."""
        self._model(token[None], cache=row.cache)
        row.fed += 1
        mx.async_eval(self._layout.arrays(row.cache))  # type: ignore[no-untyped-call]

    def peek(self, row: DecodeSlot) -> list[Any]:
        """The live cache of a row as it is now. What a group gives out is lazy: only what is used of it is copied."""
        if row.group is None:
            return row.cache
        return row.group.batch.peek(row.seq_id)

    def stop(self, row: DecodeSlot) -> list[Any]:
        """Take a row out of its batch and return its live cache, which covers every token it was fed."""
        if row in self._alone:
            self._alone.remove(row)
        if row.group is None:
            return row.cache
        row.cache, row.fed = row.group.batch.remove(row.seq_id)
        self._forget(row)
        return row.cache

    def drop(self, rows: ReadOnly[DecodeSlot]) -> None:
        """Forget rows whose state on the model is lost."""
        self._alone = [row for row in self._alone if row not in rows]
        # A batch that failed as a whole is not asked for its rows: it may be in the middle of a step.
        self._groups = [
            group for group in self._groups if not all(row in rows for row in group.rows.values())
        ]
        for row in rows:
            if row.group in self._groups:
                self.stop(row)

    def close(self) -> None:
        """Forget every row."""
        self._groups.clear()
        self._alone.clear()

    def _step(self, group: _Group, response: Any) -> Step:
        row = group.rows[response.uid]
        row.sampled(response.token, response.logprobs)
        if response.finish_reason is not None:
            self._forget(row)
            row.cache = response.prompt_cache
            row.fed = len(response.all_tokens)
        return Step(row, response.token, response.finish_reason, response.prompt_cache, row.logprobs)

    def _forget(self, row: DecodeSlot) -> None:
        """Take a row that has left its batch off the group's list."""
        assert row.group is not None
        del row.group.rows[row.seq_id]
        self._groups = [group for group in self._groups if group.rows]
        row.group = None


def _sampled(row: DecodeSlot, logits: mx.array, context: mx.array | None) -> _Sampled:
    """The token that a row takes from logits [1, vocab], not computed yet; its processors are told ``context``."""
    for processor in row.processors:
        logits = processor(context, logits)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return _Sampled(row.sampler(logprobs), logprobs[0])
