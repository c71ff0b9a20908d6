"""Models that are wrong in a batch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx


class InBatch:
    """A model whose logits go through ``spoil`` whenever it is given more than one row."""

    def __init__(self, model: Any, spoil: Callable[[mx.array], mx.array]) -> None:
        self._model, self._spoil = model, spoil
        self.batches = 0

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        logits: mx.array = self._model(ids, cache=cache)
        if ids.shape[0] == 1:
            return logits
        self.batches += 1
        return self._spoil(logits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def noise(size: float) -> Callable[[mx.array], mx.array]:
    """Adds noise of so many times the spread of the logits."""

    def add(logits: mx.array) -> mx.array:
        return logits + size * mx.std(logits) * mx.random.normal(logits.shape, key=mx.random.key(3))

    return add
