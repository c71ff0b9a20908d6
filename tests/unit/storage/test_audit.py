"""The audit finds and mends every kind of fault, and never evicts anything."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings, strategies as st
from support.stored_turns import (
    BLOCK,
    FILE,
    MANY,
    ROOT,
    allocate,
    bytes_on_disk,
    content,
    files,
    ids,
    is_whole,
    open_store,
    path_of,
    records,
    turn,
)

from agent_memory_core.storage.block_file import ALIGNMENT
from agent_memory_core.storage.block_store import BlockStore


def test_an_audit_finds_and_mends_every_kind_of_fault(folder: Path) -> None:
    store = open_store(folder)
    tokens = ids(6 * BLOCK)
    turn(store, tokens)
    missing, damaged, cut_short, unknown, *_ = (made.key for made in records(tokens))
    path_of(store, missing).unlink()
    flipped = path_of(store, damaged)
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([content(damaged)[-1] ^ 1]))
    shortened = path_of(store, cut_short)
    os.truncate(shortened, FILE - 1)
    kept = path_of(store, unknown)
    with store.catalog.transaction() as db:
        db.execute("DELETE FROM records WHERE key = ?", (unknown,))
        db.execute("UPDATE records SET refs = 9 WHERE key = (SELECT max(key) FROM records)")
        db.execute("UPDATE totals SET bytes = bytes + 5")
    foreign = [
        kept.parent / "notes.txt",
        folder / "ns" / "notes.txt",
        kept.parent.with_name("zz") / kept.name,
    ]
    foreign[2].parent.mkdir()
    for path in foreign:
        path.write_text("not ours")
    (folder / "tmp" / "1234567890.0.0").touch()
    store.quota_bytes = 2 * FILE
    found = store.check()
    assert not found.clean
    assert (found.files, found.nbytes) == (3, 3 * FILE)
    assert found.missing == (missing,)
    assert sorted(found.damaged) == sorted([flipped, shortened])
    assert found.unknown == (kept,)
    assert sorted(found.foreign) == sorted(foreign)
    assert len(found.catalog) == 2
    assert found.over_quota > 0
    assert found.leftovers == 1
    assert store.check(fix=True) == found
    for path in foreign:
        assert path.read_text() == "not ours"
        path.unlink()
    store.quota_bytes = MANY
    mended = store.check()
    assert mended.clean
    assert (mended.unknown, mended.leftovers) == ((), 0)
    assert bytes_on_disk(store) == store.stats()["bytes"] == 3 * FILE
    assert store.stats()["quarantined"] == 2
    store.close()


def numbers(store: BlockStore) -> dict[str, int]:
    """Its numbers without the free space of the volume, which other programs change."""
    return {name: number for name, number in store.stats().items() if name != "volume_free"}


@pytest.mark.parametrize("quota", [0, 1, FILE, 7 * FILE])
def test_a_check_says_how_far_a_store_is_over_its_quota_and_evicts_nothing(folder: Path, quota: int) -> None:
    store = open_store(folder)
    known = {f"s{n}": ids(3 * BLOCK + 1, 100 * n) for n in range(6)}
    for session, tokens in known.items():
        turn(store, tokens, session)
    store.close()
    small = open_store(folder, quota)
    before = (small.catalog.branches.sessions(), files(small), numbers(small))
    for fix in (False, True, True):
        assert small.check(fix).over_quota == bytes_on_disk(small) - quota > 0
        assert (small.catalog.branches.sessions(), files(small), numbers(small)) == before
    small.close()
    store = open_store(folder)
    for session, tokens in known.items():
        (branch,) = store.catalog.branches.of_session("default", session, ROOT)
        assert store.catalog.branches.tokens(branch) == tokens
        assert is_whole(store, tokens)
    assert store.check().clean
    store.close()


def test_what_a_check_adopts_is_the_first_to_go_when_a_turn_needs_room(folder: Path) -> None:
    store = open_store(folder, quota=5 * FILE)
    turn(store, ids(3 * BLOCK), "kept")
    turn(store, ids(2 * BLOCK, 100), "loose")
    with store.catalog.transaction() as db:
        db.execute(
            "DELETE FROM branches WHERE session = (SELECT id FROM sessions WHERE session_id = 'loose')"
        )
        db.execute("DELETE FROM records WHERE refs = 0")
        db.execute("DELETE FROM records WHERE refs = 0 AND parent = ?", (ROOT,))
    assert len(store.check(fix=True).unknown) == 2
    turn(store, ids(2 * BLOCK, 200), "new")
    assert is_whole(store, ids(3 * BLOCK))
    assert is_whole(store, ids(2 * BLOCK, 200))
    assert bytes_on_disk(store) == store.stats()["bytes"] == 5 * FILE
    store.close()


def test_a_file_that_other_tools_cannot_read_is_damaged(store: BlockStore) -> None:
    """safetensors takes text only in its metadata; our reader does not look at names that it does not know."""
    tokens = ids(2 * BLOCK)
    turn(store, tokens)
    path = path_of(store, records(tokens)[1].key)
    raw = path.read_bytes()
    table = json.loads(raw[8:ALIGNMENT])
    metadata = {**table.pop("__metadata__"), "writer": 7}
    del metadata["header_xxh3_128"]
    metadata["header_xxh3_128"] = xxhash.xxh3_128_hexdigest(
        json.dumps([metadata, table], sort_keys=True).encode()
    )
    header = json.dumps({"__metadata__": metadata, **table}).encode().ljust(ALIGNMENT - 8)
    path.write_bytes(raw[:8] + header + raw[ALIGNMENT:])
    assert is_whole(store, tokens)
    assert store.check(fix=True).damaged == (path,)
    assert not path.exists()


HIDDEN = (
    ".DS_Store",
    "._catalog.db",
    ".metadata_never_index",
    ".fseventsd/0000",
    ".Spotlight-V100/Store-V2/0.indexHead",
)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_the_finder_and_spotlight_leave_anywhere_is_not_seen_and_not_touched(
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        store = open_store(Path(name) / "store")
        turn(store, ids(2 * BLOCK + 1), "a")
        turn(store, ids(BLOCK, 100), "b")
        lost = records(ids(BLOCK, 100))[0].key
        path_of(store, lost).write_bytes(b"x")
        assert store.load(ROOT, lost, allocate) is None
        folders = [store.path, *sorted(path for path in store.path.rglob("*") if path.is_dir())]
        ours = path_of(store, records(ids(BLOCK))[0].key)
        names = st.sampled_from([*HIDDEN, f"._{ours.name}"])
        left = {folder / data.draw(names) for folder in folders for _ in range(2)}
        for path in left:
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(b"theirs")
        assert (store.check().clean, store.check().leftovers, store.stats()["quarantined"]) == (True, 0, 1)
        assert store.check(fix=True).clean
        store.close()
        (store.path / "catalog.db").unlink()
        store = open_store(store.path)
        assert store.check().clean
        assert is_whole(store, ids(2 * BLOCK))
        turn(store, ids(2 * BLOCK + 1), "a")
        assert store.forget("default", "a")
        assert store.stats()["quarantined"] == 0
        assert all(path.read_bytes() == b"theirs" for path in left)
        store.close()
