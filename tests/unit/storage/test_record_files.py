"""Files and folders of a store: one place for each record, and a quarantine for what is damaged."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from support.stored_turns import (
    BLOCK,
    ROOT,
    allocate,
    content,
    ids,
    is_right,
    is_whole,
    names_in,
    open_store,
    path_of,
    record,
    records,
    turn,
    wanted,
)

from agent_memory_core.blocks.block import (
    record_hash,
)
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.record import HostTensor, Record
from agent_memory_core.storage.record_files import MAX_QUARANTINED

pytestmark = pytest.mark.usefixtures("all_cores")


def test_every_kind_has_a_folder_and_comes_back_as_it_was(store: BlockStore) -> None:
    (block,) = records(ids(BLOCK))
    words: Record[HostTensor] = Record(
        record_hash("token_tail", block.key, (7, 8)), block.key, (7, 8), "token_tail", {}
    )
    made = [
        block,
        record(block.key, (), kind="window"),
        record(block.key, (), kind="tail"),
        record(block.key, (7,), kind="tail"),
        words,
    ]
    store.commit(made, wanted(ids(BLOCK), dependencies=tuple(one.key for one in made[1:])))
    for one in made:
        assert one.key.hex() in names_in(store, f"{one.kind}s")
        loaded = store.load(ROOT, one.key, allocate)
        assert loaded is not None
        assert (loaded.key, loaded.parent, loaded.tokens, loaded.kind) == (
            *(one.key, one.parent, one.tokens, one.kind),
        )
        assert loaded.tensors == {} if one is words else is_right(loaded)
    assert store.check().clean


def test_a_sound_file_without_a_row_is_kept_and_an_unsound_one_replaced(store: BlockStore) -> None:
    tokens = ids(2 * BLOCK)
    turn(store, tokens)
    first, second = (made.key for made in records(tokens))
    paths = [path_of(store, key) for key in (first, second)]
    with store.catalog.transaction() as db:
        db.execute("DELETE FROM branches")
        db.execute("DELETE FROM records")
    inode = paths[0].stat().st_ino
    with paths[1].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff" if content(second)[-1] != 0xFF else b"\0")
    turn(store, tokens)
    assert paths[0].stat().st_ino == inode
    assert is_whole(store, tokens)
    assert store.stats()["quarantined"] == 1


def test_only_leftovers_of_those_who_ended_are_removed(folder: Path) -> None:
    store, other = open_store(folder), open_store(folder)
    other.close()
    dead = [
        f"{other.files.presence.name}.0",
        f"{os.getpid()}.0",
        f"{os.getppid()}.of-an-earlier-life.0",
        "nonsense",
    ]
    ours = store.files._write_tmp([memoryview(b"x")])
    for name in dead:
        (folder / "tmp" / name).touch()
    os.utime(ours, (0, 0))
    open_store(folder).close()
    left = [path.name for path in (folder / "tmp").iterdir()]
    assert left == [ours.name], "age says nothing: its process may have slept"
    store.close()


def test_the_quarantine_keeps_the_newest_few(store: BlockStore) -> None:
    for n in range(12):
        made = record(ROOT, ids(BLOCK, 100 * n))
        store.commit([made], wanted(made.tokens, f"s{n}"))
        path_of(store, made.key).write_bytes(json.dumps(n).encode())
        assert store.load(ROOT, made.key, allocate) is None
    kept = sorted(int(path.read_text()) for path in (store.path / "quarantine").iterdir())
    assert kept == list(range(12 - MAX_QUARANTINED, 12))


def test_whoever_deletes_empty_folders_costs_no_record(store: BlockStore) -> None:
    """As reconciling and deleting do, in this process and in others, at any moment of a write."""
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            for folder in (
                store.files.place(ROOT, record_hash("block", ROOT, ()), "block").parents[1].glob("*")
            ):
                with suppress(OSError):
                    folder.rmdir()

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        for number in range(40):
            turn(store, ids(2 * BLOCK, 1000 * number), f"s{number}")
    finally:
        stop.set()
        thread.join()
    assert len(store.catalog.branches.sessions()) == 40
    assert store.check().clean
