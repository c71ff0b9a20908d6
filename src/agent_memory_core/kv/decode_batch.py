"""Rows that decode together: mlx-lm's batch, without the scheduler that mlx-lm puts around it.

mlx-lm's `BatchGenerator` queues requests and prefills them, which is the engine's own work here. Its constructor also
raises the wired limit of the GPU, and its `close` lowers it again; doing that at every turn is known to end in kernel
panics on a Mac. What decodes inside it, `GenerationBatch`, changes no limit. So that is used directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import PromptProcessingBatch, StopSequences, generation_stream
from mlx_lm.sample_utils import greedy_sampler

Sampler = Callable[[mx.array], mx.array]
"""Log-probabilities [rows, vocab] to token ids [rows]."""


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row that is to decode: its cache is filled, and its first token is sampled."""

    uid: int
    """Names the row in its batch."""
    cache: list[Any]
    """A live cache of all tokens but the last."""
    token_ids: Sequence[int]
    """All its tokens; the last one is the first to be fed."""
    max_tokens: int
    """How many more tokens it may get."""
    sampler: Sampler = greedy_sampler
    """Chooses its tokens."""
    processors: Sequence[Any] = ()
    """Change its logits before a token is chosen."""


class DecodeBatch:
    """Rows of one model that take every step together. A row leaves when it ends or is removed."""

    def __init__(self, model: Any, eos_token_ids: Sequence[int] = ()) -> None:
        self._model = model
        self._stop = StopSequences([[token] for token in eos_token_ids] or None)
        self._waiting: list[BatchRow] = []
        self._batch: Any = None

    def insert(self, row: BatchRow) -> None:
        """Add a row, which takes part from the next step on."""
        self._waiting.append(row)

    def next(self) -> list[Any]:
        """Take one step; return mlx-lm's response for each row.

        A response names the row (``uid``), the ``token`` that was fed, and the ``logprobs`` [vocab] it was sampled
        from; if the row has ended, also its ``finish_reason``, ``prompt_cache`` and ``all_tokens``. When this returns,
        the model is already busy with the step after it.
        """
        with mx.stream(generation_stream):
            self._take_in()
            return self._batch.next() if self._batch is not None else []

    def peek(self, uid: int) -> list[Any]:
        """The live cache of one row as it is now, lazily: only what is used of it is copied."""
        for row in self._waiting:
            if row.uid == uid:
                return row.cache
        cache: list[Any] = self._batch.extract_cache(self._batch.uids.index(uid))
        return cache

    def remove(self, uid: int) -> tuple[list[Any], int]:
        """Take a row out; return its live cache, and how many tokens that covers."""
        cache = self.peek(uid)
        for row in self._waiting:
            if row.uid == uid:
                self._waiting.remove(row)
                return cache, len(row.token_ids) - 1
        at = self._batch.uids.index(uid)
        fed = len(self._batch.tokens[at])
        self._batch.filter([i for i in range(len(self._batch)) if i != at])
        return cache, fed

    def _take_in(self) -> None:
        """Let the waiting rows take part: their first step is begun here."""
        rows, self._waiting = self._waiting, []
        if not rows:
            return
        prompts = PromptProcessingBatch(
            self._model,
            [row.uid for row in rows],
            [row.cache for row in rows],
            tokens=[list(row.token_ids[:-1]) for row in rows],
            samplers=[row.sampler for row in rows],
            logits_processors=[list(row.processors) for row in rows],
            stop_sequences=[self._stop] * len(rows),
            max_tokens=[row.max_tokens for row in rows],
        )
        batch = prompts.generate([[row.token_ids[-1]] for row in rows])
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.extend(batch)
