"""The model at work: evaluate a chunk of a prompt, sample its first token, decode many sequences together.

Prefill runs one sequence and one chunk at a time on the sequence's own cache: batching prompts of unlike
length pads them on the right, which silently corrupts recurrent layers. Decoding is mlx-lm's BatchGenerator,
joined with a cache already filled and the first token already sampled. Rows of unlike length decode in
separate groups, since a batch pads every row to its longest. Where a batch gives other logits than one row alone,
or where mlx-lm cannot batch the model's caches, every row decodes by itself.

Everything here runs on the engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generation_stream

from agent_memory_core.config import SamplingParams
from agent_memory_core.engine.sampling import (
    Sampler,
    likeliest,
    make_processors,
    make_sampler,
)
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.structured.mask import LogitsProcessor

PADDING_FLOOR = 512
"""Rows up to this many tokens long always share a group: padding them costs little."""


@dataclass(slots=True, eq=False)
class DecodeSlot:
    """One sequence on the model: its live cache while it prefills or waits, then its place in a group.

    ``fed`` counts the tokens that the cache covers; in a group it is brought up to date when the row leaves.
    """

    seq_id: int
    sampling: SamplingParams
    sampler: Sampler
    processors: list[LogitsProcessor]
    cache: list[Any]
    fed: int = 0
    group: _Group | None = None
    uid: int = -1
    alone: _Alone | None = None
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


@dataclass(slots=True, eq=False)
class _Alone:
    """A row that decodes by itself: its tokens so far, how many it may still get, and the next if that is known."""

    tokens: list[int]
    left: int
    next: int | None = None


@dataclass(slots=True, eq=False)
class _Group:
    """Rows that share one BatchGenerator, and about the same length."""

    generator: BatchGenerator
    rows: dict[int, DecodeSlot] = field(default_factory=dict)
    shortest: int = 0
    longest: int = 0

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
        max_batch_size: int,
    ) -> None:
        self._model = model
        self._layout = layout
        self._eos = [[token] for token in sorted(eos_token_ids)]
        self._eos_ids = frozenset(eos_token_ids)
        self._max_batch_size = max_batch_size
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

    def sample(self, row: DecodeSlot, logits: mx.array, token_ids: ReadOnly[int]) -> int:
        """Sample the first token of a row from the logits of its prompt ``token_ids``."""
        with mx.stream(generation_stream):
            for processor in row.processors:
                logits = processor(mx.array(list(token_ids)), logits)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            token: int = row.sampler(logprobs).item()  # type: ignore[assignment]
            row.sampled(token, logprobs[0])
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
            group = _Group(self._new_generator(), shortest=length)
            self._groups.append(group)
        group.shortest, group.longest = min(group.shortest, length), max(group.longest, length)
        (row.uid,) = group.generator.insert(
            [[token_ids[-1]]],
            max_tokens=[max_tokens],
            caches=[row.cache],
            all_tokens=[list(token_ids[:-1])],
            samplers=[row.sampler],
            logits_processors=[row.processors],
        )
        row.group, row.cache = group, []
        group.rows[row.uid] = row

    def decode(self) -> list[Step]:
        """One decode step for every row."""
        steps: list[Step] = []
        for group in self._groups:
            _, responses = group.generator.next()
            if not responses and group.rows:
                # The call that takes new rows in answers for the rows it already had.
                _, responses = group.generator.next()
            steps.extend(self._step(group, response) for response in responses)
        self._groups = [group for group in self._groups if group.rows]
        return steps + [self._step_alone(row) for row in list(self._alone)]

    def _step_alone(self, row: DecodeSlot) -> Step:
        """What a group does for its rows: give out the next token, fed."""
        alone = row.alone
        assert alone is not None
        token = self._feed(row) if alone.next is None else alone.next
        logprobs = row.logprobs
        alone.tokens.append(token)
        alone.left -= 1
        reason = "stop" if token in self._eos_ids else "length" if alone.left <= 0 else None
        if reason is None:
            alone.next = self._feed(row)
            return Step(row, token, None, None, logprobs)
        self.prefill(row, [token], logits=False)
        self._alone.remove(row)
        return Step(row, token, reason, row.cache, logprobs)

    def _feed(self, row: DecodeSlot) -> int:
        """Evaluate the last token of a row that decodes by itself, and sample what follows."""
        assert row.alone is not None
        logits = self.prefill(row, row.alone.tokens[-1:], logits=True)
        assert logits is not None
        return self.sample(row, logits, row.alone.tokens)

    def peek(self, row: DecodeSlot) -> list[Any]:
        """The live cache of a row as it is now. What a group gives out is lazy: only what is used of it is copied."""
        if row.group is None:
            return row.cache
        cache: list[Any] = row.group.generator.extract_cache([row.uid])[row.uid][0]
        return cache

    def stop(self, row: DecodeSlot) -> list[Any]:
        """Take a row out of its batch and return its live cache, which covers every token it was fed."""
        if row in self._alone:
            self._alone.remove(row)
        if row.group is None:
            return row.cache
        caches = row.group.generator.remove([row.uid], return_prompt_caches=True)
        del row.group.rows[row.uid]
        self._groups = [group for group in self._groups if group.rows]
        row.group = None
        row.cache, tokens = caches[row.uid]
        row.fed = len(tokens)
        return row.cache

    def close(self) -> None:
        """Forget every row."""
        self._groups.clear()
        self._alone.clear()

    def _new_generator(self) -> BatchGenerator:
        generator = BatchGenerator(
            self._model,
            stop_tokens=self._eos,
            completion_batch_size=self._max_batch_size,
            prefill_batch_size=self._max_batch_size,
        )
        # The constructor raises the wired limit on Metal, which is tied to kernel panics; closing puts the
        # old limit back and leaves the generator usable.
        generator.close()
        return generator

    def _step(self, group: _Group, response: Any) -> Step:
        row = group.rows[response.uid]
        row.sampled(response.token, response.logprobs)
        if response.finish_reason is not None:
            del group.rows[response.uid]
            row.group = None
            row.cache = response.prompt_cache
            row.fed = len(response.all_tokens)
        return Step(row, response.token, response.finish_reason, response.prompt_cache, row.logprobs)
