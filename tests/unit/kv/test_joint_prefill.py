"""Prompts that share a forward pass leave what each of them would have left alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support import families

from agent_memory_core.kv.joint_prefill import prefill_together
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.parity_runs import gap_between

pytestmark = pytest.mark.model

LENGTHS = (2, 47, 23)
KNOWN = (0, 5, 70)
"""Tokens of each row that its cache holds before."""


def ids(length: int, seed: int) -> list[int]:
    return [(7919 * (index + 1) + seed) % 500 for index in range(length)]


def fed(model: Any, tokens: list[int]) -> list[Any]:
    cache: list[Any] = make_prompt_cache(model)
    if tokens:
        model(mx.array([tokens]), cache=cache)
    return cache


@pytest.mark.parametrize("known", [(0, 0, 0), KNOWN])
@pytest.mark.parametrize("family", ["llama", "phi3", "deepseek_v3"])
def test_logits_and_caches_are_those_of_each_row_alone(family: str, known: tuple[int, ...]) -> None:
    model = families.build(family)
    assert KvLayout(model).may_pad
    prompts = [ids(length, seed) for seed, length in enumerate(LENGTHS)]
    before = [ids(length, 100 + seed) for seed, length in enumerate(known)]
    given = [fed(model, tokens) for tokens in before]
    logits, caches = prefill_together(model, given, prompts)
    for row, (prompt, earlier) in enumerate(zip(prompts, before, strict=True)):
        alone = fed(model, earlier)
        expected = model(mx.array([prompt]), cache=alone)[0, -1]
        assert gap_between(expected, logits[row]).size < 1e-5
        after = [model(mx.array([[9]]), cache=cache)[0, -1] for cache in (alone, caches[row])]
        assert gap_between(*after).size < 1e-5
        assert [layer.offset for layer in given[row]] == [len(earlier)] * len(given[row])
