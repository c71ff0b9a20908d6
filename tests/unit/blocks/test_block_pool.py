"""The pool's own rules; its invariants under load are in test_books."""

from __future__ import annotations

from agent_memory_core.blocks.block import Block, start_name
from agent_memory_core.blocks.block_pool import BlockPool


def block(name: str, parent: str = "root", nbytes: int = 10) -> Block:
    return Block(name.encode(), parent.encode(), (1,), nbytes, name)


def test_the_least_recently_used_goes_first_and_held_blocks_never() -> None:
    pool = BlockPool(30)
    a, b, c, d = (block(n) for n in "abcd")
    for each in (a, b, c):
        assert pool.put(each) is each
    pool.hold(a)
    pool.touch([b"b"])
    pool.put(d)
    assert [each.hash in pool for each in (a, b, c, d)] == [True, True, False, True]
    pool.check()


def test_a_released_sequence_loses_its_end_before_its_beginning() -> None:
    pool = BlockPool(30)
    chain = [block(n) for n in "abc"]
    for each in chain:
        pool.put(each)
        pool.hold(each)
    pool.release(chain)
    pool.put(block("d"))
    assert [each.hash in pool for each in chain] == [True, True, False]


def test_the_first_block_of_a_name_stays() -> None:
    pool = BlockPool(100)
    first, second = block("a"), Block(b"a", b"root", (1,), 10, "other bits")
    pool.put(first)
    assert pool.put(second) is first
    assert pool.block_bytes == 10


def test_what_cannot_fit_evicts_nobody() -> None:
    pool = BlockPool(30)
    pool.put(block("a"))
    assert pool.put(block("huge", nbytes=31)) is None
    assert not pool.reserve(31)
    assert b"a" in pool
    assert pool.reserve(30)
    assert b"a" not in pool
    pool.unreserve(30)
    assert pool.used == 0


def test_records_are_found_by_their_start_while_they_are_here() -> None:
    pool = BlockPool(30)
    for name in "abc":
        pool.put(block(name, "p"))
    starts = [start_name(b"p", (1,)), start_name(b"q", (1,))]
    assert [each.hash for each in pool.starting(starts, 2)] == [b"b", b"c"]
    before = pool.changes
    pool.discard([b"b", b"gone"])
    assert pool.changes == before + 1
    assert [each.hash for each in pool.starting(starts, 2)] == [b"a", b"c"]
    pool.check()
