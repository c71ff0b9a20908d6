"""Sessions and branches: what a commit changes, what a fork shares, and what forgetting takes away."""

from __future__ import annotations

import pytest
from support.catalog_rows import commit, commit_with, following, keys, named, rows, window_rows
from support.stored_turns import (
    BLOCK,
    FILE,
    OTHER,
    ROOT,
    ids,
    wanted,
)

from agent_memory_core.errors import InvalidRequest, SessionNotFound
from agent_memory_core.messages import validate_namespace, validate_session_id
from agent_memory_core.storage.branches import BranchRow
from agent_memory_core.storage.catalog import Catalog


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


@pytest.mark.parametrize(
    "fit", ["s", "../../etc/passwd", "a/b\\c", "'; DROP TABLE records; --", "ü🦊", "x" * 512, " "]
)
def test_any_text_can_name_a_session_or_a_namespace(catalog: Catalog, fit: str) -> None:
    assert validate_session_id(fit) == validate_namespace(fit) == fit
    branch = catalog.branches.commit(rows(ids(3)), wanted(ids(3), fit, namespace=fit))[0]
    assert catalog.branches.of_session(fit, fit, ROOT) == [branch]
    assert [info.session_id for info in catalog.branches.sessions(fit)] == [fit]
    assert len(catalog.branches.forget(fit, fit)) == 1


def test_a_branch_needs_those_of_its_dependencies_that_are_stored(catalog: Catalog) -> None:
    first, second, unknown = window_rows(ids(12), [0, 1, 2])
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
    old, kept, new = window_rows(ids(12), [0, 1, 2])
    branch, _ = commit_with(catalog, ids(9), [old, kept])
    moved, superseded = commit_with(catalog, ids(13), [kept, new], "s", branch)
    assert {row.key for row in superseded} == {old.key, branch.tail}
    assert catalog.branches.dependencies(moved.branch_id) == {kept.key, new.key}
    assert catalog.records.get(old.key) is None
    assert catalog.records.known_prefix(keys(ids(12))) == 3, "the block of a window that went stays"


def test_what_another_branch_needs_stays_and_goes_with_the_last_that_does(catalog: Catalog) -> None:
    shared = window_rows(ids(8), [0, 1])
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


def test_a_tail_that_becomes_a_dependency_is_not_superseded(catalog: Catalog) -> None:
    branch, _ = commit_with(catalog, ids(6), [])
    end = rows(ids(6))[-1]
    _, superseded = commit_with(catalog, ids(11), [end], "s", branch)
    assert superseded == []
    assert {row.key for row in following(catalog, *keys(ids(8)), kind="tail")} == {end.key, keys(ids(11))[-1]}
    catalog.records.mark_lost([end.key])
    assert {row.key for row in following(catalog, *keys(ids(8)), kind="tail")} == {keys(ids(11))[-1]}


def test_dependencies_change_with_their_branch_or_not_at_all(catalog: Catalog) -> None:
    before, after = window_rows(ids(8), [0, 1])
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


def test_forgetting_takes_the_dependencies_that_only_that_session_needed(catalog: Catalog) -> None:
    shared, own = window_rows(ids(8), [0, 1])
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
