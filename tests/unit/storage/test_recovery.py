"""A lost or damaged catalog is made anew from the files; opening reads and deletes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.stored_turns import (
    BLOCK,
    FILE,
    MANY,
    ROOT,
    allocate,
    files,
    ids,
    is_right,
    open_store,
    path_of,
    record,
    records,
    turn,
    turn_with,
    wanted,
    windows,
)

from agent_memory_core.blocks.block import (
    BlockHash,
    chain as chain_of,
)
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.prefix_cache import PrefixCache
from agent_memory_core.blocks.resume_policy import EveryToken, LastTokens, ResumePolicy, WholeState
from agent_memory_core.storage.block_store import BlockStore


def test_opening_reads_no_block_and_deletes_none(folder: Path) -> None:
    store = open_store(folder)
    turn(store, ids(3 * BLOCK))
    store.close()
    for path in files(store):
        path.write_bytes(b"no block at all")
    store = open_store(folder, quota=1)
    assert len(files(store)) == 3
    assert store.stats()["files"] == 3
    store.close()


def lose(folder: Path) -> None:
    for path in folder.glob("catalog.db*"):
        path.unlink()


def scribble(folder: Path) -> None:
    path = folder / "catalog.db"
    path.write_bytes(os.urandom(path.stat().st_size))


def cut(folder: Path) -> None:
    path = folder / "catalog.db"
    os.truncate(path, path.stat().st_size // 2)


def lose_without_its_log(folder: Path) -> None:
    log = (
        (folder / "catalog.db-wal").read_bytes() if (folder / "catalog.db-wal").exists() else os.urandom(4096)
    )
    lose(folder)
    (folder / "catalog.db-wal").write_bytes(log)


@pytest.mark.parametrize("harm", [lose, scribble, cut, lose_without_its_log])
def test_a_lost_or_damaged_catalog_is_rebuilt_from_the_files(
    folder: Path, harm: Callable[[Path], None]
) -> None:
    tokens = ids(3 * BLOCK + 2)
    store = open_store(folder)
    turn(store, tokens)
    store.close()
    (folder / "ns" / ROOT.hex() / "blocks" / "not ours").write_text("")
    harm(folder)
    store = BlockStore(folder, quota_bytes=MANY)
    made = records(tokens)
    assert store.stats()["files"] == 4
    assert store.catalog.branches.sessions() == []
    assert store.catalog.records.known_prefix([block.key for block in made]) == 4
    loaded = [store.load(ROOT, block.key, allocate) for block in made]
    assert all(block is not None and is_right(block) and block.tokens == () for block in loaded)
    branch = store.commit([], wanted(tokens, token_ids=tokens))
    assert store.catalog.branches.tokens(branch) == tokens
    assert store.catalog.branches.sessions()[0].model == "made"
    assert store.check().clean is False
    (folder / "ns" / ROOT.hex() / "blocks" / "not ours").unlink()
    assert store.check().clean
    store.close()


def test_windows_and_tails_come_back_from_their_files_and_a_tails_tokens_from_its_branch(
    folder: Path,
) -> None:
    store = open_store(folder)
    chain = records(ids(2 * BLOCK))
    (window,) = windows(ids(2 * BLOCK), 1)
    empty, mark = record(chain[1].key, (), kind="tail"), record(chain[0].key, ids(2, BLOCK), kind="tail")
    turn_with(store, ids(2 * BLOCK), [window, empty, mark])
    store.close()
    lose(folder)
    store = open_store(folder)
    tokens = ids(2 * BLOCK)
    whole = PrefixCache(
        BlockPool(10 * FILE), ResumePolicy(BLOCK, (EveryToken(), LastTokens(3), WholeState()))
    )

    def resumed(prompt: list[int]) -> list[BlockHash]:
        found = whole.match(ROOT, prompt, chain_of(ROOT, prompt, BLOCK), store.tier)
        return [hit.key for hit in found.hits]

    assert resumed([*tokens, 90]) == [chain[0].key, chain[1].key, empty.key, window.key]
    assert resumed([*ids(BLOCK + 2), 90, 91]) == [], "a tail whose words are lost is not one without words"
    store.commit([], wanted(tokens, token_ids=tokens, dependencies=(mark.key,)))
    store.commit([*windows(ids(BLOCK), 0)], wanted(ids(BLOCK), "other"))
    assert resumed([*ids(BLOCK + 2), 90, 91]) == [chain[0].key, mark.key, windows(ids(BLOCK), 0)[0].key]
    assert store.check().clean
    store.close()


def test_a_rebuild_leaves_out_what_is_damaged(folder: Path) -> None:
    store = open_store(folder)
    turn(store, ids(3 * BLOCK))
    store.close()
    path = path_of(store, records(ids(3 * BLOCK))[1].key)
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "ns" / ROOT.hex() / "identity.json").write_text("[")
    lose(folder)
    store = BlockStore(folder, quota_bytes=MANY)
    assert store.stats()["files"] == 2
    assert store.check().damaged == (path,)
    store.close()
