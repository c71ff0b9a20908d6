"""Runs models on live caches of mlx-lm, without an engine."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

IDS = [(7 * i) % 900 + 3 for i in range(400)]
"""Token ids to fill caches with."""


def run(model: Any, ids: list[int], cache: list[Any]) -> mx.array:
    """The logits [1, vocab] after ``ids``, evaluated."""
    logits: mx.array = model(mx.array([ids]), cache=cache)[:, -1]
    mx.eval(logits)
    return logits


def filled(model: Any, *chunks: int) -> list[Any]:
    """A live cache that was fed the first tokens of `IDS`, in chunks of these lengths."""
    cache: list[Any] = make_prompt_cache(model)
    at = 0
    for chunk in chunks:
        run(model, IDS[at : at + chunk], cache)
        at += chunk
    return cache
