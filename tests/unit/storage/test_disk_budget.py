"""What may be evicted, in which order, and what is set aside for a turn that is being written."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.catalog_rows import commit, commit_with, evictable_bytes, further, keys, named, rows, window_rows
from support.stored_turns import (
    BLOCK,
    FILE,
    MANY,
    OTHER,
    ROOT,
    ids,
    wanted,
)

from agent_memory_core.blocks.block import root_hash
from agent_memory_core.errors import OverBudget, SessionNotFound, StoreFull
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.disk_budget import Limits


def test_what_no_branch_reaches_goes_first_leaf_first_and_oldest_first(catalog: Catalog) -> None:
    first = commit(catalog, ids(12), "s")
    commit(catalog, ids(4), "s", first)
    other = commit(catalog, ids(8, 100), "other")
    loose = keys(ids(12))
    assert [row.key for row in catalog.budget.evict(1)] == [loose[2]]
    assert [row.key for row in catalog.budget.evict(1)] == [loose[1]]
    assert catalog.branches.of_session("default", "other", ROOT) == [other]
    assert catalog.budget.evict(0) == []


def test_of_what_no_branch_reaches_the_oldest_goes_first(catalog: Catalog) -> None:
    for age, start in ((50, 0), (90, 100), (10, 200)):
        tokens = ids(BLOCK, start)
        catalog.records.adopt([(row, 1000.0 - age) for row in rows(tokens)])
    assert [catalog.budget.evict(1)[0].tokens[0] for _ in range(3)] == [100, 0, 200]


def test_then_the_least_recently_used_branch_that_is_not_pinned_expires(catalog: Catalog) -> None:
    made = {name: commit(catalog, ids(8, 100 * n), name) for n, name in enumerate("abc")}
    catalog.branches.pin("default", "a", True)
    commit(catalog, ids(9, 100), "b", made["b"])
    assert {row.key for row in catalog.budget.evict(2 * FILE)} == set(keys(ids(8, 200)))
    assert catalog.branches.session_state(ROOT, "default", "c") == "evicted"
    assert {row.key for row in catalog.budget.evict(3 * FILE)} == set(keys(ids(9, 100)))
    with pytest.raises(StoreFull, match="unpin"):
        catalog.budget.evict(1)
    assert catalog.records.known_prefix(keys(ids(8))) == 2


def test_an_eviction_that_cannot_suffice_evicts_nothing(catalog: Catalog) -> None:
    commit(catalog, ids(8), "a")
    commit(catalog, ids(8, 100), "b")
    catalog.branches.pin("default", "a", True)
    with pytest.raises(StoreFull, match="disk budget"):
        catalog.budget.evict(3 * FILE)
    assert catalog.budget.totals()["files"] == 4
    assert catalog.branches.session_state(ROOT, "default", "b") == "live"


def test_what_a_turn_builds_on_is_held(catalog: Catalog) -> None:
    commit(catalog, ids(12), "a")
    other = commit(catalog, ids(8, 100), "b")
    chain = keys(ids(12))
    held, gone = catalog.budget.reserve(
        ROOT, 0, Limits(MANY, shortfall=1), [chain[1], b"?" * 32], other.branch_id
    )
    assert [row.key for row in gone] == [chain[2]]
    with pytest.raises(StoreFull):
        catalog.budget.evict(1, other.branch_id)
    assert catalog.records.known_prefix(chain) == 2
    assert catalog.branches.session_state(ROOT, "default", "b") == "live"
    assert catalog.records.recount(fix=False) == []
    catalog.budget.release(held)
    assert {row.key for row in catalog.budget.evict(1, other.branch_id)} == {chain[1]}


def test_reservations_count_until_they_are_released_or_their_process_is_dead(
    catalog: Catalog, tmp_path: Path
) -> None:
    commit(catalog, ids(8), "a")
    held, gone = catalog.budget.reserve(ROOT, FILE, Limits(4 * FILE), [], None)
    assert gone == []
    more, gone = catalog.budget.reserve(ROOT, 2 * FILE, Limits(4 * FILE), [], None)
    assert len(gone) == 1
    assert catalog.budget.totals()["reserved"] == 3 * FILE
    catalog.budget.release(held)
    catalog.budget.release(more)
    with catalog.transaction() as db:
        db.execute("INSERT INTO reservations VALUES (99, 'ended', ?, ?)", (ROOT, 4 * FILE))
        db.execute("INSERT INTO holds VALUES (99, ?)", (keys(ids(8))[0],))
    held, gone = catalog.budget.reserve(ROOT, 4 * FILE, Limits(4 * FILE), [], None)
    assert len(gone) == 1
    catalog.budget.release(held)
    assert catalog.budget.totals()["reserved"] == 0


def test_a_volume_that_fills_up_evicts_below_the_quota(catalog: Catalog) -> None:
    commit(catalog, ids(8), "a")
    held, gone = catalog.budget.reserve(ROOT, FILE, Limits(1000 * FILE, shortfall=2 * FILE), [], None)
    assert len(gone) == 2
    catalog.budget.release(held)


def test_a_dependency_is_not_evicted_before_its_branch_nor_a_block_before_its_window(
    catalog: Catalog,
) -> None:
    dependencies = [*window_rows(ids(8), [0, 1]), further("tail", ROOT, ids(2))]
    commit_with(catalog, ids(8), dependencies, "old")
    commit(catalog, ids(8, 100), "young")
    catalog.branches.pin("default", "young", True)
    assert evictable_bytes(catalog) == 5 * FILE
    gone = [row.key for _ in range(5) for row in catalog.budget.evict(1)]
    assert set(gone) == {*keys(ids(8)), *named(dependencies)}
    assert catalog.branches.session_state(ROOT, "default", "old") == "evicted"
    for block, window in zip(keys(ids(8)), named(dependencies), strict=False):
        assert gone.index(window) < gone.index(block)
    with pytest.raises(StoreFull):
        catalog.budget.evict(1)


def test_dependencies_count_in_the_bytes_of_their_session_and_of_what_is_pinned(catalog: Catalog) -> None:
    shared, own = window_rows(ids(8), [0, 1])
    commit_with(catalog, ids(8), [shared, own], "a")
    commit_with(catalog, ids(8), [shared], "b")
    assert {info.session_id: info.nbytes for info in catalog.branches.sessions()} == {
        "a": 4 * FILE,
        "b": 3 * FILE,
    }
    catalog.branches.pin("default", "b", True)
    assert evictable_bytes(catalog) == FILE


def test_pins_hold_for_all_models_of_a_session_also_later_ones(catalog: Catalog) -> None:
    commit(catalog, ids(4), "s")
    catalog.branches.pin("default", "s", True)
    commit(catalog, ids(4), "s", root=OTHER)
    assert evictable_bytes(catalog) == 0
    with pytest.raises(StoreFull):
        catalog.budget.evict(1)
    catalog.branches.pin("default", "s", False)
    assert evictable_bytes(catalog) == 2 * FILE
    assert len(catalog.budget.evict(2 * FILE)) == 2
    with pytest.raises(SessionNotFound):
        catalog.branches.pin("default", "nobody", True)


def test_a_branch_beyond_the_limit_lets_go_of_its_dependencies(catalog: Catalog) -> None:
    (window,) = window_rows(ids(4), [0])
    commit_with(catalog, ids(4), [window])
    commit(catalog, ids(4, 100), max_branches=1)
    assert {row.key for row in catalog.budget.evict(2 * FILE)} == {window.key, *keys(ids(4))}


def test_a_namespace_keeps_to_its_own_budget_and_evicts_its_own(catalog: Catalog) -> None:
    theirs, third = ids(16, 900), root_hash({"model": "third"})
    catalog.records.register_root(third, {"model": "third"}, "tenant")
    catalog.branches.commit(rows(theirs, third), wanted(theirs, "theirs", root=third, namespace="tenant"))
    commit(catalog, ids(12), "old")
    commit(catalog, ids(12, 100), "new")
    before = catalog.budget.bytes_of("tenant")
    held, gone = catalog.budget.reserve(ROOT, 2 * FILE, Limits(MANY, namespace=6 * FILE), [], None)
    assert {row.root for row in gone} == {ROOT}
    assert catalog.budget.bytes_of("default") <= 6 * FILE
    assert catalog.budget.bytes_of("tenant") == before
    assert [info.session_id for info in catalog.branches.sessions("default")] == ["new"]
    catalog.budget.release(held)
    with pytest.raises(OverBudget, match=r"namespace 'default'.*namespace_budget_mb"):
        catalog.budget.reserve(ROOT, 7 * FILE, Limits(MANY, namespace=6 * FILE), [], None)
    assert catalog.budget.totals()["reserved"] == 0
