"""The rows of records: what is known, and that token ids are believed only where the name proves them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.catalog_rows import commit, commit_with, further, keys, named, rows, window_rows
from support.stored_turns import (
    BLOCK,
    FILE,
    ROOT,
    ids,
    wanted,
)

from agent_memory_core.blocks.block import (
    pack_tokens,
)
from agent_memory_core.errors import StoreFull
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.record_table import MAX_CHILDREN


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


def test_token_ids_that_their_name_does_not_prove_are_not_believed(catalog: Catalog) -> None:
    branch = commit(catalog, ids(2 * BLOCK + 2))
    chain = keys(ids(2 * BLOCK + 2))
    with catalog.transaction() as db:
        for key in chain[1:]:
            db.execute("UPDATE records SET tokens = ? WHERE key = ?", (pack_tokens((1, 2)), key))
    assert catalog.branches.tokens(branch) == ids(BLOCK)
    assert [child.tokens for child in catalog.records.children(chain[0])] == [()]
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
