"""Leaves that are stored as a whole, states among them: every attribute comes back, and only there."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache
from support import families
from support.live_caches import filled

from agent_memory_core.kv.layer_kind import Leaf
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.snapshot import SCALARS, SnapshotLayers, attribute_shapes
from agent_memory_core.kv.state import StateLayers


class Holder:
    """A cache class of nobody's, with any attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


arrays = st.builds(
    lambda size, dtype, seed: mx.random.randint(0, 9, (1, size), key=mx.random.key(seed)).astype(dtype),
    st.integers(1, 4),
    st.sampled_from([mx.float32, mx.bfloat16, mx.uint32]),
    st.integers(0, 9),
)
plain = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(-1, 1), st.text(max_size=3), arrays)
attributes = st.dictionaries(
    st.sampled_from(["keys", "offset", "a", "scale"]),
    st.recursive(
        plain, lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner).map(tuple)), max_leaves=5
    ),
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, mx.array):
        return isinstance(other, mx.array) and one.dtype == other.dtype and bool(mx.array_equal(one, other))
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def group_of(cache: Any) -> SnapshotLayers:
    return SnapshotLayers.of([Leaf(0, 0, cache)])


@settings(max_examples=25, deadline=None)
@given(attributes)
def test_every_attribute_comes_back(attributes: dict[str, Any]) -> None:
    cache = Holder(**attributes)
    group = group_of(cache)
    segment = group.cut([cache], 0, 5)
    assert group.fits(segment, 5)
    again = Holder(**dict.fromkeys(attributes))
    group.join([again], [segment], 5, 1)
    assert vars(again).keys() == attributes.keys()
    assert all(same(vars(again)[name], value) for name, value in attributes.items())


@pytest.mark.parametrize("value", [object(), {"a": 1}, [set()], (lambda: 0,)])
def test_a_leaf_that_holds_anything_else_is_not_accepted(value: Any) -> None:
    assert SnapshotLayers.key_of(Leaf(3, 0, Holder(a=1))) == 3
    assert SnapshotLayers.key_of(Leaf(3, 0, Holder(a=value))) is None
    assert SnapshotLayers.key_of(Leaf(3, 0, object())) is None


def test_a_leaf_is_held_only_until_the_next_token() -> None:
    group = group_of(ChunkedKVCache(8))
    assert group.holds([], 5, 5)
    assert not group.holds([], 5, 6)


def test_a_snapshot_is_announced_and_a_state_is_not() -> None:
    assert "ChunkedKVCache is stored as a whole" in group_of(ChunkedKVCache(8)).notice
    assert StateLayers.of([Leaf(0, 0, ArraysCache(2))]).notice == ""


# States


def state_group(*, grows: bool = False) -> tuple[ArraysCache, StateLayers]:
    cache = ArraysCache(2)
    cache[0], cache[1] = mx.ones((1, 3)), mx.ones((1, 2, 2), dtype=mx.bfloat16)
    first = attribute_shapes(cache)
    if grows:
        cache[0] = mx.ones((1, 6))
    return cache, StateLayers.of([Leaf(0, 0, cache, first)])


def test_a_state_of_a_fixed_size_is_checked_against_it() -> None:
    cache, group = state_group()
    segment = group.cut([cache], 0, 9)
    assert group.fits(segment, 9)
    assert not group.fits(segment | {"cache.0": mx.ones((1, 4))}, 9)
    assert not group.fits(segment | {"cache.1": mx.ones((1, 2, 2))}, 9)
    assert not group.fits({name: x for name, x in segment.items() if name != "cache.1"}, 9)
    assert not group.fits({name: x for name, x in segment.items() if name != SCALARS}, 9)


def test_a_state_that_grows_may_have_any_size() -> None:
    cache, group = state_group(grows=True)
    cache[0] = mx.ones((1, 30))
    assert group.fits(group.cut([cache], 0, 9), 9)


def test_the_size_of_a_state_is_part_of_its_identity() -> None:
    fixed, grows = state_group()[1].describe(), state_group(grows=True)[1].describe()
    assert "cache.0:[1, 3]" in fixed
    assert "cache.0:2" in grows


@pytest.mark.model
def test_states_of_a_model_take_the_bytes_that_they_take_live() -> None:
    model = families.build("mamba2")
    layout = KvLayout(model)
    assert layout.live_bytes.fixed == sum(x.nbytes for x in layout.arrays(filled(model, 9)))
    assert (layout.live_bytes.per_token, layout.live_bytes.window) == (0, 0)


def test_a_subclass_of_a_state_is_a_snapshot() -> None:
    class Kin(ArraysCache):  # type: ignore[misc]
        pass

    assert StateLayers.key_of(Leaf(0, 0, Kin(1))) is None
    assert SnapshotLayers.key_of(Leaf(0, 0, Kin(1))) == 0
