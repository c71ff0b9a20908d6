"""What is cut out of a live cache and joined into a new one continues as the original does, whatever its layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from support import devices, families, tiny_models
from support.cases import some_of
from support.live_caches import IDS, filled, run

from agent_memory_core.kv.layout import LAYER_KINDS, KvLayout
from agent_memory_core.kv.parity_runs import copied
from agent_memory_core.kv.records import KvBlocks
from agent_memory_core.models.cache_spec import LAYER_TYPES

pytestmark = pytest.mark.model

KINDS = {
    "gemma3": {"window", "append"},
    "gemma3n": {"window", "append"},
    "gemma4": {"window", "append"},
    "gpt_oss": {"window", "append"},
    "olmo3": {"window", "append"},
    "qwen3_next": {"state", "append"},
    "qwen3_5": {"state", "append"},
    "lfm2": {"state", "append"},
    "mamba2": {"state"},
    "nemotron_h": {"state", "append"},
    "falcon_h1": {"state", "append"},
    "granitemoehybrid": {"state", "append"},
    "baichuan_m1": {"state", "window", "append"},
    "recurrent_gemma": {"state", "window"},
    "longcat_flash_ngram": {"state", "append"},
    "llama4": {"snapshot", "append"},
}
"""The kinds of a family's layers; all others are "append" alone."""

ONE_OF_EACH = ("llama", "deepseek_v2", "gpt_oss", "gemma3", "lfm2", "baichuan_m1", "llama4")
"""A family for every combination of kinds, for unequal keys and values, and for windows on both sides of a block."""


@cache
def built(name: str) -> tuple[Any, KvLayout]:
    model = families.build(name)
    return model, KvLayout(model)


@pytest.mark.exact_on_cpu(
    reason="a live window holds more keys than its copy, so a GPU adds their products in other tiles",
    tolerance=1e-4,
)
@pytest.mark.parametrize("name", some_of(families.CONFIGS, (*ONE_OF_EACH, "qwen3_next", "mamba2")))
def test_every_layer_of_a_family_is_in_the_group_of_its_kind_and_copies_to_the_same_bits(
    name: str, tolerance: float
) -> None:
    model, layout = built(name)
    assert {group.kind for group in layout.groups} == KINDS.get(name, {"append"})
    assert layout.unknown == []
    assert layout.batches is (name != "llama4")
    covered = {layer for group in layout.groups for layer in group.layers}
    assert covered == set(range(len(make_prompt_cache(model))))
    live = filled(model, 64, 64, 64, 50)
    copy = copied(layout, live, 242, 64)
    for more in ([9, 8, 7, 6, 5], [4, 3], [2], [1]):
        assert devices.same(run(model, more, live), run(model, more, copy), tolerance)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(ONE_OF_EACH),
    st.lists(st.integers(1, 130), min_size=1, max_size=3),
    st.sampled_from([1, 7, 16, 64, 128]),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
