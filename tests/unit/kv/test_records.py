"""Records: what is made of a live cache is accepted as such, and nothing else is."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import example, given, settings, strategies as st
from support import families
from support.live_caches import IDS, filled, run

from agent_memory_core.blocks.block import root_hash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.chain import TokenChain
from agent_memory_core.blocks.prefix_cache import PrefixCache
from agent_memory_core.config import KvBits
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.records import KvBlocks

pytestmark = pytest.mark.model

ROOT = root_hash({"a": "test"})
SIZE = 64
FAMILIES = ("llama", "gemma3", "gpt_oss", "lfm2", "baichuan_m1", "mamba2", "llama4")


@cache
def built(name: str, kv_bits: KvBits = None) -> tuple[Any, KvBlocks]:
    model = families.build(name)
    return model, KvBlocks(KvLayout(model), kv_bits, SIZE)


def chain_of(length: int) -> TokenChain:
    return TokenChain(ROOT, IDS[:length], SIZE)


def stored(name: str, length: int, kv_bits: KvBits = None) -> tuple[BlockPool, list[Any]]:
    """A pool with the records of a live cache of ``length`` tokens, and that cache."""
    model, blocks = built(name, kv_bits)
    pool, tokens, live = BlockPool(2**30), chain_of(length), filled(model, length)
    full = length // SIZE
    for record in blocks.seal(tokens, live, 0, full):
        pool.put(record)
    if blocks.resume.has_windows:
        near = [index for index in blocks.resume.window_blocks(length) if index < full]
        for record in blocks.windows(tokens, live, near):
            pool.put(record)
    tail = blocks.tail(tokens, live, length, length)
    if tail is not None:
        pool.put(tail)
    return pool, live


def error(x: mx.array, wanted: mx.array) -> float:
    """Relative root mean square error; infinite if shapes or dtypes differ."""
    if (x.shape, x.dtype) != (wanted.shape, wanted.dtype):
        return float("inf")
    x, wanted = x.astype(mx.float32), wanted.astype(mx.float32)
    return float(mx.sqrt(mx.mean((x - wanted) ** 2) / (mx.mean(wanted**2) + 1e-9)).item())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(1, 150), st.sampled_from([None, "6/4"]))
def test_a_match_of_all_that_was_kept_restores_the_live_cache(
    name: str, length: int, kv_bits: KvBits
) -> None:
    _, blocks = built(name, kv_bits)
    pool, live = stored(name, length, kv_bits)
    prompt = [*IDS[:length], 5]
    found = PrefixCache(pool, blocks.resume).match(ROOT, prompt, chain_of(length).hashes, None)
    assert found.tokens == length
    restored = blocks.restore(found, 8)
    one, other = (blocks.layout.cut(cache, "tail", 0, length) for cache in (live, restored))
    assert one.keys() == other.keys()
    for key, x in one.items():
        assert error(other[key], x) <= (0.15 if kv_bits is not None and key[-2:] in (".k", ".v") else 0)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(1, 150), st.sampled_from([None, "6/4"]), st.randoms())
def test_records_that_come_one_by_one_in_any_order_restore_the_same_bits(
    name: str, length: int, kv_bits: KvBits, luck: Random
) -> None:
    _, blocks = built(name, kv_bits)
    pool, _ = stored(name, length, kv_bits)
    prompt = [*IDS[:length], 5]
    found = PrefixCache(pool, blocks.resume).match(ROOT, prompt, chain_of(length).hashes, None)
    at_once = blocks.restore(found, 8)
    held = [(hit, hit.block) for hit in found.hits]
    luck.shuffle(held)
    here = luck.randrange(len(held) + 1)
    for hit, _ in held[here:]:
        hit.block = None
    restoration = blocks.restoring(found, 8)
    restoration.advance()
    for hit, block in held[here:]:
        hit.block = block
        restoration.advance()
    wanted, came = (blocks.layout.arrays(cache) for cache in (at_once, restoration.finish()))
    assert len(wanted) == len(came)
    assert all(mx.array_equal(one, other) for one, other in zip(wanted, came, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(("llama", "gemma3")), st.integers(70, 150), st.integers(0, 40))
@example("llama", 130, 10)
@example("gemma3", 130, 10)
def test_a_match_that_ends_inside_a_record_restores_the_shorter_prompt(
    name: str, length: int, left_out: int
) -> None:
    """Both keep enough of a block to be resumed after any of its tokens."""
    model, blocks = built(name)
    pool, _ = stored(name, length)
    shared = length - left_out
    prompt = [*IDS[:shared], 1000, 1001]
    tokens = TokenChain(ROOT, prompt, SIZE)
    found = PrefixCache(pool, blocks.resume).match(ROOT, prompt, tokens.hashes, None)
    assert found.tokens <= shared
    restored = blocks.restore(found, 8)
    assert [leaf.offset for leaf in restored] == [found.tokens] * len(restored) or not found.tokens
    rest = prompt[found.tokens :]
    whole = run(model, prompt, filled(model))
    assert mx.allclose(run(model, rest, restored), whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kv_bits", [None, "6/4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_record_that_was_made_here_fits_and_one_with_a_fault_does_not(name: str, kv_bits: KvBits) -> None:
    _, blocks = built(name, kv_bits)
    pool, _ = stored(name, 70, kv_bits)
    for record in list(pool._evictable.values()):
        kv = dict(record.kv)
        assert blocks.fits(kv, len(record.tokens), record.kind)
        assert not blocks.fits(kv | {"7.x": mx.zeros((1,))}, len(record.tokens), record.kind)
        for name_, x in kv.items():
            checked = record.kind != "tail" or name_.endswith((".k", ".v"))
            if checked:
                assert not blocks.fits(kv | {name_: x[..., :-1]}, len(record.tokens), record.kind)
                assert not blocks.fits(kv | {name_: x.astype(mx.int8)}, len(record.tokens), record.kind)


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_bounds(name: str) -> None:
    _, blocks = built(name)
    pool, _ = stored(name, 70)
    by_kind: dict[str, int] = {}
    for record in pool._evictable.values():
        by_kind[record.kind] = max(by_kind.get(record.kind, 0), record.nbytes)
    assert blocks.block_bytes == by_kind["block"] + by_kind.get("window", 0)
    if name != "llama4":
        assert by_kind["tail"] <= blocks.tail_bytes + 1024, "a kilobyte for plain values"


@pytest.mark.parametrize("name", ["gpt_oss", "lfm2", "llama"])
def test_an_end_that_its_layers_cannot_be_cut_back_to_is_kept_as_token_ids(name: str) -> None:
    model, blocks = built(name)
    live = filled(model, 60, *[1] * 60)
    tail = blocks.tail(chain_of(120), live, 70, 120)
    assert tail is not None
    assert tail.kind == ("tail" if name == "llama" else "token_tail")
    assert tail.tokens == tuple(IDS[64:70])
    assert (tail.nbytes == 0) == (tail.kind == "token_tail")


def test_nothing_is_kept_after_a_full_block_unless_there_is_a_state() -> None:
    for name, kind in (("llama", None), ("gpt_oss", None), ("lfm2", "tail")):
        model, blocks = built(name)
        tail = blocks.tail(chain_of(64), filled(model, 64), 64, 64)
        assert (tail and tail.kind) == kind


def test_a_model_that_does_not_resume_keeps_token_ids_only() -> None:
    model, _ = built("llama")
    blocks = KvBlocks(KvLayout(model), None, SIZE, resumes=False)
    assert blocks.resume.unsupported
    tail = blocks.tail(chain_of(40), filled(model, 40), 40, 40)
    assert tail is not None
    assert tail.kind == "token_tail"
