"""The longest stored prefix, wherever it lies, and never the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent_memory_core.block import Block, BlockHash, Kind, block_hash, chain, record_hash, root_hash
from agent_memory_core.block_pool import BlockPool
from agent_memory_core.prefix_cache import MIN_BLOCK_PART, MIN_TAIL_PART, Match, PrefixCache
from agent_memory_core.resume import ResumeRule

ROOT = root_hash({"a": "b"})
SIZE = 64
IDS = list(range(100, 356))


@dataclass
class Row:
    key: BlockHash
    parent: BlockHash
    tokens: tuple[int, ...]
    kind: Kind = "block"


@dataclass
class Tier:
    rows: dict[BlockHash, tuple[BlockHash, tuple[int, ...]]] = field(default_factory=dict)

    def known_prefix(self, hashes: list[BlockHash]) -> int:
        return next((i for i, key in enumerate(hashes) if key not in self.rows), len(hashes))

    def children(self, parent: BlockHash) -> list[Row]:
        return [Row(key, above, tokens) for key, (above, tokens) in self.rows.items() if above == parent]

    def tails(self, parents: list[BlockHash]) -> list[Row]:
        return []

    def stored(self, keys: list[BlockHash]) -> set[BlockHash]:
        return self.rows.keys() & set(keys)


def pool_with(count: int, ids: list[int] = IDS) -> BlockPool:
    pool = BlockPool(10_000)
    parent = ROOT
    for index, key in enumerate(chain(ROOT, ids, SIZE)[:count]):
        pool.put(Block(key, parent, tuple(ids[index * SIZE : (index + 1) * SIZE]), 1, None))
        parent = key
    return pool


def match(
    pool: BlockPool, ids: list[int], tier: Tier | None = None, without: set[BlockHash] = frozenset()
) -> Match:
    return PrefixCache(pool, ResumeRule(SIZE)).match(ROOT, ids, chain(ROOT, ids, SIZE), tier, without)


def test_one_token_is_left_even_of_a_prompt_that_is_known_whole() -> None:
    found = match(pool_with(4), IDS)
    assert found.tokens == len(IDS) - 1
    assert (len(found.blocks), found.end.take if found.end else 0) == (3, SIZE - 1)


def test_memory_and_tier_are_walked_as_one() -> None:
    pool, tier, parent = pool_with(1), Tier(), ROOT
    keys = chain(ROOT, IDS, SIZE)
    for index, key in enumerate(keys[:3]):
        tier.rows[key] = (parent, tuple(IDS[index * SIZE : (index + 1) * SIZE]))
        parent = key
    found = match(pool, IDS, tier)
    assert [hit.block is not None for hit in found.blocks] == [True, False, False]
    assert [hit.stored for hit in found.blocks] == [True, True, True]
    assert match(pool, IDS).tokens == SIZE


def test_a_tail_is_used_as_far_as_it_agrees() -> None:
    pool = pool_with(1)
    parent = chain(ROOT, IDS, SIZE)[0]
    tokens = (*IDS[SIZE : SIZE + 40], 1, 2, 3)
    pool.put(Block(record_hash("tail", parent, tokens), parent, tokens, 1, None, kind="tail"))
    found = match(pool, IDS)
    assert found.end is not None
    assert (found.tokens, found.end.take) == (SIZE + 40, 40)


def test_a_short_tail_is_used_whole_but_neither_tail_nor_block_in_a_small_part() -> None:
    def reused(tokens: tuple[int, ...], *, kind: Kind) -> int:
        pool = BlockPool(100)
        pool.put(Block(record_hash(kind, ROOT, tokens), ROOT, tokens, 1, None, kind=kind))
        return match(pool, IDS).tokens

    assert reused(tuple(IDS[:5]), kind="tail") == 5
    assert reused((*IDS[: MIN_TAIL_PART - 1], 1), kind="tail") == 0
    assert reused((*IDS[:MIN_TAIL_PART], 1), kind="tail") == MIN_TAIL_PART
    assert reused((*IDS[: MIN_BLOCK_PART - 1], 1), kind="block") == 0
    assert reused((*IDS[:MIN_BLOCK_PART], 1), kind="block") == MIN_BLOCK_PART


def test_a_block_whose_ids_are_not_the_prompts_is_no_hit() -> None:
    pool = BlockPool(100)
    key = block_hash(ROOT, IDS[:SIZE])
    pool.put(Block(key, ROOT, tuple([0] * SIZE), 1, None))
    assert match(pool, IDS).tokens == 0


def test_what_follows_a_hit_that_cannot_be_had_is_of_no_use() -> None:
    found = match(pool_with(4), IDS, without={chain(ROOT, IDS, SIZE)[1]})
    assert (len(found.blocks), found.end, found.tokens) == (1, None, SIZE)
