"""On which device the tests run, and what a test may expect of bits there.

On the CPU a product of one row and a product of several rows add their numbers in the same order, so a token has the
same logits alone, in a chunk and in a batch. A GPU has one kernel for a single row and another for several. They round
differently, in the last bits. A test that compares such numbers bit by bit is marked with
`pytest.mark.exact_on_cpu`; see `tests/conftest.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear

DEVICES = ("cpu", "gpu", "like-gpu")
"""Values of the variable ``AGENT_MEMORY_TEST_DEVICE``. "like-gpu" is the CPU that rounds as a GPU does."""


def select(device: str) -> None:
    """Make ``device`` MLX's default. It comes before the first import of mlx_lm, whose streams keep the default.

    Raises:
        ValueError: there is no such device on this machine.
    """
    if device not in DEVICES:
        raise ValueError(f"AGENT_MEMORY_TEST_DEVICE={device!r}: choose one of {', '.join(DEVICES)}.")
    wanted = mx.Device(mx.gpu if device == "gpu" else mx.cpu)
    if device == "gpu" and not mx.is_available(wanted):
        raise ValueError("AGENT_MEMORY_TEST_DEVICE='gpu': MLX finds no GPU on this machine.")
    mx.set_default_device(wanted)
    if device == "like-gpu":
        Linear.__call__ = rounded_by_rows(Linear.__call__)  # type: ignore[method-assign]
        QuantizedLinear.__call__ = rounded_by_rows(QuantizedLinear.__call__)  # type: ignore[method-assign]


def is_imitated() -> bool:
    """Whether this process imitates a GPU on the CPU."""
    return hasattr(Linear.__call__, "rounds_by_rows")


def is_exact() -> bool:
    """Whether products of one row and of several rows have the same bits on the device of these tests."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return on_cpu and not is_imitated()


def same(one: mx.array, other: mx.array, tolerance: float) -> bool:
    """Whether two arrays have the same bits or, with a tolerance, are as near; the fixture ``tolerance`` knows it."""
    if tolerance == 0:
        return bool(mx.array_equal(one, other))
    return bool(mx.allclose(one, other, rtol=tolerance, atol=tolerance))


def rounded_by_rows(product: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A layer's call that rounds several rows otherwise than one row.

    One row is left as it is. Of several rows, the first and the last half of the input are multiplied one after the
    other and then added: the same sum in another order. With ``MLX_ENABLE_TF32=1`` the inputs of several rows are also
    rounded to the 10 bits that TF32 keeps.
    """

    def call(self: Any, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if rows == 1:
            return product(self, x)
        if os.environ.get("MLX_ENABLE_TF32") == "1" and x.dtype == mx.float32:
            x = to_tf32(x)
        first = mx.arange(x.shape[-1]) < x.shape[-1] // 2
        nothing = mx.zeros_like(x)
        halves = product(self, mx.where(first, x, nothing)) + product(self, mx.where(first, nothing, x))
        # A bias was added twice.
        return halves - self.bias if "bias" in self else halves

    call.rounds_by_rows = True  # type: ignore[attr-defined]
    return call


def to_tf32(x: mx.array) -> mx.array:
    """``x``, float32, with the mantissa rounded to 10 bits."""
    bits = x.view(mx.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).view(mx.float32)
