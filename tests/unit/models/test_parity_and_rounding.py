"""What rounds as a GPU does, in bfloat16, is no reason to refuse a model; what is wrong is, though it rounds too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from support import tiny_models
from support.gpu_rounding import GpuRounding
from support.spoiled_models import InBatch, noise

from agent_memory_core.kv import parity_runs
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.parity_runs import Gap
from agent_memory_core.models import parity
from agent_memory_core.models.parity import LIMITS, MOST_ROUNDING, check_batched

pytestmark = pytest.mark.model

MANY = 5_000
"""Tokens of the vocabulary."""
HUGE = 150_000
"""As many as real models have. The largest of so many rounding errors is far from the typical one."""


def rounding(scale: float, vocab_size: int = MANY) -> GpuRounding:
    """A model of bfloat16 weights that rounds as a GPU does; its output head gives float32 logits."""
    config = tiny_models.LLAMA | {"vocab_size": vocab_size, "tie_word_embeddings": False}
    model = tiny_models.build(config, dtype=mx.bfloat16)
    model.lm_head.weight = model.lm_head.weight.astype(mx.float32)
    return GpuRounding(model, scale)


@pytest.fixture(scope="module", params=[1, 4], ids=["bf16", "4-bit"])
def on_gpu(request: pytest.FixtureRequest) -> GpuRounding:
    return rounding(request.param)


def test_rounding_of_a_gpu_is_no_reason_however_many_tokens_there_are() -> None:
    model = rounding(4, HUGE)
    assert check_batched(model, KvLayout(model), HUGE).batched


def test_rounding_of_a_gpu_is_no_reason(on_gpu: GpuRounding) -> None:
    result = check_batched(on_gpu, KvLayout(on_gpu), MANY)
    assert result.limit == LIMITS[mx.bfloat16], "the dtype of the weights counts, not that of the logits"
    assert result.batched_floor is not None
    assert result.batched_floor > 0.01, "nothing was rounded in another way"
    assert result.batched, result.reason
    assert result.batched_gap is not None
    if on_gpu.scale == 4:
        assert result.batched_gap > result.limit, "only its floor can tell that this is rounding"


def likeliest_changed(logits: mx.array) -> mx.array:
    """One token of many is wrong, and it is always the likeliest: the mean square hardly shows it."""
    wrong = mx.arange(logits.shape[-1]) == 7
    return mx.where(wrong, logits.max(-1, keepdims=True) + 4 * mx.std(logits), logits)


def first_row_wrong(logits: mx.array) -> mx.array:
    """The others are as they should be."""
    return mx.where(mx.arange(logits.shape[0])[:, None, None] == 0, noise(1.0)(logits), logits)


def not_a_number(logits: mx.array) -> mx.array:
    return logits * math.nan


@pytest.mark.parametrize("on_gpu", [4], indirect=True)
@pytest.mark.parametrize("spoil", [noise(1.0), likeliest_changed, first_row_wrong, not_a_number])
def test_what_is_wrong_is_refused_though_it_rounds_too(
    on_gpu: GpuRounding, spoil: Callable[[mx.array], mx.array]
) -> None:
    result = check_batched(InBatch(on_gpu, spoil), KvLayout(on_gpu), MANY)
    assert not result.batched


def test_a_model_that_sees_the_padding_is_refused_though_it_rounds_too(on_gpu: GpuRounding) -> None:
    """In a batch of equal rows there is no padding, so the floor is as low as for a sound model."""
    result = check_batched(SeesPadding(on_gpu), KvLayout(on_gpu), MANY)
    assert result.batched_floor is not None
    assert result.batched_floor < MOST_ROUNDING[mx.bfloat16]
    assert not result.batched


class SeesPadding(InBatch):
    """A model that is not given the mask of its batch."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, lambda logits: logits)

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        for layer in cache or ():
            if ids.shape[0] > 1:
                layer.left_padding = mx.zeros_like(layer.left_padding)
        return super().__call__(ids, cache)


def test_another_likeliest_token_is_a_fault_of_its_own() -> None:
    """Where the floor is clean, and the root mean square is far below the limit."""
    clean, small = Gap(0.001), Gap(0.001, other_token=True)
    assert parity._is_rounding(parity_runs.Comparison(clean, clean), mx.bfloat16)
    assert not parity._is_rounding(parity_runs.Comparison(small, clean), mx.bfloat16)


def test_a_slight_fault_in_float32_is_refused_however_many_tokens_there_are() -> None:
    model = tiny_models.build(tiny_models.LLAMA | {"vocab_size": 4 * MANY})
    assert check_batched(model, KvLayout(model), 4 * MANY).batched
    assert not check_batched(InBatch(model, noise(0.005)), KvLayout(model), 4 * MANY).batched


@given(
    st.lists(st.floats(-30, 30, width=16), min_size=2, max_size=20), st.floats(0.01, 1), st.integers(1, 50)
)
@settings(max_examples=50, deadline=None)
def test_a_gap_does_not_grow_with_the_vocabulary(row: list[float], size: float, times: int) -> None:
    """Nor with the unit that logits are measured in."""
    one = mx.array([*row, 0.0, 1.0])
    other = one + size * mx.array([(-1.0) ** index for index in range(one.size)])
    gap = parity_runs.gap_between(one, other).size
    assert gap == pytest.approx(size / mx.std(one).item(), rel=1e-3)
    assert parity_runs.gap_between(mx.tile(one, times), mx.tile(other, times)).size == pytest.approx(
        gap, 1e-3
    )
    assert parity_runs.gap_between(4 * one, 4 * other).size == pytest.approx(gap, rel=1e-3)
