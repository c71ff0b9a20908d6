"""Rows without files and files without rows are brought together, in whatever way they were separated."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
from support.stored_turns import BLOCK, FILE, ROOT, files, ids, is_whole, open_store, records, turn

from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.reconcile import PARTS, reconcile

pytestmark = pytest.mark.usefixtures("all_cores")


def reconcile_all(store: BlockStore) -> int:
    return sum(reconcile(store.catalog, store.files, part) for part in range(PARTS))


def is_settled(store: BlockStore) -> bool:
    report = store.check()
    return report.clean and not report.unknown and reconcile_all(store) == 0


def test_where_all_is_well_nothing_is_changed(store: BlockStore) -> None:
    turn(store, ids(30))
    before = store.stats()
    assert reconcile_all(store) == 0
    assert {**store.stats(), "volume_free": 0} == {**before, "volume_free": 0}


def test_files_that_were_deleted_by_somebody_give_back_their_bytes(store: BlockStore) -> None:
    turn(store, ids(30), "a")
    turn(store, ids(30, 100), "b")
    for path in files(store)[::2]:
        path.unlink()
    assert reconcile_all(store) > 0
    assert store.stats()["bytes"] == len(files(store)) * FILE
    assert is_settled(store)
    turn(store, ids(30), "a")
    assert is_whole(store, ids(30))


def test_the_files_of_an_older_catalog_count_again(folder: Path) -> None:
    """A catalog that was put back knows nothing of later files, and names some that are gone."""
    store = open_store(folder)
    turn(store, ids(3 * BLOCK), "old")
    store.close()
    shutil.copy(folder / "catalog.db", folder.with_name("backup.db"))
    store = open_store(folder)
    store.forget("default", "old")
    turn(store, ids(5 * BLOCK, 100), "new")
    store.close()
    shutil.copy(folder.with_name("backup.db"), folder / "catalog.db")
    store = open_store(folder)
    assert reconcile_all(store) == 3 + 5
    assert store.stats()["bytes"] == 5 * FILE
    assert is_settled(store)
    assert store.catalog.records.known_prefix([made.key for made in records(ids(5 * BLOCK, 100))]) == 5
    store.close()


def test_a_damaged_file_without_a_row_is_set_aside_and_an_empty_folder_goes(store: BlockStore) -> None:
    turn(store, ids(8))
    path = files(store)[0]
    stray = path.with_name(path.name[:2] + "0" * 62 + ".safetensors")
    stray.write_bytes(b"garbage")
    empty = path.parent.parent / ("ab" if path.parent.name != "ab" else "cd")
    empty.mkdir()
    reconcile_all(store)
    assert not stray.exists()
    assert not empty.exists()
    assert store.stats()["quarantined"] == 1
    assert is_settled(store)


def test_what_is_being_written_or_deleted_is_left_alone(store: BlockStore) -> None:
    turn(store, ids(8))
    first, second = records(ids(8))
    with store.catalog.transaction() as db:
        db.execute("DELETE FROM branches")
        db.execute("DELETE FROM records")
        db.execute("DELETE FROM doomed WHERE key = ?", (second.key,))
        db.execute("INSERT INTO writing VALUES (1, ?, ?, ?)", (second.key, ROOT, second.kind))
    reconcile_all(store)
    assert store.catalog.records.keys() == []
    with store.catalog.transaction() as db:
        db.execute("DELETE FROM doomed")
        db.execute("DELETE FROM writing")
    reconcile_all(store)
    assert set(store.catalog.records.keys()) == {first.key, second.key}


def test_turns_that_are_written_meanwhile_are_never_harmed(store: BlockStore) -> None:
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            reconcile_all(store)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for n in range(25):
            turn(store, ids(12, 1000 * n), f"s{n}")
            if n >= 5:
                assert store.forget("default", f"s{n - 5}")
    finally:
        stop.set()
        thread.join()
    for n in range(20, 25):
        assert is_whole(store, ids(12, 1000 * n))
    assert is_settled(store)


@pytest.mark.parametrize("wait", [False, True])
def test_the_thread_ends_with_its_work_or_with_the_store(folder: Path, wait: bool) -> None:
    store = open_store(folder)
    turn(store, ids(8))
    files(store)[0].unlink()
    store.begin_reconciling()
    store.begin_reconciling()
    deadline = time.monotonic() + 60
    while wait and store.stats()["files"] != 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    store.close()
    assert not any(thread.name == "agent-memory-reconcile" for thread in threading.enumerate())
    if wait:
        again = open_store(folder)
        assert again.stats()["files"] == 1
        again.close()
