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
from agent_memory_core.storage.catalog import MAX_CHILDREN, BlockRow, BranchRow, Catalog
from agent_memory_core.storage.database import CatalogDamaged

OTHER = root_hash({"model": "other"})
MANY = 1000 * FILE


def rows(tokens: Sequence[int], root: BlockHash = ROOT, nbytes: int = FILE) -> list[BlockRow]:
    return [
        BlockRow(r.key, r.parent, root, r.tokens, r.kind, nbytes, "00", len(r.tokens))
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
    return catalog.commit(rows(tokens, root), wish)[0]


def further(kind: RecordKind, parent: BlockHash, tokens: Sequence[int] = ()) -> BlockRow:
    """The row of a record beside the chain of a branch: a window record, or the tail of an earlier place."""
    key = record_hash(kind, parent, tokens)
    return BlockRow(key, parent, ROOT, tuple(tokens), kind, FILE, "00", len(tokens))


def windows(tokens: Sequence[int], indices: Sequence[int]) -> list[BlockRow]:
    """Window parts of these blocks of ``tokens``."""
    return [further("window", keys(tokens)[index]) for index in indices]


def named(rows: Sequence[BlockRow]) -> tuple[BlockHash, ...]:
    return tuple(row.key for row in rows)


def commit_with(
    catalog: Catalog,
    tokens: Sequence[int],
    parts: Sequence[BlockRow],
    session: str = "s",
    branch: BranchRow | None = None,
) -> tuple[BranchRow, list[BlockRow]]:
    """Commit a branch that needs ``parts`` beside its chain."""
    wish = wanted(tokens, session, branch, dependencies=named(parts))
    return catalog.commit([*rows(tokens), *parts], wish)


def ids(count: int, start: int = 0) -> tuple[int, ...]:
    return tuple(range(start, start + count))


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.db")
    catalog.register_root(ROOT, IDENTITY | {"name": "made"}, "default")
    catalog.register_root(OTHER, {"model": "other"}, "default")
    yield catalog
    assert catalog.audit() == []
    catalog.close()


# What is known


def test_a_prefix_is_known_up_to_the_first_block_that_is_not_stored(catalog: Catalog) -> None:
    tokens = ids(600 * BLOCK)
    commit(catalog, tokens)
    chain = keys(tokens)
    assert catalog.known_prefix(chain) == 600
    assert catalog.known_prefix([]) == 0
    assert catalog.known_prefix([*chain, b"x" * 32]) == 600
    catalog.drop([chain[300]])
    assert catalog.known_prefix(chain) == 300
    assert catalog.known_prefix(chain[301:]) == 299
    catalog.drop([chain[0]])
    assert catalog.known_prefix(chain) == 0


def test_children_are_the_stored_blocks_and_tails_after_a_block_in_the_order_of_their_names(
    catalog: Catalog,
) -> None:
    ends = [(*ids(BLOCK), *ids(1 + n % BLOCK, 100 * n)) for n in range(9)]
    for n, tokens in enumerate(ends):
        commit(catalog, tokens, f"s{n}")
    parent = keys(ids(BLOCK))[0]
    children = catalog.children(parent)
    assert [child.key for child in children] == sorted(keys(tokens)[1] for tokens in ends)
    assert {child.tokens for child in children} == {tokens[BLOCK:] for tokens in ends}
    assert {child.kind for child in children} == {"tail", "block"}
    catalog.drop([children[0].key])
    assert catalog.children(parent) == children[1:]
    assert [row.key for row in catalog.children(ROOT)] == [parent]


def test_of_very_many_children_the_newest_are_returned(catalog: Catalog) -> None:
    with catalog.transaction():
        for n in range(MAX_CHILDREN + 3):
            commit(catalog, [n], f"s{n}")
    children = catalog.children(ROOT)
    assert len(children) == MAX_CHILDREN
    assert {child.tokens for child in children} == {(n,) for n in range(3, MAX_CHILDREN + 3)}


def test_a_row_says_what_was_committed(catalog: Catalog) -> None:
    commit(catalog, ids(BLOCK + 1))
    for row in rows(ids(BLOCK + 1)):
        assert catalog.row(row.key) == row
    assert catalog.row(b"?" * 32) is None
    assert catalog.stats() == {"files": 2, "bytes": 2 * FILE, "reserved": 0, "branches": 1, "sessions": 1}


# Branches


def test_a_branch_moves_when_it_is_what_was_believed(catalog: Catalog) -> None:
    first = commit(catalog, ids(5))
    wish = wanted(ids(10), "s", first)
    second, superseded = catalog.commit(rows(ids(10)), wish)
    assert (second.branch_id, second.generation) == (first.branch_id, first.generation + 1)
    assert [row.key for row in superseded] == [first.tail]
    assert catalog.row(superseded[0].key) is None
    assert catalog.branches(ROOT, "default", "s") == [second]
    assert catalog.branch_tokens(second) == ids(10)


def test_a_commit_that_lost_the_race_becomes_a_fork_and_both_stay_whole(catalog: Catalog) -> None:
    base = commit(catalog, ids(9))
    won = commit(catalog, (*ids(9), 100, 101), "s", base)
    lost = commit(catalog, (*ids(9), 200, 201, 202, 203), "s", base)
    assert lost.branch_id != won.branch_id
    assert catalog.branches(ROOT, "default", "s") == [won, lost]
    assert catalog.branch_tokens(won) == (*ids(9), 100, 101)
    assert catalog.branch_tokens(lost) == (*ids(9), 200, 201, 202, 203)


@pytest.mark.parametrize("why", ["forgotten", "of another session", "never there"])
def test_a_commit_to_a_branch_that_is_not_there_becomes_a_new_one(catalog: Catalog, why: str) -> None:
    believed = commit(catalog, ids(5), "other" if why == "of another session" else "s")
    if why == "forgotten":
        catalog.forget("default", "s")
    if why == "never there":
        believed = BranchRow(77, 1, ROOT, "s", "default", ROOT, None, 0, 0, "", 0.0, 0.0)
    made = commit(catalog, ids(7), "s", believed)
    assert made.branch_id != believed.branch_id
    assert catalog.branch_tokens(made) == ids(7)
    if why == "of another session":
        assert catalog.branches(ROOT, "default", "other") == [believed]


def test_beyond_the_limit_the_least_recently_used_other_branch_goes(catalog: Catalog) -> None:
    made = [commit(catalog, [n], max_branches=3) for n in range(3)]
    moved = commit(catalog, [0, 9], "s", made[0], max_branches=3)
    added = commit(catalog, [7], max_branches=3)
    kept = [branch.branch_id for branch in catalog.branches(ROOT, "default", "s")]
    assert kept == [moved.branch_id, made[2].branch_id, added.branch_id]
    commit(catalog, [8], "another", max_branches=1)
    assert len(catalog.branches(ROOT, "default", "s")) == 3
    alone = commit(catalog, [9], max_branches=1)
    assert catalog.branches(ROOT, "default", "s") == [alone]


def test_tokens_of_a_branch_outlive_the_bytes_of_its_blocks(catalog: Catalog) -> None:
    branch = commit(catalog, ids(4 * BLOCK + 2))
    catalog.drop(keys(ids(4 * BLOCK + 2)))
    assert catalog.branch_tokens(branch) == ids(4 * BLOCK + 2)
    assert catalog.stats()["files"] == catalog.total_bytes() == 0


def test_where_a_block_is_unknown_its_branch_ends_before_it(catalog: Catalog) -> None:
    tokens = ids(3 * BLOCK + 1)
    branch = catalog.commit([], wanted(tokens))[0]
    assert catalog.branch_tokens(branch) == ()
    catalog.commit(rows(tokens)[:1], wanted(ids(BLOCK), "other"))
    catalog.commit(rows(tokens)[2:], wanted(tokens, "third"))
    assert catalog.branch_tokens(branch) == ()
    catalog.commit(rows(tokens)[1:2], wanted(ids(2 * BLOCK), "other"))
    assert catalog.branch_tokens(branch) == tokens


def test_a_tail_that_another_branch_ends_at_is_not_superseded(catalog: Catalog) -> None:
    first = commit(catalog, ids(5))
    catalog.fork("default", "s", "copy")
    _, superseded = catalog.commit(rows(ids(6)), wanted(ids(6), "s", first))
    assert superseded == []
    (copy,) = catalog.branches(ROOT, "default", "copy")
    assert catalog.branch_tokens(copy) == ids(5)
    assert first.tail is not None
    assert catalog.row(first.tail) is not None


def test_a_transaction_that_fails_leaves_nothing(catalog: Catalog) -> None:
    class Stop(Exception): ...

    def fail_inside() -> None:
        with catalog.transaction():
            commit(catalog, ids(9))
            assert catalog.stats()["files"] == 3
            raise Stop

    with pytest.raises(Stop):
        fail_inside()
    assert catalog.stats()["files"] == 0
    assert catalog.session_state(ROOT, "default", "s") == "new"


def test_a_branch_is_touched_at_most_once_a_minute(catalog: Catalog) -> None:
    branch = commit(catalog, [1])
    for seconds, written in ((50.0, False), (70.0, True)):
        before = branch.last_use - seconds
        with catalog.transaction() as db:
            db.execute("UPDATE branches SET last_use = ?", (before,))
        catalog.touch(branch.branch_id)
        (now,) = catalog.branches(ROOT, "default", "s")
        assert (now.last_use > before) == written
    catalog.touch(12345)


def test_token_ids_that_their_name_does_not_prove_are_not_believed(catalog: Catalog) -> None:
    branch = commit(catalog, ids(2 * BLOCK + 2))
    chain = keys(ids(2 * BLOCK + 2))
    with catalog.transaction() as db:
        for key in chain[1:]:
            db.execute("UPDATE blocks SET tokens = ? WHERE key = ?", (pack_tokens((1, 2)), key))
    assert catalog.branch_tokens(branch) == ids(BLOCK)
    assert [child.tokens for child in catalog.children(chain[0])] == [()]
    assert [catalog.rows(chain)[key].tokens for key in chain] == [ids(BLOCK), (), ()]


# Sessions


def test_a_session_says_why_it_has_no_branch(catalog: Catalog) -> None:
    assert catalog.session_state(ROOT, "default", "s") == "new"
    commit(catalog, ids(3))
    assert catalog.session_state(ROOT, "default", "s") == "live"
    assert catalog.session_state(OTHER, "default", "s") == "other_model"
    assert catalog.session_state(ROOT, "other namespace", "s") == "new"
    catalog.evict(1)
    assert catalog.session_state(ROOT, "default", "s") == "evicted"
    assert catalog.sessions() == []
    catalog.forget("default", "s")
    assert catalog.session_state(ROOT, "default", "s") == "new"


def test_sessions_are_listed_by_last_use_with_what_they_reach(catalog: Catalog) -> None:
    commit(catalog, ids(9), "a")
    commit(catalog, (*ids(8), 50), "b")
    commit(catalog, (*ids(4), 60), "b")
    catalog.commit(rows([1, 2], OTHER), wanted([1, 2], "c", root=OTHER, namespace="elsewhere"))
    catalog.pin("default", "a", True)
    listed = catalog.sessions()
    assert [
        (i.session_id, i.namespace, i.model, i.branches, i.tokens, i.nbytes, i.pinned) for i in listed
    ] == [
        ("c", "elsewhere", "other", 1, 2, FILE, False),
        ("b", "default", "made", 2, 9, 4 * FILE, False),
        ("a", "default", "made", 1, 9, 3 * FILE, True),
    ]
    assert [i.session_id for i in catalog.sessions("default")] == ["b", "a"]
    assert catalog.sessions("nobody's") == []


def test_a_fork_has_the_branches_of_all_models_and_goes_its_own_way(catalog: Catalog) -> None:
    old = commit(catalog, ids(6))
    commit(catalog, ids(3), "s", root=OTHER)
    before = catalog.stats()["files"]
    catalog.fork("default", "s", "new")
    assert catalog.stats()["files"] == before
    (fork,) = catalog.branches(ROOT, "default", "new")
    assert catalog.branch_tokens(fork) == ids(6)
    assert len(catalog.session_branches("default", "new")) == 2
    commit(catalog, ids(12), "new", fork)
    assert catalog.branches(ROOT, "default", "s") == [old]
    with pytest.raises(InvalidRequest, match="exists already"):
        catalog.fork("default", "s", "new")
    with pytest.raises(InvalidRequest, match="session id"):
        catalog.fork("default", "s", "")
    with pytest.raises(SessionNotFound, match="nobody"):
        catalog.fork("default", "nobody", "newer")
    with pytest.raises(SessionNotFound):
        catalog.fork("elsewhere", "s", "newer")
    assert catalog.session_state(ROOT, "default", "newer") == "new"


def test_forgetting_frees_what_only_that_session_reached_under_all_roots(catalog: Catalog) -> None:
    commit(catalog, ids(9), "a")
    commit(catalog, (*ids(8), 50), "b")
    commit(catalog, ids(6), "a", root=OTHER)
    gone = {row.key for row in catalog.forget("default", "a")}
    assert gone == {keys(ids(9))[-1], *keys(ids(6), OTHER)}
    assert catalog.known_prefix(keys((*ids(8), 50))) == 3
    assert {row.key for row in catalog.forget("default", "b")} == set(keys((*ids(8), 50)))
    assert catalog.stats()["files"] == 0
    with pytest.raises(SessionNotFound, match="'b' in namespace 'default'"):
        catalog.forget("default", "b")


def test_forgetting_takes_what_the_session_once_stored_and_rewound(catalog: Catalog) -> None:
    shared, private = ids(8), (*ids(8), *ids(8, 500))
    commit(catalog, shared, "other")
    first = commit(catalog, private, "s")
    commit(catalog, (*shared, 7), "s", first)
    assert catalog.known_prefix(keys(private)) == 4
    catalog.forget("default", "s")
    assert catalog.known_prefix(keys(private)) == 2
    assert catalog.stats()["files"] == 2


def test_what_was_forgotten_cannot_be_read_from_the_database_files(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.db")
    secret = [0x5EC8E701 + n for n in range(40)]
    commit(catalog, secret)
    needle = b"".join(n.to_bytes(4, "little") for n in secret[:BLOCK])
    assert any(needle in path.read_bytes() for path in tmp_path.iterdir())
    catalog.forget("default", "s")
    catalog.scrub()
    assert not any(needle in path.read_bytes() for path in tmp_path.iterdir())
    catalog.close()


def test_pins_hold_for_all_models_of_a_session_also_later_ones(catalog: Catalog) -> None:
    commit(catalog, ids(4), "s")
    catalog.pin("default", "s", True)
    commit(catalog, ids(4), "s", root=OTHER)
    assert catalog.evictable_bytes() == 0
    with pytest.raises(StoreFull):
        catalog.evict(1)
    catalog.pin("default", "s", False)
    assert catalog.evictable_bytes() == 2 * FILE
    assert len(catalog.evict(2 * FILE)) == 2
    with pytest.raises(SessionNotFound):
        catalog.pin("default", "nobody", True)


@pytest.mark.parametrize(
    "fit", ["s", "../../etc/passwd", "a/b\\c", "'; DROP TABLE blocks; --", "ü🦊", "x" * 512, " "]
)
def test_any_text_can_name_a_session_or_a_namespace(catalog: Catalog, fit: str) -> None:
    assert validate_session_id(fit) == validate_namespace(fit) == fit
    branch = catalog.commit(rows(ids(3)), wanted(ids(3), fit, namespace=fit))[0]
    assert catalog.branches(ROOT, fit, fit) == [branch]
    assert [info.session_id for info in catalog.sessions(fit)] == [fit]
    assert len(catalog.forget(fit, fit)) == 1


# What may go


def test_what_no_branch_reaches_goes_first_leaf_first_and_oldest_first(catalog: Catalog) -> None:
    first = commit(catalog, ids(12), "s")
    commit(catalog, ids(4), "s", first)
    other = commit(catalog, ids(8, 100), "other")
    loose = keys(ids(12))
    assert [row.key for row in catalog.evict(1)] == [loose[2]]
    assert [row.key for row in catalog.evict(1)] == [loose[1]]
    assert catalog.branches(ROOT, "default", "other") == [other]
    assert catalog.evict(0) == []


def test_of_what_no_branch_reaches_the_oldest_goes_first(catalog: Catalog) -> None:
    for age, start in ((50, 0), (90, 100), (10, 200)):
        tokens = ids(BLOCK, start)
        catalog.rebuild([(row, 1000.0 - age) for row in rows(tokens)])
    assert [catalog.evict(1)[0].tokens[0] for _ in range(3)] == [100, 0, 200]


def test_then_the_least_recently_used_branch_that_is_not_pinned_expires(catalog: Catalog) -> None:
    made = {name: commit(catalog, ids(8, 100 * n), name) for n, name in enumerate("abc")}
    catalog.pin("default", "a", True)
    commit(catalog, ids(9, 100), "b", made["b"])
    assert {row.key for row in catalog.evict(2 * FILE)} == set(keys(ids(8, 200)))
    assert catalog.session_state(ROOT, "default", "c") == "evicted"
    assert {row.key for row in catalog.evict(3 * FILE)} == set(keys(ids(9, 100)))
    with pytest.raises(StoreFull, match="unpin"):
        catalog.evict(1)
    assert catalog.known_prefix(keys(ids(8))) == 2


def test_an_eviction_that_cannot_suffice_evicts_nothing(catalog: Catalog) -> None:
    commit(catalog, ids(8), "a")
    commit(catalog, ids(8, 100), "b")
    catalog.pin("default", "a", True)
    with pytest.raises(StoreFull, match="disk budget"):
        catalog.evict(3 * FILE)
    assert catalog.stats()["files"] == 4
    assert catalog.session_state(ROOT, "default", "b") == "live"


def test_what_a_turn_builds_on_is_held(catalog: Catalog) -> None:
    commit(catalog, ids(12), "a")
    other = commit(catalog, ids(8, 100), "b")
    chain = keys(ids(12))
    held, gone = catalog.reserve(0, MANY, 1, [chain[1], b"?" * 32], other.branch_id)
    assert [row.key for row in gone] == [chain[2]]
    with pytest.raises(StoreFull):
        catalog.evict(1, other.branch_id)
    assert catalog.known_prefix(chain) == 2
    assert catalog.session_state(ROOT, "default", "b") == "live"
    assert catalog.audit() == []
    catalog.release(held)
    assert {row.key for row in catalog.evict(1, other.branch_id)} == {chain[1]}


def test_reservations_count_until_they_are_released_or_their_process_is_dead(
    catalog: Catalog, tmp_path: Path
) -> None:
    commit(catalog, ids(8), "a")
    held, gone = catalog.reserve(FILE, 4 * FILE, 0, [], None)
    assert gone == []
    more, gone = catalog.reserve(2 * FILE, 4 * FILE, 0, [], None)
    assert len(gone) == 1
    assert catalog.stats()["reserved"] == 3 * FILE
    catalog.release(held)
    catalog.release(more)
    with catalog.transaction() as db:
        db.execute("INSERT INTO reservations VALUES (99, '999999999.x', ?)", (4 * FILE,))
        db.execute("INSERT INTO holds VALUES (99, ?)", (keys(ids(8))[0],))
    held, gone = catalog.reserve(4 * FILE, 4 * FILE, 0, [], None)
    assert len(gone) == 1
    catalog.release(held)
    assert catalog.stats()["reserved"] == 0


def test_a_volume_that_fills_up_evicts_below_the_quota(catalog: Catalog) -> None:
    commit(catalog, ids(8), "a")
    held, gone = catalog.reserve(FILE, 1000 * FILE, 2 * FILE, [], None)
    assert len(gone) == 2
    catalog.release(held)


# A rebuilt catalog


def test_rebuilt_rows_are_found_and_get_their_tokens_back_from_the_next_commit(catalog: Catalog) -> None:
    tokens = ids(2 * BLOCK + 2)
    lost = [BlockRow(r.key, r.parent, ROOT, (), r.kind, r.nbytes, "00", r.ntok) for r in rows(tokens)]
    assert catalog.rebuild([(row, 1.0) for row in reversed(lost)]) == 3
    assert catalog.rebuild([(row, 1.0) for row in lost]) == 0
    assert catalog.known_prefix(keys(tokens)) == 3
    assert catalog.row(lost[0].key) == lost[0]
    longer = (*tokens, 98, 99)
    branch = catalog.commit(rows(longer)[2:], wanted(longer))[0]
    assert catalog.branch_tokens(branch) == ()
    branch = catalog.commit([], wanted(longer, "s", branch, token_ids=longer))[0]
    assert catalog.branch_tokens(branch) == longer


def test_wrong_tokens_are_not_given_to_a_rebuilt_row(catalog: Catalog) -> None:
    tokens = ids(2 * BLOCK)
    catalog.rebuild(
        [(BlockRow(r.key, r.parent, ROOT, (), "block", 9, "00", r.ntok), 1.0) for r in rows(tokens)]
    )
    catalog.commit([], wanted(tokens, token_ids=(*ids(BLOCK), 9, 9, 9, 9)))
    assert [catalog.rows([key])[key].tokens for key in keys(tokens)] == [ids(BLOCK), ()]


# What branches need beside their blocks


def test_a_branch_needs_those_of_its_parts_that_are_stored(catalog: Catalog) -> None:
    first, second, unknown = windows(ids(12), [0, 1, 2])
    wish = wanted(ids(12), dependencies=named([first, second, unknown]))
    branch, superseded = catalog.commit([*rows(ids(12)), first, second], wish)
    assert superseded == []
    assert catalog.dependencies(branch.branch_id) == {first.key, second.key}
    assert catalog.stored(named([first, unknown])) == {first.key}
    later, _ = catalog.commit([unknown], wanted(ids(12), "s", branch, dependencies=wish.dependencies))
    assert catalog.dependencies(later.branch_id) == set(wish.dependencies)
    assert catalog.dependencies(later.branch_id + 1) == set()


def test_what_a_branch_needs_no_more_goes_as_it_moves_on(catalog: Catalog) -> None:
    old, kept, new = windows(ids(12), [0, 1, 2])
    branch, _ = commit_with(catalog, ids(9), [old, kept])
    moved, superseded = commit_with(catalog, ids(13), [kept, new], "s", branch)
    assert {row.key for row in superseded} == {old.key, branch.tail}
    assert catalog.dependencies(moved.branch_id) == {kept.key, new.key}
    assert catalog.row(old.key) is None
    assert catalog.known_prefix(keys(ids(12))) == 3, "the block of a window that went stays"


def test_what_another_branch_needs_stays_and_goes_with_the_last_that_does(catalog: Catalog) -> None:
    shared = windows(ids(8), [0, 1])
    branch, _ = commit_with(catalog, ids(8), shared)
    catalog.fork("default", "s", "copy")
    (copy,) = catalog.branches(ROOT, "default", "copy")
    assert catalog.dependencies(copy.branch_id) == set(named(shared))
    _, superseded = commit_with(catalog, ids(9), [], "s", branch)
    assert superseded == []
    assert catalog.dependencies(copy.branch_id) == catalog.stored(named(shared)) == set(named(shared))
    _, superseded = commit_with(catalog, ids(10), [], "copy", copy)
    assert set(named(superseded)) == set(named(shared))


def test_a_tail_that_becomes_a_part_is_not_superseded(catalog: Catalog) -> None:
    branch, _ = commit_with(catalog, ids(6), [])
    end = rows(ids(6))[-1]
    _, superseded = commit_with(catalog, ids(11), [end], "s", branch)
    assert superseded == []
    assert {row.key for row in catalog.tails(keys(ids(8)))} == {end.key, keys(ids(11))[-1]}
    catalog.drop([end.key])
    assert {row.key for row in catalog.tails(keys(ids(8)))} == {keys(ids(11))[-1]}


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
    assert catalog.dependencies(branch.branch_id) == {before.key}
    assert catalog.row(before.key) is not None
    assert catalog.row(after.key) is None


def test_a_part_is_not_evicted_before_its_branch_nor_a_block_before_its_window(catalog: Catalog) -> None:
    parts = [*windows(ids(8), [0, 1]), further("tail", ROOT, ids(2))]
    commit_with(catalog, ids(8), parts, "old")
    commit(catalog, ids(8, 100), "young")
    catalog.pin("default", "young", True)
    assert catalog.evictable_bytes() == 5 * FILE
    gone = [row.key for _ in range(5) for row in catalog.evict(1)]
    assert set(gone) == {*keys(ids(8)), *named(parts)}
    assert catalog.session_state(ROOT, "default", "old") == "evicted"
    for block, window in zip(keys(ids(8)), named(parts), strict=False):
        assert gone.index(window) < gone.index(block)
    with pytest.raises(StoreFull):
        catalog.evict(1)


def test_parts_count_in_the_bytes_of_their_session_and_of_what_is_pinned(catalog: Catalog) -> None:
    shared, own = windows(ids(8), [0, 1])
    commit_with(catalog, ids(8), [shared, own], "a")
    commit_with(catalog, ids(8), [shared], "b")
    assert {info.session_id: info.nbytes for info in catalog.sessions()} == {"a": 4 * FILE, "b": 3 * FILE}
    catalog.pin("default", "b", True)
    assert catalog.evictable_bytes() == FILE


def test_forgetting_takes_the_parts_that_only_that_session_needed(catalog: Catalog) -> None:
    shared, own = windows(ids(8), [0, 1])
    commit_with(catalog, ids(4), [shared], "b")
    commit_with(catalog, ids(8), [shared, own], "a")
    assert set(named(catalog.forget("default", "a"))) == {own.key, keys(ids(8))[1]}
    assert set(named(catalog.forget("default", "b"))) == {shared.key, keys(ids(4))[0]}
    commit_with(catalog, ids(4), [shared], "b")
    catalog.fork("default", "b", "a")
    assert catalog.forget("default", "b") == []
    assert set(named(catalog.forget("default", "a"))) == {shared.key, keys(ids(4))[0]}
    with catalog.transaction() as db:
        assert db.execute("SELECT count(*) FROM dependencies").fetchone() == (0,)


def test_a_branch_beyond_the_limit_lets_go_of_its_parts(catalog: Catalog) -> None:
    (window,) = windows(ids(4), [0])
    commit_with(catalog, ids(4), [window])
    commit(catalog, ids(4, 100), max_branches=1)
    assert {row.key for row in catalog.evict(2 * FILE)} == {window.key, *keys(ids(4))}


def test_the_audit_counts_parts(catalog: Catalog) -> None:
    (window,) = windows(ids(4), [0])
    commit_with(catalog, ids(4), [window])
    assert catalog.audit() == []
    with catalog.transaction() as db:
        db.execute("UPDATE blocks SET refs = 0 WHERE key = ?", (window.key,))
    assert catalog.audit(fix=True) == ["1 blocks with a wrong count of references"]
    catalog.pin("default", "s", True)
    with pytest.raises(StoreFull):
        catalog.evict(1)


def test_a_part_that_a_rebuild_left_without_words_gets_them_back_from_its_branch(catalog: Catalog) -> None:
    early, empty = further("tail", keys(ids(4))[0], ids(3, 4)), further("tail", keys(ids(4))[0])
    first = further("tail", ROOT, ids(2))
    alien = further("tail", keys(ids(4))[0], (70, 71))
    lost = [replace(row, tokens=()) for row in (*rows(ids(9)), early, empty, first, alien)]
    catalog.rebuild([(row, 1.0) for row in lost])
    wish = wanted(ids(9), token_ids=ids(9), dependencies=named([early, empty, first, alien]))
    catalog.commit([], replace(wish, session_id="wrong", token_ids=ids(9, 50)))
    assert {row.tokens for row in catalog.tails([ROOT, *keys(ids(8))])} == {()}
    catalog.commit([], wish)
    found = {row.key: row.tokens for row in catalog.tails([ROOT, *keys(ids(8))])}
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
    assert catalog.verdict("a model") is None
    for verdict in ("good", "bad"):
        catalog.record_verdict("a model", verdict)
        assert other.verdict("a model") == verdict
    assert other.verdict("another model") is None
    other.close()
    catalog.close()
    with pytest.raises(StoreError, match="closed"):
        catalog.record_verdict("a model", "good")


# The database itself


def test_threads_share_a_catalog(catalog: Catalog) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        branch: BranchRow | None = None
        for length in range(1, 30):
            tokens = ids(length, 1000 * number)
            branch = commit(catalog, tokens, f"s{number}", branch)
            if catalog.branch_tokens(branch) != tokens or branch.generation != length:
                wrong.append((number, length))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert catalog.stats()["branches"] == 4


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
    assert catalog.known_prefix(keys(ids(40))) == 0
    assert catalog.branch_tokens(branch) == ()
    assert catalog.branches(ROOT, "default", "s") == []
    assert catalog.failed_reads >= 3
    with pytest.raises(StoreError):
        catalog.sessions()
    with pytest.raises(StoreError):
        commit(catalog, ids(8))
    catalog.close()
    with pytest.raises(CatalogDamaged):
        Catalog(tmp_path / "catalog.db")


def test_a_database_of_another_kind_is_damage_and_a_newer_one_is_refused(tmp_path: Path) -> None:
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.executescript("CREATE TABLE blocks (x); PRAGMA user_version = 2")
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
        catalog.known_prefix([b"x" * 32])
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
        rows_now = {row.branch_id: row for row in self.catalog.branches(ROOT, "default", session)}
        full = range(len(tokens) // BLOCK)
        parts, made_parts = (windows(tokens, [i for i in full if i in some]) for some in (needed, given))
        wish = wanted(tokens, session, rows_now.get(chosen) if chosen else None, dependencies=named(parts))
        if stale:
            wish = replace(wish, generation=wish.generation - 1)
        moves = chosen is not None and not stale
        before = self.parts[chosen] if chosen is not None and moves else set()
        can = set(self.catalog.all_keys()) | set(named(made_parts)) | before
        made, superseded = self.catalog.commit([*rows(tokens), *made_parts], wish)
        assert (made.branch_id == chosen) == moves
        self.branches[made.branch_id] = (session, tokens)
        self.parts[made.branch_id] = set(wish.dependencies) & can
        self.lost -= {*keys(tokens), *named(made_parts)}
        live = {row.branch_id for row in self.catalog.branches(ROOT, "default", session)}
        assert not set(named(superseded)) & self.reached()
        assert not (before - self.reached()) & set(self.catalog.all_keys())
        for gone in set(mine) - live:
            assert len(mine) >= 16
            self._gone(gone)

    def _gone(self, branch_id: int) -> None:
        del self.branches[branch_id], self.parts[branch_id]

    @rule(old=st.sampled_from(SESSIONS), new=st.sampled_from(SESSIONS))
    def fork(self, old: str, new: str) -> None:
        owners = {owner for owner, _ in self.branches.values()}
        if old not in owners or self.catalog.session_state(ROOT, "default", new) != "new":
            with pytest.raises((SessionNotFound, InvalidRequest)):
                self.catalog.fork("default", old, new)
            return
        self.catalog.fork("default", old, new)
        copied = [i for i, (owner, _) in sorted(self.branches.items()) if owner == old]
        for row, source in zip(self.catalog.branches(ROOT, "default", new), copied, strict=True):
            self.branches[row.branch_id] = (new, self.branches[source][1])
            self.parts[row.branch_id] = set(self.parts[source])

    @rule(session=st.sampled_from(SESSIONS))
    def forget(self, session: str) -> None:
        before = set(self.catalog.all_keys())
        try:
            gone = {row.key for row in self.catalog.forget("default", session) if row.nbytes}
        except SessionNotFound:
            assert all(owner != session for owner, _ in self.branches.values())
            return
        for i in [i for i, (owner, _) in self.branches.items() if owner == session]:
            self._gone(i)
        self.pinned.discard(session)
        assert before - gone == set(self.catalog.all_keys())
        assert not gone & self.reached()

    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        if self.branches:
            session = data.draw(st.sampled_from(sorted({owner for owner, _ in self.branches.values()})))
            self.catalog.pin("default", session, pinned)
            (self.pinned.add if pinned else self.pinned.discard)(session)

    @rule(data=st.data())
    def lose_a_file(self, data: st.DataObject) -> None:
        stored = sorted(self.catalog.all_keys())
        if stored:
            key = data.draw(st.sampled_from(stored))
            self.catalog.drop([key])
            self.lost.add(key)

    @rule(count=st.integers(1, 12))
    def evict(self, count: int) -> None:
        evictable, before = self.catalog.evictable_bytes(), self.catalog.total_bytes()
        try:
            gone = self.catalog.evict(count * FILE)
        except StoreFull:
            assert evictable < count * FILE
            assert self.catalog.total_bytes() == before
            return
        assert evictable >= count * FILE
        assert before - self.catalog.total_bytes() == count * FILE == sum(row.nbytes for row in gone)
        live = {row.branch_id for name in SESSIONS for row in self.catalog.branches(ROOT, "default", name)}
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
        assert self.catalog.audit() == []

    @invariant()
    def every_branch_is_whole(self) -> None:
        rows_now = [row for name in SESSIONS for row in self.catalog.branches(ROOT, "default", name)]
        assert {
            row.branch_id: (row.session_id, self.catalog.branch_tokens(row)) for row in rows_now
        } == self.branches

    @invariant()
    def every_branch_has_its_parts(self) -> None:
        with self.catalog.transaction():
            assert {i: self.catalog.dependencies(i) for i in self.branches} == self.parts

    @invariant()
    def what_a_branch_reaches_is_stored_unless_it_was_lost(self) -> None:
        stored = set(self.catalog.all_keys())
        assert self.reached() - stored <= self.lost
        assert not stored & self.lost

    @invariant()
    def nothing_hangs_from_nothing(self) -> None:
        with self.catalog.transaction() as db:
            orphans = db.execute(
                "SELECT count(*) FROM blocks WHERE parent <> ? AND parent NOT IN (SELECT key FROM blocks)",
                (ROOT,),
            ).fetchone()
        assert orphans == (0,)


Books.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBooks = Books.TestCase
