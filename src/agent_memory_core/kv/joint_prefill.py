"""Several prompts in one forward pass, each on a live cache of its own.

The shorter ones are padded on the right. A token never sees what follows it, so layers that keep every token may run
so; a recurrent layer would take the padding for tokens. How mlx-lm's batched caches are told of padding, and how they
move it to the left afterwards, is what mlx-lm's own `PromptProcessingBatch.prompt` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


def prefill_together(
    model: Any, caches: Sequence[list[Any]], token_ids: Sequence[Sequence[int]]
) -> tuple[mx.array, list[list[Any]]]:
    """Feed each row its token ids, two or more; return the logits [rows, vocab] after the last, and the new caches.

    The last tokens are fed by themselves, so that the output head runs for one token of each row. All is lazy, and the
    caches that are given stay as they were.
    """
    assert all(len(ids) > 1 for ids in token_ids)
    merged = [layer[0].merge(list(layer)) for layer in zip(*caches, strict=True)]
    lengths = [len(ids) - 1 for ids in token_ids]
    padding = [max(lengths) - length for length in lengths]
    if any(padding):
        for cache in merged:
            cache.prepare(lengths=lengths, right_padding=padding)
    padded = [[*ids[:-1], *[0] * missing] for ids, missing in zip(token_ids, padding, strict=True)]
    model(mx.array(padded), cache=merged)
    if any(padding):
        for cache in merged:
            cache.finalize()
    logits = model(mx.array([[ids[-1]] for ids in token_ids]), cache=merged)[:, -1, :]
    return logits, [[cache.extract(row) for cache in merged] for row in range(len(lengths))]
