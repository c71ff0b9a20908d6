"""Layers that keep every token: any range can be cut out, and ranges join to what they were cut from."""

from __future__ import annotations

import ctypes
import functools
import itertools
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.models.cache import make_prompt_cache
from support import devices, tiny_models
from support.live_caches import filled, run

from agent_memory_core.kv.append import GROWTH, round_up
from agent_memory_core.kv.layout import KvLayout

pytestmark = pytest.mark.model

CONFIGS = {
    config["model_type"]: config
    for config in (tiny_models.LLAMA, tiny_models.QWEN3, tiny_models.MISTRAL, tiny_models.DEEPSEEK_V2)
}
LENGTH = 50


@cache
def built(name: str) -> tuple[Any, KvLayout, list[Any]]:
    """A model, its layout, and a live cache of `LENGTH` tokens that nobody may write to."""
    model = tiny_models.build(CONFIGS[name])
    return model, KvLayout(model), filled(model, LENGTH)


def joined(layout: KvLayout, live: list[Any], cuts: list[int], room: int = 1) -> list[Any]:
    """A cache of the tokens up to the last of these cuts."""
    spans = [layout.cut(live, "block", *span) for span in itertools.pairwise([0, *cuts])]
    return layout.join({"block": spans}, cuts[-1], room)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.sets(st.integers(1, LENGTH), min_size=1).map(sorted),
    st.integers(1, 300),
)
def test_any_cuts_join_to_the_tokens_they_were_cut_from(name: str, cuts: list[int], room: int) -> None:
    _, layout, live = built(name)
    length = cuts[-1]
    for one, other in zip(joined(layout, live, cuts, room), live, strict=True):
        assert one.offset == length
        assert one.keys.shape[2] == one.values.shape[2] == round_up(length + room)
        assert mx.array_equal(one.keys[:, :, :length], other.keys[:, :, :length])
        assert mx.array_equal(one.values[:, :, :length], other.values[:, :, :length])
        assert not mx.any(one.keys[:, :, length:]).item()


def address(x: mx.array) -> int:
    """Where the bytes of an array lie; it is evaluated for that."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(x).cast("B")))


@pytest.mark.skipif(not devices.is_exact(), reason="a GPU's arrays may be moved where the CPU looks at them")
def test_segments_are_written_into_buffers_that_stay_where_they_are() -> None:
    """Written while the write before was not done yet, each of them would be copied whole, which no result tells."""
    model, layout, live = built("llama")
    (group,) = layout.groups
    one = group.cut(live, 0, 16)
    late = {name: functools.reduce(lambda y, _: mx.sin(y), range(40), x) for name, x in one.items()}
    joining: Any = group.joining(make_prompt_cache(model), 3 * 16, 1000)
    places = []
    for segments in ([one], [late, one]):
        for segment in segments:
            joining.add(segment)
        places.append([address(x) for rows in joining.buffers.values() for x in rows])
    assert places[0] == places[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shorter_join_is_the_shorter_prompt(name: str) -> None:
    model, layout, live = built(name)
    short = filled(model, 29)
    copy = joined(layout, live, [16, 29])
    assert mx.allclose(run(model, [9], copy), run(model, [9], short), atol=1e-4)
    assert copy[0].offset == short[0].offset == 30


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_and_shape_are_those_of_a_live_cache(name: str) -> None:
    model, layout, _ = built(name)
    (group,) = layout.groups
    full = filled(model, GROWTH)
    assert layout.live_bytes.per_token * GROWTH == sum(cache.nbytes for cache in full)
    assert (layout.live_bytes.fixed, layout.live_bytes.window) == (0, 0)
    assert group.shape is not None
    assert (group.shape.heads, group.shape.key_dim) == (full[0].keys.shape[1], full[0].keys.shape[3])
    assert group.shape.value_dim == full[0].values.shape[3]


def test_keys_and_values_may_differ_in_width() -> None:
    (group,) = built("deepseek_v2")[1].groups
    assert group.shape is not None
    assert (group.shape.key_dim, group.shape.value_dim) == (48, 64)


def test_tokens_that_are_missing_are_our_own_mistake() -> None:
    _, layout, live = built("llama")
    with pytest.raises(AssertionError, match="there is KV of 20 tokens, not of 23"):
        layout.join({"block": [layout.cut(live, "block", 0, 20)]}, 23, 1)


def test_no_tokens_are_no_arrays() -> None:
    _, layout, live = built("llama")
    assert layout.cut(live, "block", 7, 7) == {}
