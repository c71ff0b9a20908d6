"""Hashes name tokens and history; nothing else can pose as them."""

from __future__ import annotations

from hypothesis import given, strategies as st

from agent_memory_core.blocks.block import (
    block_hash,
    chain,
    common_prefix,
    pack_tokens,
    record_hash,
    root_hash,
    unpack_tokens,
)

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(tokens)
def test_packed_tokens_are_little_endian_u32_and_come_back(ids: list[int]) -> None:
    packed = pack_tokens(ids)
    assert packed == b"".join(i.to_bytes(4, "little") for i in ids)
    assert unpack_tokens(packed) == tuple(ids)


@given(tokens, tokens, st.sampled_from([1, 2, 4]))
def test_chains_agree_exactly_as_far_as_the_tokens_do(a: list[int], b: list[int], size: int) -> None:
    root = root_hash({"model": "m"})
    shared = common_prefix(chain(root, a, size), chain(root, b, size))
    assert shared == min(common_prefix(a, b) // size, len(a) // size, len(b) // size)


def test_a_field_cannot_pose_as_another() -> None:
    assert root_hash({"a": "bc"}) != root_hash({"ab": "c"})
    assert root_hash({"a": "1", "b": "2"}) == root_hash({"b": "2", "a": "1"})
    assert root_hash({"a": "1"}) != root_hash({"a": "1", "b": ""})


def test_a_tail_never_bears_the_name_of_a_block() -> None:
    root = root_hash({})
    assert block_hash(root, [1, 2]) != record_hash("tail", root, [1, 2])


@given(tokens, tokens)
def test_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert n == common_prefix(tuple(a), b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
