"""The traces and the books of the benchmark of eviction: seeded, bounded, and the same as the pool of the product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from support.benchmark_scripts import load_benchmark

from agent_memory_core.blocks.block import Block
from agent_memory_core.blocks.block_pool import BlockPool

traces = load_benchmark("agent_traces")
rules = load_benchmark("eviction_policies")
eviction = load_benchmark("eviction")
RULES = tuple(rules.policies([], 1))
SMALL = {traces.chat: 12, traces.agent_run: 2, traces.question: 10, traces.council: 1}


def chains(shape: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Turns of sessions that all begin with block 0: so many blocks of a session each."""
    return [(0, *(100 * session + number for number in range(1, length + 1))) for session, length in shape]


turns_of_sessions = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 7)), min_size=1, max_size=40).map(
    chains
)


def pool_turn(pool: BlockPool, chain: Sequence[int]) -> int:
    """Serve a turn with the pool as the engine does: hold what is found, add the rest, release all."""
    found = itertools.takewhile(bool, (pool.get(str(name).encode()) for name in chain))
    path = [block for block in found if block is not None]
    known = len(path)
    for block in path:
        pool.hold(block)
    for name in chain[known:]:
        parent = path[-1].hash if path else b""
        new = pool.put(Block(str(name).encode(), parent, (name,), 1, None))
        if new is None:
            break
        pool.hold(new)
        path.append(new)
    pool.release(path)
    return known


@settings(max_examples=40, deadline=None)
@given(turns_of_sessions, st.integers(1, 20))
def test_least_recently_used_is_what_the_pool_does(turns: list[tuple[int, ...]], budget: int) -> None:
    books, pool = rules.Books(budget, rules.policies([], budget)["LRU"]), BlockPool(budget)
    names = {name for chain in turns for name in chain}
    for chain in turns:
        assert books.turn(chain) == pool_turn(pool, chain)
        assert set(books.nodes) == {name for name in names if str(name).encode() in pool}
        pool.check()


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=20, deadline=None)
@given(turns=turns_of_sessions, budget=st.integers(1, 20))
def test_every_rule_keeps_to_the_budget_and_to_whole_beginnings(
    rule: str, turns: list[tuple[int, ...]], budget: int
) -> None:
    as_turns = [traces.Turn(float(at), chain) for at, chain in enumerate(turns)]
    books, again = (rules.Books(budget, rules.policies(as_turns, budget)[rule]) for _ in range(2))
    for chain in turns:
        assert books.turn(chain) == again.turn(chain)
        assert list(books.nodes) == list(again.nodes)
        assert len(books.nodes) <= budget
        at_hand = [name in books.nodes for name in chain]
        assert at_hand == [True] * min(budget, len(chain)) + [False] * max(0, len(chain) - budget)
        assert all(node.parent is None or node.parent.name in books.nodes for node in books.nodes.values())


def test_a_trace_is_the_same_for_the_same_seed_and_its_chains_fork() -> None:
    turns = traces.make(SMALL, 5)
    assert turns == traces.make(SMALL, 5)
    assert turns != traces.make(SMALL, 6)
    assert [turn.at for turn in turns] == sorted(turn.at for turn in turns)
    parents: dict[int, int | None] = {}
    for turn in turns:
        for parent, name in itertools.pairwise((None, *turn.blocks)):
            assert name is not None
            assert parents.setdefault(name, parent) == parent


def test_a_recorded_trace_has_blocks_of_its_own_size(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "hash_ids": [0, 1]}\n{"timestamp": 500, "hash_ids": [0, 2]}\n')
    assert traces.recorded(file) == [traces.Turn(0, (0, 1)), traces.Turn(0.5, (0, 2))]
    whole = sum(rules.prefill_seconds(index) for index in range(8))
    assert sum(rules.prefill_seconds(index, 512) for index in range(2)) == pytest.approx(whole)


def test_whoever_knows_the_future_computes_least_again() -> None:
    turns = traces.make(SMALL, 1)
    row = eviction.curve(turns, [1 / 16])[0]
    assert row["the future"]["again"] == min(found["again"] for found in row.values())
    assert 0 < row["the future"]["again"] < row["LRU"]["again"] < 1


def test_all_at_hand_computes_nothing_again_and_nothing_at_hand_everything() -> None:
    turns = traces.make(SMALL, 2)
    lru = rules.policies([], 1)["LRU"]
    assert eviction.replay(turns, 10**9, lru) == {"again": 0, "hits": 1}
    nothing = eviction.replay(turns, 0, rules.policies([], 1)["LRU"])
    assert nothing == {"again": 1, "hits": 0}
