"""Which live caches hold what was matched. That their bits are those of the records is shown with real models."""

from __future__ import annotations

from agent_memory_core.blocks.block import Block, block_hash, chain, record_hash, root_hash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.live_caches import LiveCache, LiveCaches
from agent_memory_core.blocks.match import Hit, Match

BLOCK = 4
ROOT = root_hash({"namespace": "a"})
TOKENS = list(range(1, 11))
"""Two blocks and a tail of two."""


def tail_name(tokens: list[int]) -> bytes:
    full = len(tokens) // BLOCK
    hashes = chain(ROOT, tokens, BLOCK)
    return record_hash("tail", hashes[-1] if full else ROOT, tokens[full * BLOCK :])


def live(tokens: list[int], nbytes: int = 10, root: bytes = ROOT) -> LiveCache:
    names = tuple(chain(root, tokens, BLOCK))
    tail = tail_name(tokens) if len(tokens) % BLOCK else None
    return LiveCache(root, names, tail, len(tokens), nbytes, "kv")


def match(tokens: list[int], blocks: int, end: Hit | None = None) -> Match:
    hashes = chain(ROOT, tokens, BLOCK)[:blocks]
    return Match([Hit(key, BLOCK, None, False) for key in hashes], end)


def tail_hit(tokens: list[int], take: int) -> Hit:
    return Hit(tail_name(tokens), take, None, False, "tail")


def test_a_cache_holds_every_match_that_is_made_of_its_own_records() -> None:
    cache = live(TOKENS)
    assert cache.holds(ROOT, match(TOKENS, 2, tail_hit(TOKENS, 2)))
    assert cache.holds(ROOT, match(TOKENS, 2, tail_hit(TOKENS, 1)))
    assert cache.holds(ROOT, match(TOKENS, 1))
    second = Hit(chain(ROOT, TOKENS, BLOCK)[1], 3, None, False, "block")
    assert cache.holds(ROOT, match(TOKENS, 1, second))


def test_it_does_not_hold_what_other_records_give_even_of_the_same_tokens() -> None:
    cache = live(TOKENS)
    # The tail of an earlier turn was not rounded; of the block that came of it the cache has the rounded form.
    assert not cache.holds(ROOT, match(TOKENS, 1, tail_hit(TOKENS[:6], 2)))
    other = [*TOKENS[:4], 9, 9, 9, 9, 1]
    assert not cache.holds(ROOT, match(other, 2))
    assert not cache.holds(ROOT, match([*TOKENS, 3, 3], 3))
    assert not cache.holds(root_hash({"namespace": "b"}), match(TOKENS, 0, tail_hit(TOKENS[:2], 1)))


def test_a_cache_that_ends_with_the_match_is_taken_before_one_that_would_be_copied() -> None:
    caches = LiveCaches()
    longer, exact = live([*TOKENS, 11, 12, 13]), live(TOKENS[:8])
    caches.add(exact)
    caches.add(longer)
    assert caches.find(ROOT, match(TOKENS, 2)) is exact
    caches.remove(exact)
    assert caches.find(ROOT, match(TOKENS, 2)) is longer
    assert caches.nbytes == longer.nbytes


def block(tokens: list[int], nbytes: int = 10) -> Block:
    return Block(block_hash(ROOT, tokens), ROOT, tuple(tokens), nbytes, None)


def test_live_caches_go_before_blocks_beyond_their_share_and_after_them_within_it() -> None:
    pool = BlockPool(40, live_share_bytes=10)
    caches = [live([i, i], 10) for i in range(3)]
    for cache in caches:
        pool.keep_live(cache)
    blocks = [block([i]) for i in range(4)]
    for each in blocks:
        assert pool.put(each) is each
        pool.check()
    assert len(pool.live) == 1
    assert [each.hash in pool for each in blocks] == [False, True, True, True]
    assert pool.reserve(40)
    assert pool.live.nbytes == 0
    pool.check()


def test_a_live_cache_evicts_no_block_beyond_its_share_and_only_older_caches_below() -> None:
    pool = BlockPool(40, live_share_bytes=10)
    for i in range(4):
        pool.put(block([i]))
    assert not pool.has_room_to_live(11)
    assert pool.has_room_to_live(10)
    first, second = live([1, 1], 10), live([2, 2], 10)
    pool.keep_live(first)
    pool.keep_live(second)
    assert (len(pool), len(pool.live), pool.evicted) == (3, 1, 1)
    pool.check()


def test_forgetting_a_record_forgets_the_caches_that_hold_it() -> None:
    pool = BlockPool(40)
    pool.keep_live(live(TOKENS))
    pool.keep_live(live([7, 7, 7, 7, 7]))
    pool.discard([chain(ROOT, TOKENS, BLOCK)[0]])
    assert len(pool.live) == 1
    pool.evict_all()
    assert len(pool.live) == 0
    assert pool.used == 0
