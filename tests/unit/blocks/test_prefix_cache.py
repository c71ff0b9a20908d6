"""The longest stored prefix, wherever it lies, and never the whole prompt."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings, strategies as st

from agent_memory_core.blocks import block, prefix_cache
from agent_memory_core.blocks.block import (
    START_TOKENS,
    Block,
    BlockHash,
    RecordKind,
    block_hash,
    chain,
    record_hash,
    root_hash,
    start_name,
)
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.match import Match
from agent_memory_core.blocks.prefix_cache import MAX_SIBLINGS, MIN_BLOCK_PART, MIN_TAIL_PART, PrefixCache
from agent_memory_core.blocks.resume_policy import (
    EveryToken,
    LastTokens,
    ResumePolicy,
    ResumeRequirement,
    WholeState,
)

ROOT = root_hash({"a": "b"})
SIZE = 64
IDS = list(range(100, 356))
POLICIES = [
    ResumePolicy(SIZE, (EveryToken(), other)) for other in (WholeState(), LastTokens(SIZE), EveryToken())
]


@dataclass(frozen=True)
class Row:
    key: BlockHash
    parent: BlockHash
    tokens: tuple[int, ...]
    kind: RecordKind = "block"

    @property
    def start(self) -> BlockHash:
        return start_name(self.parent, self.tokens)


@dataclass
class Tier:
    rows: dict[BlockHash, Row] = field(default_factory=dict)

    def known_prefix(self, hashes: list[BlockHash]) -> int:
        return next((i for i, key in enumerate(hashes) if key not in self.rows), len(hashes))

    def starting(self, starts: list[BlockHash], most: int) -> list[Row]:
        found = {start: [row for row in self.rows.values() if row.start == start][-most:] for start in starts}
        return [row for rows in found.values() for row in rows]

    def named(self, keys: list[BlockHash]) -> list[Row]:
        return [self.rows[key] for key in keys if key in self.rows]

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
    pool: BlockPool, ids: list[int], tier: Tier | None = None, without: Collection[BlockHash] = ()
) -> Match:
    return PrefixCache(pool, ResumePolicy(SIZE)).match(ROOT, ids, chain(ROOT, ids, SIZE), tier, without)


def test_one_token_is_left_even_of_a_prompt_that_is_known_whole() -> None:
    found = match(pool_with(4), IDS)
    assert found.tokens == len(IDS) - 1
    assert (len(found.blocks), found.end.take if found.end else 0) == (3, SIZE - 1)


def test_memory_and_tier_are_walked_as_one() -> None:
    pool, tier, parent = pool_with(1), Tier(), ROOT
    keys = chain(ROOT, IDS, SIZE)
    for index, key in enumerate(keys[:3]):
        tier.rows[key] = Row(key, parent, tuple(IDS[index * SIZE : (index + 1) * SIZE]))
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
    def reused(tokens: tuple[int, ...], *, kind: RecordKind) -> int:
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


@pytest.mark.parametrize("in_tier", [False, True])
def test_a_tail_that_the_caller_names_is_found_among_thousands_that_begin_alike(in_tier: bool) -> None:
    """Without its name only the newest ones are looked at, of which each shares the same few tokens."""
    pool, tier = BlockPool(10**6), Tier()
    own = tuple(IDS[:40])
    tails = [own, *((*IDS[:START_TOKENS], n, n) for n in range(3 * MAX_SIBLINGS))]
    names = [record_hash("tail", ROOT, tokens) for tokens in tails]
    for key, tokens in zip(names, tails, strict=True):
        if in_tier:
            tier.rows[key] = Row(key, ROOT, tokens, "tail")
        else:
            pool.put(Block(key, ROOT, tokens, 1, None, kind="tail"))
    prefixes = PrefixCache(pool, ResumePolicy(SIZE))
    hashes = chain(ROOT, IDS, SIZE)
    assert prefixes.match(ROOT, IDS, hashes, tier).tokens == START_TOKENS
    assert prefixes.match(ROOT, IDS, hashes, tier, tails=[names[0]]).tokens == len(own)
    other = prefixes.match(ROOT, [7, *IDS], chain(ROOT, [7, *IDS], SIZE), tier, tails=[names[0]])
    assert other.tokens == 0, "a name is a hint: the token ids decide"


# Layers of every kind, against an oracle that tries every position

SMALL = 4
PART_OF_BLOCK, PART_OF_TAIL = 3, 2
"""In place of `MIN_BLOCK_PART`, `MIN_TAIL_PART` and `START_TOKENS`, which blocks as small as these could not reach."""


@dataclass(frozen=True)
class Line:
    """One conversation, and what was stored of it: so many blocks, tails and words that end at these places.

    Of its blocks, those ``without_window`` have no window record. ``forks`` is how much it shares with the first line.
    """

    tokens: list[int]
    depth: int
    cuts: set[int]
    without_window: set[int]
    words: set[int]
    forks: int = 0


places = st.sets(st.integers(0, 18), max_size=4)
lines = st.lists(
    st.builds(
        Line,
        st.lists(st.integers(0, 1), min_size=1, max_size=18),
        st.integers(0, 4),
        cuts=places,
        without_window=st.sets(st.integers(0, 4), max_size=3),
        words=places,
        forks=st.integers(0, 12),
    ),
    min_size=1,
    max_size=4,
)


@dataclass(frozen=True)
class Layers:
    """What the layers of a made-up model keep: every token, the last tokens in windows of these lengths, a state."""

    append: bool
    windows: tuple[int, ...]
    state: bool

    @property
    def policy(self) -> ResumePolicy:
        requirements: list[ResumeRequirement] = [LastTokens(window) for window in self.windows]
        requirements += [EveryToken()] * self.append + [WholeState()] * self.state
        return ResumePolicy(SMALL, tuple(requirements))

    @property
    def longest(self) -> int:
        return max(self.windows, default=0)

    @property
    def inside_block(self) -> bool:
        return not self.state and all(window >= SMALL for window in self.windows)


models = st.builds(
    Layers, st.booleans(), st.lists(st.sampled_from([2, 3, 4, 5, 9]), max_size=2).map(tuple), st.booleans()
).filter(lambda model: model.append or model.windows or model.state)


def stored_of(line: Line, tokens: list[int], *, empty_tails: bool) -> Iterator[Row]:
    """The records of a line of ``tokens``, each after what it follows."""
    names = [ROOT, *chain(ROOT, tokens, SMALL)]
    ends = [place for place in line.cuts | line.words if place <= len(tokens)]
    depth = max([line.depth, *(place // SMALL for place in ends)])
    for index, key in enumerate(names[1 : depth + 1]):
        yield Row(key, names[index], tuple(tokens[index * SMALL : (index + 1) * SMALL]))
        if index not in line.without_window:
            yield Row(record_hash("window", key), key, (), "window")
    kinds: tuple[tuple[RecordKind, set[int]], ...] = (("tail", line.cuts), ("token_tail", line.words))
    for kind, place in [(kind, place) for kind, found in kinds for place in sorted(found)]:
        rest = tuple(tokens[place // SMALL * SMALL : place])
        if place in ends and (rest or (kind == "tail" and empty_tails and place)):
            parent = names[place // SMALL]
            yield Row(record_hash(kind, parent, rest), parent, rest, kind)


@dataclass
class Oracle:
    """Says of any position what it takes to resume there, from the records that can be had."""

    model: Layers
    prompt: list[int]
    rows: dict[BlockHash, Row]

    def __post_init__(self) -> None:
        self.hashes = chain(ROOT, self.prompt, SMALL)
        usable = self.hashes[: (len(self.prompt) - 1) // SMALL]
        self.known = next((i for i, key in enumerate(usable) if key not in self.rows), len(usable))

    def deepest(self) -> tuple[int, list[list[tuple[BlockHash, int]]]]:
        """The deepest position, and the lists of records and their tokens that each suffice for it."""
        for position in range(len(self.prompt) - 1, 0, -1):
            if found := list(self.ways(position)):
                return position, found
        return 0, [[]]

    def ways(self, position: int) -> Iterator[list[tuple[BlockHash, int]]]:
        full, more = divmod(position, SMALL)
        if full > self.known:
            return
        blocks = [(key, SMALL) for key in self.hashes[:full]]
        first = max(0, position - self.model.longest) // SMALL
        windows = [record_hash("window", key) for key in self.hashes[first:full] if self.model.windows]
        for end in self.ends(full, more):
            of_end = (
                [record_hash("window", end.key)] if end and end.kind == "block" and self.model.windows else []
            )
            if all(name in self.rows for name in (*windows, *of_end)):
                yield [
                    *blocks,
                    *([(end.key, more)] if end else []),
                    *((name, 0) for name in (*windows, *of_end)),
                ]

    def ends(self, full: int, more: int) -> Iterator[Row | None]:
        """What may hold the last ``more`` tokens; a part of a record only after the last known block."""
        if more == 0 and not self.model.state:
            yield None
        parent = self.hashes[full - 1] if full else ROOT
        wanted = tuple(self.prompt[full * SMALL : full * SMALL + more])
        for row in self.rows.values():
            if row.parent != parent or row.kind not in ("block", "tail"):
                continue
            if row.kind == "tail" and row.tokens == wanted and (more or self.model.state):
                yield row
            elif self.model.inside_block and full == self.known and more and row.tokens[:more] == wanted:
                least = PART_OF_BLOCK if row.kind == "block" else PART_OF_TAIL
                if more >= least or more == len(row.tokens):
                    yield row


def found_in(
    model: Layers, prompt: list[int], rows: list[Row], places: list[str], without: set[BlockHash]
) -> tuple[Match, Tier | None, BlockPool]:
    """Match a prompt with each record in memory, on the tier, or both; what it follows is on the tier too."""
    pool, tier = BlockPool(10_000), Tier()
    by_key = {row.key: row for row in rows}
    for row, place in zip(rows, places, strict=True):
        if place in ("pool", "both"):
            pool.put(Block(row.key, row.parent, row.tokens, 1, None, row.kind))
        above: Row | None = row if place in ("tier", "both") else None
        while above is not None:
            tier.rows[above.key] = above
            above = by_key.get(above.parent)
    seen = tier if tier.rows else None
    cache = PrefixCache(pool, model.policy)
    return cache.match(ROOT, prompt, chain(ROOT, prompt, SMALL), seen, without), seen, pool


def listed(match: Match) -> list[tuple[BlockHash, int]]:
    return [(hit.key, hit.take) for hit in match.hits]


@given(
    models,
    lines,
    st.integers(1, 18),
    st.lists(st.integers(0, 1), max_size=6),
    st.sets(st.integers(0, 30), max_size=3),
    st.integers(0, 2**16),
)
@example(
    # The block that shares most with the prompt has no window record; the tail that shares less needs none.
    Layers(append=True, windows=(5,), state=False),
    [Line([0] * 7 + [1], 2, set(), {1}, set()), Line([1], 0, {7}, set(), set(), forks=6)],
    7,
    [0, 0],
    set(),
    0,
)
@example(  # The tail of the whole prompt leaves nothing to evaluate; the one before it does.
    Layers(append=True, windows=(), state=True), [Line([0] * 6, 1, {5, 6}, set(), set())], 6, [], set(), 0
)
@settings(max_examples=400, deadline=None)
def test_a_match_is_the_deepest_place_that_every_layer_can_restore_and_names_what_it_takes(
    model: Layers, lines: list[Line], cut: int, more: list[int], missing: set[int], seed: int
) -> None:
    unique: dict[BlockHash, Row] = {}
    for line in lines:
        tokens = [*lines[0].tokens[: line.forks], *line.tokens] if line is not lines[0] else line.tokens
        unique |= {row.key: row for row in stored_of(line, tokens, empty_tails=model.state)}
    rows, prompt = list(unique.values()), [*lines[0].tokens[:cut], *more]
    without = {row.key for index, row in enumerate(rows) if index in missing}
    position, ways = Oracle(
        model, prompt, {k: row for k, row in unique.items() if k not in without}
    ).deepest()
    chance = random.Random(seed)
    mixed = [chance.choice(["pool", "tier", "both"]) for _ in rows]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "MIN_BLOCK_PART", PART_OF_BLOCK)
        patch.setattr(prefix_cache, "MIN_TAIL_PART", PART_OF_TAIL)
        patch.setattr(block, "START_TOKENS", PART_OF_TAIL)
        for where in (["pool"] * len(rows), ["tier"] * len(rows), mixed):
            match, tier, pool = found_in(model, prompt, rows, where, without)
            assert match.tokens == position
            assert listed(match) in ways
            assert not {hit.key for hit in match.hits} & without
            for hit in match.hits:
                assert hit.kind == unique[hit.key].kind
                assert hit.block is pool.get(hit.key)
                assert hit.stored == (tier is not None and hit.key in tier.rows)
            assert match.in_blocks == (model.append or not match.tokens)
            seen.append(listed(match))
    assert seen[0] == seen[1] == seen[2], "memory and tier give the same match"


def test_what_can_never_be_stored_is_never_matched() -> None:
    pool = pool_with(4)
    found = PrefixCache(pool, ResumePolicy(SIZE, unsupported=True)).match(
        ROOT, IDS, chain(ROOT, IDS, SIZE), None
    )
    assert found == Match()


def test_blocks_that_hold_nothing_need_not_be_loaded() -> None:
    tier, tokens = Tier(), tuple(IDS[SIZE : SIZE + 5])
    (first, *_) = chain(ROOT, IDS, SIZE)
    tail = record_hash("tail", first, tokens)
    tier.rows = {first: Row(first, ROOT, tuple(IDS[:SIZE])), tail: Row(tail, first, tokens, "tail")}
    cache = PrefixCache(BlockPool(100), ResumePolicy(SIZE, (WholeState(),)))
    found = cache.match(ROOT, IDS, chain(ROOT, IDS, SIZE), tier)
    assert found.tokens == SIZE + 5
    assert [hit.key for hit in found.missing] == [tail]


def test_a_tail_whose_words_the_tier_lost_is_no_tail_without_words() -> None:
    (first, *_) = chain(ROOT, IDS, SIZE)
    lost = record_hash("tail", first, IDS[SIZE : SIZE + 5])
    tier = Tier({first: Row(first, ROOT, tuple(IDS[:SIZE])), lost: Row(lost, first, (), "tail")})
    for policy in POLICIES:
        found = PrefixCache(BlockPool(100), policy).match(ROOT, IDS, chain(ROOT, IDS, SIZE), tier)
        assert lost not in {hit.key for hit in found.hits}


def test_what_memory_holds_is_found_even_where_the_tier_lost_its_words() -> None:
    tokens = tuple(IDS[:20])
    key = record_hash("tail", ROOT, tokens)
    pool, tier = BlockPool(100), Tier({key: Row(key, ROOT, (), "tail")})
    pool.put(Block(key, ROOT, tokens, 1, None, kind="tail"))
    for policy in POLICIES:
        assert PrefixCache(pool, policy).match(ROOT, IDS, chain(ROOT, IDS, SIZE), tier).tokens == 20
