"""Layers with a window: what of it is still there, and that a cut gives the last tokens of its range, in order."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.models.cache import RotatingKVCache
from support import families
from support.live_caches import IDS, filled, run

from agent_memory_core.kv.layer_kind import Leaf
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.window import WindowLayers


@cache
def built(name: str) -> tuple[Any, KvLayout]:
    model = families.build(name)
    return model, KvLayout(model)


@pytest.mark.model
def test_a_window_is_held_only_as_far_as_it_reaches() -> None:
    model, layout = built("gpt_oss")
    live = filled(model, 200)
    assert layout.holds(live, 200, 200)
    assert layout.holds(live, 150, 200), "a long chunk leaves more than a window"
    for token in IDS[200:260]:
        run(model, [token], live)
    assert layout.holds(live, 260, 260)
    assert layout.holds(live, 259, 260)
    assert not layout.holds(live, 258, 260)
    segment = layout.cut(live, "window", 192, 256 + 4)
    assert {x.shape[2] for x in segment.values()} == {families.SHORT - 1}


@pytest.mark.model
def test_windows_and_other_layers_are_counted_apart() -> None:
    _, layout = built("gemma3")
    window, append = layout.groups
    assert isinstance(window, WindowLayers)
    assert append.shape is not None
    assert (window.shape.window, append.shape.window) == (families.LONG, None)
    live = layout.live_bytes
    assert live.per_window_token == 3 * window.shape.nbytes
    assert live.per_token == append.shape.nbytes
    assert live.window == families.LONG - 1
    assert "window=96" in window.describe()


# One leaf, whose token number i has keys of i and values of -i


def stepped(size: int, chunks: list[int]) -> tuple[RotatingKVCache, WindowLayers, int]:
    """A leaf of this size that was fed chunks of these lengths, its group, and how many tokens that were."""
    leaf, at = RotatingKVCache(max_size=size), 0
    for chunk in chunks:
        ids = mx.arange(at, at + chunk, dtype=mx.float32)[None, None, :, None]
        leaf.update_and_fetch(mx.broadcast_to(ids, (1, 2, chunk, 4)), mx.broadcast_to(-ids, (1, 2, chunk, 3)))
        at += chunk
    return leaf, WindowLayers.of([Leaf(0, 0, leaf)]), at


fed = st.one_of(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.tuples(st.integers(1, 12), st.integers(1, 30)).map(lambda n: [n[0], *[1] * n[1]]),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), fed, st.integers(0, 40), st.integers(1, 12))
def test_a_cut_gives_the_last_tokens_of_its_range_in_order(
    size: int, chunks: list[int], back: int, count: int
) -> None:
    leaf, group, length = stepped(size, chunks)
    stop = max(1, length - back)
    start = max(0, stop - count)
    if not group.holds([leaf], stop, length):
        with pytest.raises(AssertionError, match="are lost"):
            group.cut([leaf], max(0, stop - size + 1), stop)
        return
    segment = group.cut([leaf], start, stop)
    wanted = list(range(max(start, stop - (size - 1)), stop))
    assert segment["k"][0, 1, :, 3].tolist() == wanted
    assert segment["v"][0, 1, :, 2].tolist() == [-token for token in wanted]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 30), st.integers(1, 7))
def test_a_joined_leaf_evaluates_the_next_token_on_the_same_window(
    size: int, length: int, block_tokens: int
) -> None:
    leaf, group, _ = stepped(size, [length])
    first = max(0, length - (size - 1)) // block_tokens * block_tokens
    spans = [(at, min(at + block_tokens, length)) for at in range(first, length, block_tokens)]
    segments = [group.cut([leaf], max(a, length - (size - 1)), b) for a, b in spans]
    copy = RotatingKVCache(max_size=size)
    group.join([copy], segments, length, 1)
    assert copy.offset == length
    new = mx.full((1, 2, 1, 4), float(length)), mx.full((1, 2, 1, 3), -float(length))
    keys, values = copy.update_and_fetch(*new)
    window = set(range(max(0, length - size + 1), length + 1))
    assert set(keys[0, 0, :, 0].tolist()) == window
    assert {-value for value in values[0, 0, :, 0].tolist()} == window


def test_tokens_that_are_missing_are_our_own_mistake() -> None:
    leaf, group, length = stepped(6, [20])
    with pytest.raises(AssertionError, match="2 tokens of a window have no KV"):
        group.join([RotatingKVCache(max_size=6)], [group.cut([leaf], 17, 20)], length, 1)
