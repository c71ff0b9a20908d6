"""Live sessions: with a catalog each is in step with it; without one the book is all there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
from support import made_tokenizers as made
from support.catalog_rows import catalog_at, commit
from support.stored_turns import BLOCK, IDENTITY, ROOT, ids, wanted

from agent_memory_core.blocks.block import Block, chain, record_hash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.engine.session_book import CatalogSessionBook, MemorySessionBook, PendingCommit
from agent_memory_core.errors import InvalidRequest, SessionNotFound
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.text.token_text import ExactTokenizer, TokenText

OWNER = ("default", "s")


def branch(tokens: Sequence[int]) -> Branch[TokenText]:
    return Branch(tuple(tokens), TokenText(), 0, chain(ROOT, tokens, BLOCK), None)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = catalog_at(tmp_path / "catalog.db")
    opened.records.register_root(ROOT, IDENTITY, "default")
    yield opened
    opened.close()


@pytest.fixture
def book(catalog: Catalog) -> CatalogSessionBook:
    tokenizer = ExactTokenizer(made.bare())
    return CatalogSessionBook(BlockPool(2**20), catalog.branches, tokenizer, BLOCK, max_live=2)


def held(book: CatalogSessionBook) -> list[tuple[tuple[int, ...], int | None, int]]:
    found = book.open(ROOT, OWNER).branches
    return [(b.token_ids, b.branch_id, b.generation) for b in found]


def test_what_another_process_did_is_seen_when_a_session_is_opened(
    catalog: Catalog, book: CatalogSessionBook
) -> None:
    assert held(book) == []
    assert book.miss_hint(ROOT, OWNER) == "new"
    first = commit(catalog, ids(8))
    assert held(book) == [(ids(8), first.branch_id, 1)]
    moved = commit(catalog, ids(12), branch=first)
    assert held(book) == [(ids(12), first.branch_id, moved.generation)]
    other = commit(catalog, ids(8, 100))
    assert held(book)[1:] == [(ids(8, 100), other.branch_id, 1)]
    catalog.branches.forget("default", "s")
    assert held(book) == []


def test_a_branch_in_flight_is_newer_than_its_row(catalog: Catalog, book: CatalogSessionBook) -> None:
    first = commit(catalog, ids(8))
    (live,) = book.open(ROOT, OWNER).branches
    live.busy = True
    commit(catalog, ids(12), branch=first)
    assert book.open(ROOT, OWNER).branches[0] is live
    live.busy = False
    assert book.open(ROOT, OWNER).branches[0] is not live


@pytest.mark.parametrize("answered", [False, True])
def test_what_the_writer_just_wrote_is_not_loaded_a_second_time(
    catalog: Catalog, book: CatalogSessionBook, answered: bool
) -> None:
    session = book.open(ROOT, OWNER)
    live = branch(ids(10))
    session.branches.append(live)
    session.pending.append(PendingCommit(live, wanted(ids(10)), Future()))
    if answered:  # The row is there, and the engine has not been told yet.
        commit(catalog, ids(10))
    stranger = commit(catalog, ids(8, 100))
    opened = book.open(ROOT, OWNER).branches
    assert opened[0] is live
    assert [b.branch_id for b in opened[1:]] == [stranger.branch_id]


def test_the_sessions_used_longest_ago_are_let_go_unless_they_are_in_use(book: CatalogSessionBook) -> None:
    for name in ("a", "b", "c"):
        book.open(ROOT, ("default", name))
    assert [owner[1] for owner, _ in book] == ["b", "c"]
    session = book.open(ROOT, ("default", "b"))
    session.branches.append(branch(ids(4)))
    session.branches[0].busy = True
    for name in ("d", "e", "f"):
        book.open(ROOT, ("default", name))
    assert [owner[1] for owner, _ in book] == ["b", "f"], "one that is in use makes no room for a third"
    assert book.open(ROOT, ("default", "b")) is session


def test_in_memory_a_session_is_forked_listed_and_forgotten() -> None:
    pool = BlockPool(2**20)
    book = MemorySessionBook(pool)
    with pytest.raises(SessionNotFound, match="'s'"):
        book.fork(ROOT, OWNER, "t")
    key = record_hash("block", ROOT, ids(BLOCK))
    pool.put(Block(key, ROOT, ids(BLOCK), 100, {}))
    session = book.open(ROOT, OWNER)
    session.branches.append(branch(ids(BLOCK)))
    session.branches[0].busy = True
    book.fork(ROOT, OWNER, "t")
    with pytest.raises(InvalidRequest, match="'t'"):
        book.fork(ROOT, OWNER, "t")
    (copy,) = book.open(ROOT, ("default", "t")).branches
    assert not copy.busy
    copy.hashes.append(b"more")
    assert session.branches[0].hashes == [key], "a fork shares no list with its source"
    infos = book.infos(None, "model")
    assert [(info.session_id, info.nbytes, info.tokens) for info in infos] == [("s", 100, 4), ("t", 100, 4)]
    assert book.infos("elsewhere", "model") == []
    assert book.forget(OWNER)
    assert session.forgotten
    assert key not in pool
    assert not book.forget(OWNER)
    assert book.miss_hint(ROOT, OWNER) == "new"