def test_a_copy_by_way_of_blocks_of_any_size_goes_on_as_the_original_does(
    name: str, chunks: list[int], block_tokens: int, more: list[int]
) -> None:
    """A window that has turned has another order in the copy, which can show in the last bits."""
    model, layout = built(name)
    live = filled(model, *chunks)
    copy = copied(layout, live, sum(chunks), block_tokens)
    for count in more:
        one, other = run(model, IDS[-count:], live), run(model, IDS[-count:], copy)
        assert mx.allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_after_tokens_fed_one_by_one_a_copy_goes_on_as_the_original_does(name: str) -> None:
    model, layout = built(name)
    live = filled(model, 90, *[1] * 40)
    copy = copied(layout, live, 130, 64)
    for more in ([9, 8, 7, 6, 5], [2], [1]):
        assert mx.allclose(run(model, more, live), run(model, more, copy), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_copies_share_no_buffer_with_each_other_or_the_original(name: str) -> None:
    model, layout = built(name)
    live = filled(model, 70)
    before = [mx.array(x) for x in layout.arrays(live)]
    one, other = copied(layout, live, 70, 64), copied(layout, live, 70, 64)
    untouched = [mx.array(x) for x in layout.arrays(other)]
    run(model, [5, 6, 7], one)
    for now, then in ((live, before), (other, untouched)):
        assert all(mx.array_equal(a, b) for a, b in zip(layout.arrays(now), then, strict=True))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_shapes_are_told_without_a_cut(name: str) -> None:
    model, layout = built(name)
    live = filled(model, 100)
    for record in ("block", "window"):
        segment, empty = layout.cut(live, record, 64, 100), layout.empty(record, 36)
        assert {name: (x.shape, x.dtype) for name, x in segment.items()} == {
            name: (x.shape, x.dtype) for name, x in empty.items()
        }
        assert {name: x.shape[-1] for name, x in segment.items()} == layout.dims(record)
        assert layout.at_home(layout.cut(live, "tail", 64, 100), record).keys() == segment.keys()


def test_keys_of_a_tail_are_those_of_every_group() -> None:
    _, layout = built("baichuan_m1")
    live = filled(built("baichuan_m1")[0], 30)
    tail = layout.cut(live, "tail", 0, 30)
    assert {int(name.partition(".")[0]) for name in tail} == set(range(len(layout.groups)))
    assert layout.fits_tail(tail, 30)
    assert not layout.fits_tail(tail, 29)
    assert not layout.fits_tail(tail | {"99.k": mx.zeros((1,))}, 30)
    assert not layout.fits_tail(tail | {"no number": mx.zeros((1,))}, 30)
    for name in tail:
        assert not layout.fits_tail({n: x for n, x in tail.items() if n != name}, 30) or name.count(".") > 1


# Which kind a class of cache is of


class _Kin(KVCache):  # type: ignore[misc]
    """A subclass, of which nobody knows where a token lies."""


class _Strange(KVCache):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.mystery = object()


def layout_of(*caches: Any) -> tuple[Any, KvLayout]:
    """A model of two layers with caches of these classes, and its layout."""
    model = tiny_models.build(tiny_models.LLAMA)
    model.make_cache = lambda: [make() for make in caches]
    return model, KvLayout(model)


def test_an_unknown_class_is_kept_whole_if_that_can_be_done() -> None:
    model, layout = layout_of(KVCache, _Kin)
    assert [(group.kind, group.layers) for group in layout.groups] == [("append", (0,)), ("snapshot", (1,))]
    live = filled(model, 70)
    copy = copied(layout, live, 70, 64)
    assert mx.array_equal(run(model, [1, 2], live), run(model, [1, 2], copy))


def test_a_class_with_an_attribute_that_cannot_be_stored_is_named_and_left_out() -> None:
    assert layout_of(KVCache, _Strange)[1].unknown == ["_Strange"]


def test_a_window_that_keeps_its_first_tokens_is_kept_whole() -> None:
    _, layout = layout_of(KVCache, lambda: RotatingKVCache(max_size=8, keep=2))
    assert [group.kind for group in layout.groups] == ["append", "snapshot"]


def test_windows_of_different_lengths_are_different_groups() -> None:
    """Inside a block only the longer window has all it needs, so the model cannot be resumed there."""
    _, layout = layout_of(lambda: RotatingKVCache(max_size=8), lambda: RotatingKVCache(max_size=32))
    assert [group.shape and group.shape.window for group in layout.groups] == [8, 32]
    policy = KvBlocks(layout, None, 16).resume
    assert (policy.at_block_ends, policy.inside_block) == (True, False)
    assert list(policy.window_blocks(64)) == [2, 3]
    assert KvBlocks(layout, None, 4).resume.inside_block


def test_every_kind_has_a_name_of_its_own_and_a_word_that_profiles_know() -> None:
    assert len({kind.kind for kind in LAYER_KINDS}) == len(LAYER_KINDS)
    assert {kind.layer_type for kind in LAYER_KINDS} <= set(LAYER_TYPES)
