"""The rows of records: what is known, and that token ids are believed only where the name proves them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.catalog_rows import commit, commit_with, following, further, keys, named, rows, window_rows
from support.stored_turns import (
    BLOCK,
    FILE,
    ROOT,
    ids,
    wanted,
)

from agent_memory_core.blocks.block import (
    START_TOKENS,
    pack_tokens,
    start_names,
)
from agent_memory_core.errors import StoreFull
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.record import StoredRecord


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


def test_what_begins_alike_after_a_block_is_found_by_that_and_nothing_else(catalog: Catalog) -> None:
    parent = keys(ids(BLOCK))[0]
    tails = [(1, 2), (1, 2, 3), (1, 3), (2,)]
    for n, tail in enumerate(tails):
        commit(catalog, (*ids(BLOCK), *tail), f"s{n}")

    def found(rest: tuple[int, ...], most: int = 9) -> set[tuple[int, ...]]:
        return {row.tokens for row in catalog.records.starting(start_names(parent, rest), most)}

    assert found((1, 2, 3)) == {(1, 2), (1, 2, 3)}
    assert found((1, 3, 9)) == {(1, 3)}
    assert found((7, 7)) == set()
    assert found(()) == set()
    assert {row.tokens for row in catalog.records.starting(start_names(ROOT, ids(BLOCK)), 9)} == {ids(BLOCK)}
    catalog.records.mark_lost([keys((*ids(BLOCK), 1, 2))[-1]])
    assert found((1, 2, 3)) == {(1, 2, 3)}


def test_of_very_many_that_begin_alike_the_newest_are_returned(catalog: Catalog) -> None:
    block = tuple(range(START_TOKENS))
    with catalog.transaction():
        for n in range(20):
            row = further("tail", ROOT, (*block, n))
            catalog.records.put(row, 0, 1.0)
    found = catalog.records.starting(start_names(ROOT, (*block, 3)), 5)
    assert {row.tokens[-1] for row in found} == {15, 16, 17, 18, 19}


def test_rows_without_a_start_get_it_where_their_tokens_are_known(catalog: Catalog) -> None:
    commit(catalog, ids(BLOCK + 1))
    starts = "SELECT start FROM records ORDER BY key"
    with catalog.transaction() as db:
        before = db.execute(starts).fetchall()
        db.execute("UPDATE records SET start = x''")
    for part in range(256):
        catalog.records.add_starts(part)
    with catalog.transaction() as db:
        assert db.execute(starts).fetchall() == before


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


def test_token_ids_that_their_name_does_not_prove_are_not_believed(catalog: Catalog) -> None:
    branch = commit(catalog, ids(2 * BLOCK + 2))
    chain = keys(ids(2 * BLOCK + 2))
    with catalog.transaction() as db:
        for key in chain[1:]:
            db.execute("UPDATE records SET tokens = ? WHERE key = ?", (pack_tokens((1, 2)), key))
    assert catalog.branches.tokens(branch) == ids(BLOCK)
    assert [child.tokens for child in following(catalog, chain[0])] == [()]
    assert [catalog.records.get_many(chain)[key].tokens for key in chain] == [ids(BLOCK), (), ()]


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


def test_the_recount_finds_dependencies(catalog: Catalog) -> None:
    (window,) = window_rows(ids(4), [0])
    commit_with(catalog, ids(4), [window])
    assert catalog.records.recount(fix=False) == []
    with catalog.transaction() as db:
        db.execute("UPDATE records SET refs = 0 WHERE key = ?", (window.key,))
    assert catalog.records.recount(fix=True) == ["1 records with a wrong count of references"]
    catalog.branches.pin("default", "s", True)
    with pytest.raises(StoreFull):
        catalog.budget.evict(1)


def test_a_dependency_that_a_rebuild_left_without_tokens_gets_them_back_from_its_branch(
    catalog: Catalog,
) -> None:
    early, empty = further("tail", keys(ids(4))[0], ids(3, 4)), further("tail", keys(ids(4))[0])
    first = further("tail", ROOT, ids(2))
    alien = further("tail", keys(ids(4))[0], (70, 71))
    lost = [replace(row, tokens=()) for row in (*rows(ids(9)), early, empty, first, alien)]
    catalog.records.adopt([(row, 1.0) for row in lost])
    wish = wanted(ids(9), token_ids=ids(9), dependencies=named([early, empty, first, alien]))
    catalog.branches.commit([], replace(wish, session_id="wrong", token_ids=ids(9, 50)))
    assert {row.tokens for row in following(catalog, ROOT, *keys(ids(8)), kind="tail")} == {()}
    catalog.branches.commit([], wish)
    found = {row.key: row.tokens for row in following(catalog, ROOT, *keys(ids(8)), kind="tail")}
    assert found == {
        early.key: early.tokens,
        empty.key: (),
        first.key: first.tokens,
        alien.key: (),
        keys(ids(9))[-1]: (8,),
    }
