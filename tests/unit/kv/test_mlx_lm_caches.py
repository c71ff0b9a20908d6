"""What the kinds of layers assume about mlx-lm's cache classes. A release that changes it fails here."""

from __future__ import annotations

import inspect
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch
from mlx_lm.models import cache
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache
from support import tiny_models

from agent_memory_core.kv.append import GROWTH

HEADS, KEY_DIM, VALUE_DIM = 2, 4, 3


def fed(leaf: Any, *chunks: int) -> Any:
    """``leaf`` after chunks of these lengths; keys of token number i are i, its values -i."""
    at = 0
    for chunk in chunks:
        ids = mx.arange(at, at + chunk, dtype=mx.float32)[None, None, :, None]
        keys, values = (mx.broadcast_to(ids, (1, HEADS, chunk, dim)) for dim in (KEY_DIM, VALUE_DIM))
        leaf.update_and_fetch(keys, -values)
        at += chunk
    return leaf


def tokens(keys: mx.array) -> list[int]:
    """Which tokens a buffer holds, in its order."""
    return [int(token) for token in keys[0, 0, :, 0].tolist()]  # type: ignore[union-attr]


# KVCache


def test_a_kv_cache_has_keys_values_and_an_offset_and_nothing_else() -> None:
    assert vars(KVCache()) == {"keys": None, "values": None, "offset": 0}


def test_a_kv_cache_keeps_tokens_in_order_and_grows_in_steps() -> None:
    leaf = fed(KVCache(), 5, 1, 250)
    assert KVCache.step == GROWTH == 256
    assert leaf.offset == 256
    assert leaf.keys.shape == (1, HEADS, 256, KEY_DIM)
    assert leaf.values.shape == (1, HEADS, 256, VALUE_DIM)
    assert tokens(leaf.keys) == list(range(256))
    assert fed(KVCache(), 256, 1).keys.shape[2] == 2 * GROWTH


def test_a_kv_cache_whose_attributes_are_set_continues_after_them() -> None:
    leaf, other = fed(KVCache(), 7), KVCache()
    other.keys, other.values, other.offset = leaf.keys, leaf.values, 5
    keys, _ = other.update_and_fetch(mx.full((1, HEADS, 1, KEY_DIM), 9.0), mx.zeros((1, HEADS, 1, VALUE_DIM)))
    assert tokens(keys) == [0, 1, 2, 3, 4, 9]


def test_a_kv_cache_is_trimmed_by_its_offset_alone() -> None:
    leaf = fed(KVCache(), 7)
    assert leaf.is_trimmable()
    assert leaf.trim(3) == 3
    assert leaf.offset == 4
    assert tokens(leaf.keys)[:7] == list(range(7))


# RotatingKVCache


def test_a_rotating_cache_has_these_attributes_and_nothing_else() -> None:
    wanted = {"keep": 0, "keys": None, "values": None, "offset": 0, "max_size": 8, "_idx": 0}
    assert vars(RotatingKVCache(max_size=8)) == wanted


def test_a_rotating_cache_fed_in_a_chunk_is_in_order_and_keeps_more_than_a_window() -> None:
    leaf = fed(RotatingKVCache(max_size=8), 5, 6)
    assert (leaf.offset, leaf._idx) == (11, 11)
    assert tokens(leaf.keys) == list(range(11)), "every token of the chunk has its whole window"
    leaf = fed(RotatingKVCache(max_size=8), 20, 6)
    assert (leaf.offset, leaf._idx) == (26, 13)
    assert tokens(leaf.keys) == list(range(13, 26)), "a window of 8 covers 7 tokens before the next one"


def test_a_rotating_cache_fed_one_by_one_overwrites_the_oldest_token() -> None:
    leaf = fed(RotatingKVCache(max_size=8), *[1] * 11)
    assert (leaf.offset, leaf._idx) == (11, 3)
    assert tokens(leaf.keys) == [8, 9, 10, 3, 4, 5, 6, 7]
    assert tokens(leaf._temporal_order(leaf.keys)) == list(range(3, 11))


def test_a_rotating_cache_that_is_not_full_has_room_after_its_index() -> None:
    leaf = fed(RotatingKVCache(max_size=8), 1, 1, 1)
    assert (leaf.offset, leaf._idx, leaf.keys.shape[2]) == (3, 3, 8)
    assert tokens(leaf._temporal_order(leaf.keys)) == [0, 1, 2]


def test_a_full_rotating_cache_replaces_its_first_place_next() -> None:
    """So a window that is put back begins with one token that nobody reads."""
    leaf = fed(RotatingKVCache(max_size=4), 4)
    leaf.update_and_fetch(mx.full((1, HEADS, 1, KEY_DIM), 9.0), mx.zeros((1, HEADS, 1, VALUE_DIM)))
    assert tokens(leaf.keys) == [9, 1, 2, 3]


def test_a_rotating_cache_can_be_trimmed_until_it_is_full() -> None:
    assert fed(RotatingKVCache(max_size=8), 7).is_trimmable()
    assert not fed(RotatingKVCache(max_size=8), 8).is_trimmable()


# ArraysCache, CacheList and others


def test_an_arrays_cache_has_a_list_of_arrays_and_two_attributes_for_batches() -> None:
    leaf = ArraysCache(2)
    assert vars(leaf) == {"cache": [None, None], "left_padding": None, "lengths": None}
    leaf[1] = mx.ones((1, 3))
    assert leaf.cache[1] is leaf[1]


def test_a_cache_list_has_its_caches_in_a_tuple() -> None:
    inner = KVCache(), ArraysCache(1)
    assert vars(CacheList(*inner)) == {"caches": inner}


@pytest.mark.parametrize("kind", [KVCache, RotatingKVCache, ArraysCache, CacheList])
def test_a_class_can_be_batched_exactly_if_it_has_merge(kind: type) -> None:
    assert callable(getattr(kind, "merge", None))
    assert not hasattr(ChunkedKVCache, "merge")


def test_a_chunked_cache_has_only_arrays_and_plain_values() -> None:
    leaf = fed(ChunkedKVCache(8), 5)
    plain = (mx.array, int, float, str, type(None))
    assert all(isinstance(value, plain) for value in vars(leaf).values())


def test_no_class_has_hidden_state_outside_its_attributes() -> None:
    for kind in (KVCache, RotatingKVCache, ArraysCache, CacheList, ChunkedKVCache):
        assert not any("__slots__" in vars(base) for base in kind.__mro__[:-1])


# The ways in


@pytest.mark.model
def test_a_model_without_caches_of_its_own_gets_a_kv_cache_for_each_layer() -> None:
    model = tiny_models.build(tiny_models.LLAMA)
    assert [type(leaf) for leaf in cache.make_prompt_cache(model)] == [KVCache] * len(model.layers)
    model.make_cache = lambda: [CacheList(KVCache())]
    assert [type(leaf) for leaf in cache.make_prompt_cache(model)] == [CacheList]


def test_a_batch_takes_filled_caches_and_gives_a_row_of_them_out() -> None:
    taken = inspect.signature(PromptProcessingBatch).parameters
    assert {
        "uids",
        "caches",
        "tokens",
        "samplers",
        "logits_processors",
        "stop_sequences",
        "max_tokens",
    } <= taken.keys()
    assert callable(PromptProcessingBatch.generate)
    for name in ("next", "extend", "filter", "extract_cache"):
        assert callable(getattr(GenerationBatch, name))
