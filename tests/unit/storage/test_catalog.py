"""The index: what is known, who reaches it, what may go, and that its counts are always those of the rows."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.stored_turns import BLOCK, FILE, IDENTITY, ROOT, records, wanted

from agent_memory_core.blocks.block import BlockHash, RecordKind, pack_tokens, record_hash, root_hash
from agent_memory_core.errors import InvalidRequest, SessionNotFound, StoreError, StoreFull, StoreUnreadable
from agent_memory_core.messages import validate_namespace, validate_session_id
from agent_memory_core.storage.branches import BranchRow
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.database import CatalogDamaged
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.record_table import MAX_CHILDREN

OTHER = root_hash({"model": "other"})
MANY = 1000 * FILE


def rows(tokens: Sequence[int], root: BlockHash = ROOT, nbytes: int = FILE) -> list[StoredRecord]:
    return [
        StoredRecord(r.key, r.parent, root, r.tokens, r.kind, nbytes, "00", len(r.tokens))
        for r in records(tokens, root, 8)
    ]


def keys(tokens: Sequence[int], root: BlockHash = ROOT) -> list[BlockHash]:
    return [row.key for row in rows(tokens, root)]


def commit(
    catalog: Catalog,
    tokens: Sequence[int],
    session: str = "s",
    branch: BranchRow | None = None,
    root: BlockHash = ROOT,
    max_branches: int = 16,
) -> BranchRow:
    wish = wanted(tokens, session, branch, root=root, max_branches=max_branches)
    return catalog.branches.commit(rows(tokens, root), wish)[0]


def further(kind: RecordKind, parent: BlockHash, tokens: Sequence[int] = ()) -> StoredRecord:
    """The row of a record beside the chain of a branch: a window record, or the tail of an earlier place."""
    key = record_hash(kind, parent, tokens)
    return StoredRecord(key, parent, ROOT, tuple(tokens), kind, FILE, "00", len(tokens))


def windows(tokens: Sequence[int], indices: Sequence[int]) -> list[StoredRecord]:
    """Window parts of these blocks of ``tokens``."""
    return [further("window", keys(tokens)[index]) for index in indices]


def named(rows: Sequence[StoredRecord]) -> tuple[BlockHash, ...]:
    return tuple(row.key for row in rows)


def commit_with(
    catalog: Catalog,
    tokens: Sequence[int],
    parts: Sequence[StoredRecord],
    session: str = "s",
    branch: BranchRow | None = None,
) -> tuple[BranchRow, list[StoredRecord]]:
    """Commit a branch that needs ``parts`` beside its chain."""
    wish = wanted(tokens, session, branch, dependencies=named(parts))
    return catalog.branches.commit([*rows(tokens), *parts], wish)


def ids(count: int, start: int = 0) -> tuple[int, ...]:
    return tuple(range(start, start + count))


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.db")
    catalog.records.register_root(ROOT, IDENTITY | {"name": "made"}, "default")
    catalog.records.register_root(OTHER, {"model": "other"}, "default")
    yield catalog
    assert catalog.records.recount(fix=False) == []
    catalog.close()


# What is known


def test_a_prefix_is_known_up_to_the_first_block_that_is_not_stored(catalog: Catalog) -> None:
    tokens = ids(600 * BLOCK)
    commit(catalog, tokens)
    chain = keys(tokens)
    assert catalog.records.known_prefix(chain) == 600
    assert catalog.records.known_prefix([]) == 0
    assert catalog.records.known_prefix([*chain, b"x" * 32]) == 600
    catalog.records.mark_lost([chain[300]])
    assert catalog.records.known_prefix(chain) == 300
    assert catalog.records.known_prefix(chain[301:]) == 299
    catalog.records.mark_lost([chain[0]])
    assert catalog.records.known_prefix(chain) == 0


def test_children_are_the_stored_blocks_and_tails_after_a_block_in_the_order_of_their_names(
    catalog: Catalog,
) -> None:
    ends = [(*ids(BLOCK), *ids(1 + n % BLOCK, 100 * n)) for n in range(9)]
    for n, tokens in enumerate(ends):
        commit(catalog, tokens, f"s{n}")
    parent = keys(ids(BLOCK))[0]
    children = catalog.records.children(parent)
    assert [child.key for child in children] == sorted(keys(tokens)[1] for tokens in ends)
    assert {child.tokens for child in children} == {tokens[BLOCK:] for tokens in ends}
    assert {child.kind for child in children} == {"tail", "block"}
    catalog.records.mark_lost([children[0].key])
    assert catalog.records.children(parent) == children[1:]
    assert [row.key for row in catalog.records.children(ROOT)] == [parent]


def test_of_very_many_children_the_newest_are_returned(catalog: Catalog) -> None:
    with catalog.transaction():
        for n in range(MAX_CHILDREN + 3):
            commit(catalog, [n], f"s{n}")
    children = catalog.records.children(ROOT)
    assert len(children) == MAX_CHILDREN
    assert {child.tokens for child in children} == {(n,) for n in range(3, MAX_CHILDREN + 3)}


def test_a_row_says_what_was_committed(catalog: Catalog) -> None:
    commit(catalog, ids(BLOCK + 1))
    for row in rows(ids(BLOCK + 1)):
        assert catalog.records.get(row.key) == row
    assert catalog.records.get(b"?" * 32) is None
    assert catalog.budget.totals() == {
        "files": 2,
        "bytes": 2 * FILE,
        "reserved": 0,
        "branches": 1,
        "sessions": 1,
    }


# Branches


def test_a_branch_moves_when_it_is_what_was_believed(catalog: Catalog) -> None:
    first = commit(catalog, ids(5))
    wish = wanted(ids(10), "s", first)
    second, superseded = catalog.branches.commit(rows(ids(10)), wish)
    assert (second.branch_id, second.generation) == (first.branch_id, first.generation + 1)
    assert [row.key for row in superseded] == [first.tail]
    assert catalog.records.get(superseded[0].key) is None
    assert catalog.branches.of_session("default", "s", ROOT) == [second]
    assert catalog.branches.tokens(second) == ids(10)


def test_a_commit_that_lost_the_race_becomes_a_fork_and_both_stay_whole(catalog: Catalog) -> None:
    base = commit(catalog, ids(9))
    won = commit(catalog, (*ids(9), 100, 101), "s", base)
    lost = commit(catalog, (*ids(9), 200, 201, 202, 203), "s", base)
    assert lost.branch_id != won.branch_id
    assert catalog.branches.of_session("default", "s", ROOT) == [won, lost]
    assert catalog.branches.tokens(won) == (*ids(9), 100, 101)
    assert catalog.branches.tokens(lost) == (*ids(9), 200, 201, 202, 203)


@pytest.mark.parametrize("why", ["forgotten", "of another session", "never there"])
def test_a_commit_to_a_branch_that_is_not_there_becomes_a_new_one(catalog: Catalog, why: str) -> None:
    believed = commit(catalog, ids(5), "other" if why == "of another session" else "s")
    if why == "forgotten":
        catalog.branches.forget("default", "s")
    if why == "never there":
        believed = BranchRow(77, 1, ROOT, "s", "default", ROOT, None, 0, 0, "", 0.0, 0.0)
    made = commit(catalog, ids(7), "s", believed)
    assert made.branch_id != believed.branch_id
    assert catalog.branches.tokens(made) == ids(7)
    if why == "of another session":
        assert catalog.branches.of_session("default", "other", ROOT) == [believed]


def test_beyond_the_limit_the_least_recently_used_other_branch_goes(catalog: Catalog) -> None:
    made = [commit(catalog, [n], max_branches=3) for n in range(3)]
    moved = commit(catalog, [0, 9], "s", made[0], max_branches=3)
    added = commit(catalog, [7], max_branches=3)
    kept = [branch.branch_id for branch in catalog.branches.of_session("default", "s", ROOT)]
    assert kept == [moved.branch_id, made[2].branch_id, added.branch_id]
    commit(catalog, [8], "another", max_branches=1)
    assert len(catalog.branches.of_session("default", "s", ROOT)) == 3
    alone = commit(catalog, [9], max_branches=1)
    assert catalog.branches.of_session("default", "s", ROOT) == [alone]


def test_tokens_of_a_branch_outlive_the_bytes_of_its_blocks(catalog: Catalog) -> None:
    branch = commit(catalog, ids(4 * BLOCK + 2))
    catalog.records.mark_lost(keys(ids(4 * BLOCK + 2)))
    assert catalog.branches.tokens(branch) == ids(4 * BLOCK + 2)
    assert catalog.budget.totals()["files"] == catalog.budget.total_bytes() == 0


def test_where_a_block_is_unknown_its_branch_ends_before_it(catalog: Catalog) -> None:
    tokens = ids(3 * BLOCK + 1)
    branch = catalog.branches.commit([], wanted(tokens))[0]
    assert catalog.branches.tokens(branch) == ()
    catalog.branches.commit(rows(tokens)[:1], wanted(ids(BLOCK), "other"))
    catalog.branches.commit(rows(tokens)[2:], wanted(tokens, "third"))
    assert catalog.branches.tokens(branch) == ()
    catalog.branches.commit(rows(tokens)[1:2], wanted(ids(2 * BLOCK), "other"))
    assert catalog.branches.tokens(branch) == tokens


def test_a_tail_that_another_branch_ends_at_is_not_superseded(catalog: Catalog) -> None:
    first = commit(catalog, ids(5))
    catalog.branches.fork("default", "s", "copy")
    _, superseded = catalog.branches.commit(rows(ids(6)), wanted(ids(6), "s", first))
    assert superseded == []
    (copy,) = catalog.branches.of_session("default", "copy", ROOT)
    assert catalog.branches.tokens(copy) == ids(5)
    assert first.tail is not None
    assert catalog.records.get(first.tail) is not None


def test_a_transaction_that_fails_leaves_nothing(catalog: Catalog) -> None:
    class Stop(Exception): ...

    def fail_inside() -> None:
        with catalog.transaction():
            commit(catalog, ids(9))
            assert catalog.budget.totals()["files"] == 3
            raise Stop

    with pytest.raises(Stop):
        fail_inside()
    assert catalog.budget.totals()["files"] == 0
    assert catalog.branches.session_state(ROOT, "default", "s") == "new"


def test_token_ids_that_their_name_does_not_prove_are_not_believed(catalog: Catalog) -> None:
    branch = commit(catalog, ids(2 * BLOCK + 2))
    chain = keys(ids(2 * BLOCK + 2))
    with catalog.transaction() as db:
        for key in chain[1:]:
            db.execute("UPDATE records SET tokens = ? WHERE key = ?", (pack_tokens((1, 2)), key))
    assert catalog.branches.tokens(branch) == ids(BLOCK)
    assert [child.tokens for child in catalog.records.children(chain[0])] == [()]
    assert [catalog.records.get_many(chain)[key].tokens for key in chain] == [ids(BLOCK), (), ()]


# Sessions


def test_a_session_says_why_it_has_no_branch(catalog: Catalog) -> None:
    assert catalog.branches.session_state(ROOT, "default", "s") == "new"
    commit(catalog, ids(3))
    assert catalog.branches.session_state(ROOT, "default", "s") == "live"
    assert catalog.branches.session_state(OTHER, "default", "s") == "other_model"
    assert catalog.branches.session_state(ROOT, "other namespace", "s") == "new"
    catalog.budget.evict(1)
    assert catalog.branches.session_state(ROOT, "default", "s") == "evicted"
    assert catalog.branches.sessions() == []
    catalog.branches.forget("default", "s")
    assert catalog.branches.session_state(ROOT, "default", "s") == "new"


def test_sessions_are_listed_by_last_use_with_what_they_reach(catalog: Catalog) -> None:
    commit(catalog, ids(9), "a")
    commit(catalog, (*ids(8), 50), "b")
    commit(catalog, (*ids(4), 60), "b")
    catalog.branches.commit(rows([1, 2], OTHER), wanted([1, 2], "c", root=OTHER, namespace="elsewhere"))
    catalog.branches.pin("default", "a", True)
    listed = catalog.branches.sessions()
    assert [
        (i.session_id, i.namespace, i.model, i.branches, i.tokens, i.nbytes, i.pinned) for i in listed
    ] == [
        ("c", "elsewhere", "other", 1, 2, FILE, False),
        ("b", "default", "made", 2, 9, 4 * FILE, False),
        ("a", "default", "made", 1, 9, 3 * FILE, True),
    ]
    assert [i.session_id for i in catalog.branches.sessions("default")] == ["b", "a"]
    assert catalog.branches.sessions("nobody's") == []


def test_a_fork_has_the_branches_of_all_models_and_goes_its_own_way(catalog: Catalog) -> None:
    old = commit(catalog, ids(6))
    commit(catalog, ids(3), "s", root=OTHER)
    before = catalog.budget.totals()["files"]
    catalog.branches.fork("default", "s", "new")
    assert catalog.budget.totals()["files"] == before
    (fork,) = catalog.branches.of_session("default", "new", ROOT)
    assert catalog.branches.tokens(fork) == ids(6)
    assert len(catalog.branches.of_session("default", "new")) == 2
    commit(catalog, ids(12), "new", fork)
    assert catalog.branches.of_session("default", "s", ROOT) == [old]
    with pytest.raises(InvalidRequest, match="exists already"):
        catalog.branches.fork("default", "s", "new")
    with pytest.raises(InvalidRequest, match="session id"):
        catalog.branches.fork("default", "s", "")
    with pytest.raises(SessionNotFound, match="nobody"):
        catalog.branches.fork("default", "nobody", "newer")
    with pytest.raises(SessionNotFound):
        catalog.branches.fork("elsewhere", "s", "newer")
    assert catalog.branches.session_state(ROOT, "default", "newer") == "new"


def test_forgetting_frees_what_only_that_session_reached_under_all_roots(catalog: Catalog) -> None:
    commit(catalog, ids(9), "a")
    commit(catalog, (*ids(8), 50), "b")
    commit(catalog, ids(6), "a", root=OTHER)
    gone = {row.key for row in catalog.branches.forget("default", "a")}
    assert gone == {keys(ids(9))[-1], *keys(ids(6), OTHER)}
    assert catalog.records.known_prefix(keys((*ids(8), 50))) == 3
    assert {row.key for row in catalog.branches.forget("default", "b")} == set(keys((*ids(8), 50)))
    assert catalog.budget.totals()["files"] == 0
    with pytest.raises(SessionNotFound, match="'b' in namespace 'default'"):
        catalog.branches.forget("default", "b")


def test_forgetting_takes_what_the_session_once_stored_and_rewound(catalog: Catalog) -> None:
    shared, private = ids(8), (*ids(8), *ids(8, 500))
    commit(catalog, shared, "other")
    first = commit(catalog, private, "s")
    commit(catalog, (*shared, 7), "s", first)
    assert catalog.records.known_prefix(keys(private)) == 4
    catalog.branches.forget("default", "s")
    assert catalog.records.known_prefix(keys(private)) == 2
    assert catalog.budget.totals()["files"] == 2


def test_what_was_forgotten_cannot_be_read_from_the_database_files(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.db")
    secret = [0x5EC8E701 + n for n in range(40)]
    commit(catalog, secret)
    needle = b"".join(n.to_bytes(4, "little") for n in secret[:BLOCK])
    assert any(needle in path.read_bytes() for path in tmp_path.iterdir())
    catalog.branches.forget("default", "s")
    catalog.scrub()
    assert not any(needle in path.read_bytes() for path in tmp_path.iterdir())
    catalog.close()


def test_pins_hold_for_all_models_of_a_session_also_later_ones(catalog: Catalog) -> None:
    commit(catalog, ids(4), "s")
    catalog.branches.pin("default", "s", True)
    commit(catalog, ids(4), "s", root=OTHER)
    assert catalog.budget.evictable_bytes() == 0
    with pytest.raises(StoreFull):
        catalog.budget.evict(1)
    catalog.branches.pin("default", "s", False)
    assert catalog.budget.evictable_bytes() == 2 * FILE
    assert len(catalog.budget.evict(2 * FILE)) == 2
    with pytest.raises(SessionNotFound):
        catalog.branches.pin("default", "nobody", True)


@pytest.mark.parametrize(
    "fit", ["s", "../../etc/passwd", "a/b\\c", "'; DROP TABLE records; --", "ü🦊", "x" * 512, " "]
)
def test_any_text_can_name_a_session_or_a_namespace(catalog: Catalog, fit: str) -> None:
    assert validate_session_id(fit) == validate_namespace(fit) == fit
    branch = catalog.branches.commit(rows(ids(3)), wanted(ids(3), fit, namespace=fit))[0]
    assert catalog.branches.of_session(fit, fit, ROOT) == [branch]
    assert [info.session_id for info in catalog.branches.sessions(fit)] == [fit]
    assert len(catalog.branches.forget(fit, fit)) == 1


# What may go


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
    held, gone = catalog.budget.reserve(0, MANY, 1, [chain[1], b"?" * 32], other.branch_id)
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
    held, gone = catalog.budget.reserve(FILE, 4 * FILE, 0, [], None)
    assert gone == []
    more, gone = catalog.budget.reserve(2 * FILE, 4 * FILE, 0, [], None)
    assert len(gone) == 1
    assert catalog.budget.totals()["reserved"] == 3 * FILE
    catalog.budget.release(held)
    catalog.budget.release(more)
    with catalog.transaction() as db:
        db.execute("INSERT INTO reservations VALUES (99, '999999999.x', ?)", (4 * FILE,))
        db.execute("INSERT INTO holds VALUES (99, ?)", (keys(ids(8))[0],))
    held, gone = catalog.budget.reserve(4 * FILE, 4 * FILE, 0, [], None)
    assert len(gone) == 1
    catalog.budget.release(held)
    assert catalog.budget.totals()["reserved"] == 0


def test_a_volume_that_fills_up_evicts_below_the_quota(catalog: Catalog) -> None:
    commit(catalog, ids(8), "a")
    held, gone = catalog.budget.reserve(FILE, 1000 * FILE, 2 * FILE, [], None)
    assert len(gone) == 2
    catalog.budget.release(held)


# A rebuilt catalog


def test_rebuilt_rows_are_found_and_get_their_tokens_back_from_the_next_commit(catalog: Catalog) -> None:
    tokens = ids(2 * BLOCK + 2)
    lost = [StoredRecord(r.key, r.parent, ROOT, (), r.kind, r.nbytes, "00", r.ntok) for r in rows(tokens)]
    assert catalog.records.adopt([(row, 1.0) for row in reversed(lost)]) == 3
    assert catalog.records.adopt([(row, 1.0) for row in lost]) == 0
    assert catalog.records.known_prefix(keys(tokens)) == 3
    assert catalog.records.get(lost[0].key) == lost[0]
    longer = (*tokens, 98, 99)
    branch = catalog.branches.commit(rows(longer)[2:], wanted(longer))[0]
    assert catalog.branches.tokens(branch) == ()
    branch = catalog.branches.commit([], wanted(longer, "s", branch, token_ids=longer))[0]
    assert catalog.branches.tokens(branch) == longer


def test_wrong_tokens_are_not_given_to_a_rebuilt_row(catalog: Catalog) -> None:
    tokens = ids(2 * BLOCK)
    catalog.records.adopt(
        [(StoredRecord(r.key, r.parent, ROOT, (), "block", 9, "00", r.ntok), 1.0) for r in rows(tokens)]
    )
    catalog.branches.commit([], wanted(tokens, token_ids=(*ids(BLOCK), 9, 9, 9, 9)))
    assert [catalog.records.get_many([key])[key].tokens for key in keys(tokens)] == [ids(BLOCK), ()]


# What branches need beside their blocks


def test_a_branch_needs_those_of_its_parts_that_are_stored(catalog: Catalog) -> None:
    first, second, unknown = windows(ids(12), [0, 1, 2])
    wish = wanted(ids(12), dependencies=named([first, second, unknown]))
    branch, superseded = catalog.branches.commit([*rows(ids(12)), first, second], wish)
    assert superseded == []
    assert catalog.branches.dependencies(branch.branch_id) == {first.key, second.key}
    assert catalog.records.stored(named([first, unknown])) == {first.key}
    later, _ = catalog.branches.commit(
        [unknown], wanted(ids(12), "s", branch, dependencies=wish.dependencies)
    )
    assert catalog.branches.dependencies(later.branch_id) == set(wish.dependencies)
    assert catalog.branches.dependencies(later.branch_id + 1) == set()


def test_what_a_branch_needs_no_more_goes_as_it_moves_on(catalog: Catalog) -> None:
    old, kept, new = windows(ids(12), [0, 1, 2])
    branch, _ = commit_with(catalog, ids(9), [old, kept])
    moved, superseded = commit_with(catalog, ids(13), [kept, new], "s", branch)
    assert {row.key for row in superseded} == {old.key, branch.tail}
    assert catalog.branches.dependencies(moved.branch_id) == {kept.key, new.key}
    assert catalog.records.get(old.key) is None
    assert catalog.records.known_prefix(keys(ids(12))) == 3, "the block of a window that went stays"


def test_what_another_branch_needs_stays_and_goes_with_the_last_that_does(catalog: Catalog) -> None:
    shared = windows(ids(8), [0, 1])
    branch, _ = commit_with(catalog, ids(8), shared)
    catalog.branches.fork("default", "s", "copy")
    (copy,) = catalog.branches.of_session("default", "copy", ROOT)
    assert catalog.branches.dependencies(copy.branch_id) == set(named(shared))
    _, superseded = commit_with(catalog, ids(9), [], "s", branch)
    assert superseded == []
    assert (
        catalog.branches.dependencies(copy.branch_id)
        == catalog.records.stored(named(shared))
        == set(named(shared))
    )
    _, superseded = commit_with(catalog, ids(10), [], "copy", copy)
    assert set(named(superseded)) == set(named(shared))


def test_a_tail_that_becomes_a_part_is_not_superseded(catalog: Catalog) -> None:
    branch, _ = commit_with(catalog, ids(6), [])
    end = rows(ids(6))[-1]
    _, superseded = commit_with(catalog, ids(11), [end], "s", branch)
    assert superseded == []
    assert {row.key for row in catalog.records.tails(keys(ids(8)))} == {end.key, keys(ids(11))[-1]}
    catalog.records.mark_lost([end.key])
    assert {row.key for row in catalog.records.tails(keys(ids(8)))} == {keys(ids(11))[-1]}


def test_parts_change_with_their_branch_or_not_at_all(catalog: Catalog) -> None:
    before, after = windows(ids(8), [0, 1])
    branch, _ = commit_with(catalog, ids(8), [before])

    class Stop(Exception): ...

    def fail_inside() -> None:
        with catalog.transaction():
            commit_with(catalog, ids(9), [after], "s", branch)
            raise Stop

    with pytest.raises(Stop):
        fail_inside()
    assert catalog.branches.dependencies(branch.branch_id) == {before.key}
    assert catalog.records.get(before.key) is not None
    assert catalog.records.get(after.key) is None


def test_a_part_is_not_evicted_before_its_branch_nor_a_block_before_its_window(catalog: Catalog) -> None:
    parts = [*windows(ids(8), [0, 1]), further("tail", ROOT, ids(2))]
    commit_with(catalog, ids(8), parts, "old")
    commit(catalog, ids(8, 100), "young")
    catalog.branches.pin("default", "young", True)
    assert catalog.budget.evictable_bytes() == 5 * FILE
    gone = [row.key for _ in range(5) for row in catalog.budget.evict(1)]
    assert set(gone) == {*keys(ids(8)), *named(parts)}
    assert catalog.branches.session_state(ROOT, "default", "old") == "evicted"
    for block, window in zip(keys(ids(8)), named(parts), strict=False):
        assert gone.index(window) < gone.index(block)
    with pytest.raises(StoreFull):
        catalog.budget.evict(1)


def test_parts_count_in_the_bytes_of_their_session_and_of_what_is_pinned(catalog: Catalog) -> None:
    shared, own = windows(ids(8), [0, 1])
    commit_with(catalog, ids(8), [shared, own], "a")
    commit_with(catalog, ids(8), [shared], "b")
    assert {info.session_id: info.nbytes for info in catalog.branches.sessions()} == {
        "a": 4 * FILE,
        "b": 3 * FILE,
    }
    catalog.branches.pin("default", "b", True)
    assert catalog.budget.evictable_bytes() == FILE


def test_forgetting_takes_the_parts_that_only_that_session_needed(catalog: Catalog) -> None:
    shared, own = windows(ids(8), [0, 1])
    commit_with(catalog, ids(4), [shared], "b")
    commit_with(catalog, ids(8), [shared, own], "a")
    assert set(named(catalog.branches.forget("default", "a"))) == {own.key, keys(ids(8))[1]}
    assert set(named(catalog.branches.forget("default", "b"))) == {shared.key, keys(ids(4))[0]}
    commit_with(catalog, ids(4), [shared], "b")
    catalog.branches.fork("default", "b", "a")
    assert catalog.branches.forget("default", "b") == []
    assert set(named(catalog.branches.forget("default", "a"))) == {shared.key, keys(ids(4))[0]}
    with catalog.transaction() as db:
        assert db.execute("SELECT count(*) FROM dependencies").fetchone() == (0,)


def test_a_branch_beyond_the_limit_lets_go_of_its_parts(catalog: Catalog) -> None:
    (window,) = windows(ids(4), [0])
    commit_with(catalog, ids(4), [window])
    commit(catalog, ids(4, 100), max_branches=1)
    assert {row.key for row in catalog.budget.evict(2 * FILE)} == {window.key, *keys(ids(4))}


def test_the_audit_counts_parts(catalog: Catalog) -> None:
    (window,) = windows(ids(4), [0])
    commit_with(catalog, ids(4), [window])
    assert catalog.records.recount(fix=False) == []
    with catalog.transaction() as db:
        db.execute("UPDATE records SET refs = 0 WHERE key = ?", (window.key,))
    assert catalog.records.recount(fix=True) == ["1 records with a wrong count of references"]
    catalog.branches.pin("default", "s", True)
    with pytest.raises(StoreFull):
        catalog.budget.evict(1)


def test_a_part_that_a_rebuild_left_without_words_gets_them_back_from_its_branch(catalog: Catalog) -> None:
    early, empty = further("tail", keys(ids(4))[0], ids(3, 4)), further("tail", keys(ids(4))[0])
    first = further("tail", ROOT, ids(2))
    alien = further("tail", keys(ids(4))[0], (70, 71))
    lost = [replace(row, tokens=()) for row in (*rows(ids(9)), early, empty, first, alien)]
    catalog.records.adopt([(row, 1.0) for row in lost])
    wish = wanted(ids(9), token_ids=ids(9), dependencies=named([early, empty, first, alien]))
    catalog.branches.commit([], replace(wish, session_id="wrong", token_ids=ids(9, 50)))
    assert {row.tokens for row in catalog.records.tails([ROOT, *keys(ids(8))])} == {()}
    catalog.branches.commit([], wish)
    found = {row.key: row.tokens for row in catalog.records.tails([ROOT, *keys(ids(8))])}
    assert found == {
        early.key: early.tokens,
        empty.key: (),
        first.key: first.tokens,
        alien.key: (),
        keys(ids(9))[-1]: (8,),
    }


# Verdicts


def test_a_verdict_stands_until_the_next_one_and_other_catalogs_read_it(tmp_path: Path) -> None:
    catalog, other = Catalog(tmp_path / "catalog.db"), Catalog(tmp_path / "catalog.db")
    assert catalog.note("a model") is None
    for verdict in ("good", "bad"):
        catalog.write_note("a model", verdict)
        assert other.note("a model") == verdict
    assert other.note("another model") is None
    other.close()
    catalog.close()
    with pytest.raises(StoreError, match="closed"):
        catalog.write_note("a model", "good")


# The database itself


def test_threads_share_a_catalog(catalog: Catalog) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        branch: BranchRow | None = None
        for length in range(1, 30):
            tokens = ids(length, 1000 * number)
            branch = commit(catalog, tokens, f"s{number}", branch)
            if catalog.branches.tokens(branch) != tokens or branch.generation != length:
                wrong.append((number, length))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert catalog.budget.totals()["branches"] == 4


def test_a_catalog_damaged_while_open_knows_nothing_and_refuses_writes(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.db")
    branch = commit(catalog, ids(40))
    # Another writer makes this one read the pages again.
    other = sqlite3.connect(tmp_path / "catalog.db")
    other.execute("UPDATE totals SET files = files")
    other.commit()
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    size = (tmp_path / "catalog.db").stat().st_size
    with (tmp_path / "catalog.db").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    assert catalog.records.known_prefix(keys(ids(40))) == 0
    assert catalog.branches.tokens(branch) == ()
    assert catalog.branches.of_session("default", "s", ROOT) == []
    assert catalog.failed_reads >= 3
    with pytest.raises(StoreError):
        catalog.branches.sessions()
    with pytest.raises(StoreError):
        commit(catalog, ids(8))
    catalog.close()
    with pytest.raises(CatalogDamaged):
        Catalog(tmp_path / "catalog.db")


def test_a_database_of_another_kind_is_damage_and_a_newer_one_is_refused(tmp_path: Path) -> None:
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.executescript("CREATE TABLE records (x); PRAGMA user_version = 2")
    foreign.close()
    with pytest.raises(CatalogDamaged):
        Catalog(tmp_path / "foreign.db")
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.executescript("PRAGMA user_version = 1000000")
    newer.close()
    with pytest.raises(StoreUnreadable, match="upgrade"):
        Catalog(tmp_path / "newer.db")
    with pytest.raises(CatalogDamaged):
        Catalog(tmp_path)
    with pytest.raises(StoreUnreadable, match="cannot be opened"):
        Catalog(tmp_path / "nowhere" / "catalog.db")


def test_a_closed_catalog_says_so(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.db")
    catalog.close()
    with pytest.raises(StoreError, match="closed"):
        catalog.records.known_prefix([b"x" * 32])
    with pytest.raises(StoreError, match="closed"):
        commit(catalog, ids(3))


# The model: a few sets and a dictionary that must always agree with the database

SESSIONS = ("a", "b", "c")


class Books(RuleBasedStateMachine):
    """Random turns, retries, forks, losses and evictions against a plain model of what is reached.

    The model knows the tokens of every branch and the set of rows that must be there because a branch reaches
    them; the catalog may hold more, but nothing that hangs from nothing.
    """

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.catalog = Catalog(Path(self.folder.name) / "catalog.db")
        self.branches: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.parts: dict[int, set[BlockHash]] = {}
        self.pinned: set[str] = set()
        self.lost: set[BlockHash] = set()

    def teardown(self) -> None:
        self.catalog.close()
        self.folder.cleanup()

    @rule(
        session=st.sampled_from(SESSIONS),
        start=st.integers(0, 30),
        new=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        needed=st.sets(st.integers(0, 6), max_size=3),
        given=st.sets(st.integers(0, 6), max_size=3),
        data=st.data(),
        stale=st.booleans(),
    )
    def turn(
        self,
        session: str,
        start: int,
        new: list[int],
        needed: set[int],
        given: set[int],
        data: st.DataObject,
        stale: bool,
    ) -> None:
        mine = sorted(i for i, (owner, _) in self.branches.items() if owner == session)
        chosen = data.draw(st.sampled_from([None, *mine]))
        known = self.branches[chosen][1] if chosen is not None else ()
        tokens = (*known[:start], *new)
        rows_now = {row.branch_id: row for row in self.catalog.branches.of_session("default", session, ROOT)}
        full = range(len(tokens) // BLOCK)
        parts, made_parts = (windows(tokens, [i for i in full if i in some]) for some in (needed, given))
        wish = wanted(tokens, session, rows_now.get(chosen) if chosen else None, dependencies=named(parts))
        if stale:
            wish = replace(wish, generation=wish.generation - 1)
        moves = chosen is not None and not stale
        before = self.parts[chosen] if chosen is not None and moves else set()
        can = set(self.catalog.records.keys()) | set(named(made_parts)) | before
        made, superseded = self.catalog.branches.commit([*rows(tokens), *made_parts], wish)
        assert (made.branch_id == chosen) == moves
        self.branches[made.branch_id] = (session, tokens)
        self.parts[made.branch_id] = set(wish.dependencies) & can
        self.lost -= {*keys(tokens), *named(made_parts)}
        live = {row.branch_id for row in self.catalog.branches.of_session("default", session, ROOT)}
        assert not set(named(superseded)) & self.reached()
        assert not (before - self.reached()) & set(self.catalog.records.keys())
        for gone in set(mine) - live:
            assert len(mine) >= 16
            self._gone(gone)

    def _gone(self, branch_id: int) -> None:
        del self.branches[branch_id], self.parts[branch_id]

    @rule(old=st.sampled_from(SESSIONS), new=st.sampled_from(SESSIONS))
    def fork(self, old: str, new: str) -> None:
        owners = {owner for owner, _ in self.branches.values()}
        if old not in owners or self.catalog.branches.session_state(ROOT, "default", new) != "new":
            with pytest.raises((SessionNotFound, InvalidRequest)):
                self.catalog.branches.fork("default", old, new)
            return
        self.catalog.branches.fork("default", old, new)
        copied = [i for i, (owner, _) in sorted(self.branches.items()) if owner == old]
        for row, source in zip(self.catalog.branches.of_session("default", new, ROOT), copied, strict=True):
            self.branches[row.branch_id] = (new, self.branches[source][1])
            self.parts[row.branch_id] = set(self.parts[source])

    @rule(session=st.sampled_from(SESSIONS))
    def forget(self, session: str) -> None:
        before = set(self.catalog.records.keys())
        try:
            gone = {row.key for row in self.catalog.branches.forget("default", session) if row.nbytes}
        except SessionNotFound:
            assert all(owner != session for owner, _ in self.branches.values())
            return
        for i in [i for i, (owner, _) in self.branches.items() if owner == session]:
            self._gone(i)
        self.pinned.discard(session)
        assert before - gone == set(self.catalog.records.keys())
        assert not gone & self.reached()

    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        if self.branches:
            session = data.draw(st.sampled_from(sorted({owner for owner, _ in self.branches.values()})))
            self.catalog.branches.pin("default", session, pinned)
            (self.pinned.add if pinned else self.pinned.discard)(session)

    @rule(data=st.data())
    def lose_a_file(self, data: st.DataObject) -> None:
        stored = sorted(self.catalog.records.keys())
        if stored:
            key = data.draw(st.sampled_from(stored))
            self.catalog.records.mark_lost([key])
            self.lost.add(key)

    @rule(count=st.integers(1, 12))
    def evict(self, count: int) -> None:
        evictable, before = self.catalog.budget.evictable_bytes(), self.catalog.budget.total_bytes()
        try:
            gone = self.catalog.budget.evict(count * FILE)
        except StoreFull:
            assert evictable < count * FILE
            assert self.catalog.budget.total_bytes() == before
            return
        assert evictable >= count * FILE
        assert before - self.catalog.budget.total_bytes() == count * FILE == sum(row.nbytes for row in gone)
        live = {
            row.branch_id
            for name in SESSIONS
            for row in self.catalog.branches.of_session("default", name, ROOT)
        }
        expired = set(self.branches) - live
        assert all(self.branches[i][0] not in self.pinned for i in expired)
        for i in expired:
            self._gone(i)
        self.lost -= {row.key for row in gone}

    def reached(self) -> set[BlockHash]:
        chains = {key for _, tokens in self.branches.values() for key in keys(tokens)}
        return chains.union(*self.parts.values())

    @invariant()
    def counts_are_those_of_the_rows(self) -> None:
        assert self.catalog.records.recount(fix=False) == []

    @invariant()
    def every_branch_is_whole(self) -> None:
        rows_now = [
            row for name in SESSIONS for row in self.catalog.branches.of_session("default", name, ROOT)
        ]
        assert {
            row.branch_id: (row.session_id, self.catalog.branches.tokens(row)) for row in rows_now
        } == self.branches

    @invariant()
    def every_branch_has_its_parts(self) -> None:
        with self.catalog.transaction():
            assert {i: self.catalog.branches.dependencies(i) for i in self.branches} == self.parts

    @invariant()
    def what_a_branch_reaches_is_stored_unless_it_was_lost(self) -> None:
        stored = set(self.catalog.records.keys())
        assert self.reached() - stored <= self.lost
        assert not stored & self.lost

    @invariant()
    def nothing_hangs_from_nothing(self) -> None:
        with self.catalog.transaction() as db:
            orphans = db.execute(
                "SELECT count(*) FROM records WHERE parent <> ? AND parent NOT IN (SELECT key FROM records)",
                (ROOT,),
            ).fetchone()
        assert orphans == (0,)


Books.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBooks = Books.TestCase
