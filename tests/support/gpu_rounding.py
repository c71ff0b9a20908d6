"""A model that rounds as on a GPU: how a matrix product is summed depends on the shapes, as it does between kernels.

On Apple silicon a product with one row is computed by another kernel than one with several rows, and attention over
more keys is split in another way. Each way adds the same numbers in another order, so results in bfloat16 differ in
their last bit, layer after layer. Here every linear layer sums in as many parts as the shapes of a call ask for, and
each part is rounded to the dtype of the weights. Where the output head is the embedding itself, it rounds as it always
does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear

WAYS = (1, 2, 4, 8)
"""The numbers of parts that a sum may be split into."""


class Kernel:
    """How products are computed at the moment; all layers of a model share one."""

    parts = 1
    """In how many parts a sum is split."""


class RoundedLinear(Module):
    """A linear layer whose result is rounded as the kernel of the moment rounds."""

    def __init__(self, linear: Linear, kernel: Kernel, scale: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # In tuples: what is in one is no parameter of the model.
        self._float32 = (linear.weight.astype(mx.float32),)
        self.linear = linear
        self.kernel, self.scale = kernel, scale

    def __call__(self, x: mx.array) -> mx.array:
        """The layer's output in the dtype of ``x``."""
        (weight,) = self._float32
        whole = x.astype(mx.float32) @ weight.T
        if self.kernel.parts > 1:
            split = _split_product(x, weight, self.kernel.parts)
            whole = whole + self.scale * (split - whole.astype(x.dtype).astype(mx.float32))
        result: mx.array = whole.astype(x.dtype)
        return result + self.linear.bias if "bias" in self.linear else result


def _split_product(x: mx.array, weight: mx.array, parts: int) -> mx.array:
    """A product summed in parts, each of them rounded to the dtype of ``x``; float32."""
    width = -(-x.shape[-1] // parts)
    total = mx.zeros((), x.dtype)
    for start in range(0, x.shape[-1], width):
        part = x[..., start : start + width].astype(mx.float32) @ weight[:, start : start + width].T
        total = total + part.astype(x.dtype)
    return total.astype(mx.float32)


class GpuRounding:
    """A model whose kernels are chosen by the number of rows, and for several tokens by the number of keys."""

    def __init__(self, model: Any, scale: float = 1.0) -> None:
        """``scale`` makes the rounding errors so many times larger; 4 is about what 4-bit weights do."""
        self._kernel, self.scale = Kernel(), scale
        layers = [
            (name, m)
            for name, m in model.named_modules()
            if type(m) is Linear and m.weight.dtype != mx.float32
        ]
        assert layers
        for name, linear in layers:
            _replace(model, name, RoundedLinear(linear, self._kernel, scale))
        self._model = model

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        """The logits [rows, tokens, vocab]."""
        shapes = (ids.shape[0] - 1, *_lengths(cache or ())) if ids.shape[1] > 1 else (ids.shape[0] - 1,)
        self._kernel.parts = WAYS[sum(shapes) % len(WAYS)]
        logits: mx.array = self._model(ids, cache=cache)
        mx.eval(logits)
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _lengths(cache: Iterable[Any]) -> set[int]:
    """The numbers of keys that the caches hold, in whole tokens."""
    return {leaf.keys.shape[2] for leaf in cache if getattr(leaf, "keys", None) is not None}


def _replace(model: Any, name: str, module: Any) -> None:
    *path, last = name.split(".")
    for step in path:
        model = model[int(step)] if isinstance(model, list) else getattr(model, step)
    setattr(model, last, module)
