"""The disk: what goes in comes out, is stored once, and stays within its budget."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from support.stored_turns import (
    BLOCK,
    FILE,
    MANY,
    OTHER,
    PAYLOAD,
    ROOT,
    allocate,
    bytes_on_disk,
    content,
    files,
    ids,
    is_right,
    is_whole,
    names_in,
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
    pack_tokens,
    record_hash,
)
from agent_memory_core.config import Durability
from agent_memory_core.errors import OverBudget, SessionNotFound, StoreError, StoreFull
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.record import Record
from agent_memory_core.storage.record_files import RecordFiles

pytestmark = pytest.mark.usefixtures("all_cores")


@pytest.mark.parametrize("durability", ["process", "power"])
def test_what_was_committed_is_loaded_by_another_store(folder: Path, durability: Durability) -> None:
    tokens = ids(2 * BLOCK + 3)
    with_mask = os.umask(0)
    try:
        store = open_store(folder, durability=durability)
        branch = turn(store, tokens)
        for path in [folder, *folder.rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        store.close()
    finally:
        os.umask(with_mask)
    store = open_store(folder)
    assert store.catalog.branches.of_session("default", "s", ROOT) == [branch]
    assert store.catalog.branches.tokens(branch) == tokens
    for made in records(tokens):
        loaded = store.load(ROOT, made.key, allocate)
        assert loaded is not None
        assert (loaded.key, loaded.parent, loaded.tokens, loaded.kind, loaded.nbytes) == (
            *(made.key, made.parent, made.tokens, made.kind),
            PAYLOAD,
        )
        assert is_right(loaded)
    store.close()


def test_blocks_are_read_into_evaluated_mlx_arrays(store: BlockStore) -> None:
    made = record(ROOT, ids(BLOCK))
    store.commit([made], wanted(ids(BLOCK)))

    def arrays(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[mx.array, memoryview]]:
        made = [mx.zeros(shape, {"U32": mx.uint32, "BF16": mx.bfloat16}[dtype]) for dtype, shape in tensors]
        mx.eval(made)
        return [(array, memoryview(array).cast("B")) for array in made]

    loaded = store.load(ROOT, made.key, arrays)
    assert loaded is not None
    assert b"".join(bytes(memoryview(x).cast("B")) for x in loaded.tensors.values()) == content(made.key)


def test_a_record_that_is_not_of_its_tokens_is_refused(store: BlockStore) -> None:
    good, bad = record(ROOT, ids(BLOCK)), record(ROOT, ids(BLOCK, 50))
    for wrong in (
        Record(bad.key, ROOT, good.tokens, False, good.tensors),
        Record(record_hash("tail", ROOT, good.tokens), ROOT, good.tokens, "block", good.tensors),
        Record(good.key, OTHER, good.tokens, False, good.tensors),
    ):
        with pytest.raises(StoreError, match=wrong.key.hex()):
            store.commit([wrong], wanted(ids(BLOCK)))
    assert files(store) == []


def test_a_shared_prefix_is_stored_once_and_never_written_again(store: BlockStore) -> None:
    prefix = ids(3 * BLOCK)
    turn(store, prefix, "a")
    before = {path: path.stat().st_mtime_ns for path in files(store)}
    turn(store, (*prefix, 70), "b")
    turn(store, (*prefix, 71), "c", namespace="default")
    after = {path: path.stat().st_mtime_ns for path in files(store)}
    assert len(after) == 5
    assert {path: after[path] for path in before} == before
    assert store.stats()["bytes"] == bytes_on_disk(store) == 5 * FILE


def test_roots_share_nothing(store: BlockStore) -> None:
    turn(store, ids(BLOCK), "a")
    turn(store, ids(BLOCK), "a", root=OTHER)
    assert len(files(store)) == 2
    key = record(ROOT, ids(BLOCK)).key
    assert store.load(OTHER, key, allocate) is None
    assert store.load(ROOT, key, allocate) is not None


def test_a_superseded_tail_goes_unless_a_fork_needs_it(store: BlockStore) -> None:
    first = turn(store, ids(5))
    second = turn(store, ids(6), "s", first)
    assert len(files(store)) == 2
    store.catalog.branches.fork("default", "s", "copy")
    turn(store, ids(7), "s", second)
    assert len(files(store)) == 3
    assert is_whole(store, ids(6))
    assert is_whole(store, ids(7))


def test_a_lost_race_between_two_stores_keeps_both_turns(folder: Path) -> None:
    one, two = open_store(folder), open_store(folder)
    base = turn(one, ids(6))
    (seen,) = two.catalog.branches.of_session("default", "s", ROOT)
    won = turn(one, (*ids(6), 100), "s", base)
    lost = turn(two, (*ids(6), 200), "s", seen)
    assert lost.branch_id != won.branch_id
    for store in (one, two):
        for row, tokens in zip(
            store.catalog.branches.of_session("default", "s", ROOT), (100, 200), strict=True
        ):
            assert store.catalog.branches.tokens(row) == (*ids(6), tokens)
            assert is_whole(store, (*ids(6), tokens))
    assert one.check().clean
    one.close()
    two.close()


def test_a_file_that_was_stored_again_is_not_deleted_by_who_meant_the_old_one(store: BlockStore) -> None:
    first = turn(store, ids(5))
    assert first.tail is not None
    old = store.catalog.records.get(first.tail)
    assert old is not None
    second = turn(store, ids(6), "s", first)
    assert store.load(ROOT, first.tail, allocate) is None
    turn(store, ids(5), "s", second)
    store._delete([old])
    assert is_whole(store, ids(5))


def test_a_turn_is_not_committed_over_a_file_that_went_away_while_it_was_written(store: BlockStore) -> None:
    turn(store, ids(BLOCK))
    tokens = ids(2 * BLOCK)
    plan = store._plan(records(tokens), ROOT, (), None)
    path_of(store, records(tokens)[0].key).unlink()
    assert store._attempt(plan, None, lambda stored: stored) == (False, None)
    assert store.catalog.branches.session_state(ROOT, "default", "other") == "new"
    turn(store, tokens, "other")
    assert is_whole(store, tokens)


def test_files_of_what_a_branch_needs_no_more_go_at_its_commit(store: BlockStore) -> None:
    old, kept, new = windows(ids(12), 0, 1, 2)
    mark = record(ROOT, ids(3), kind="tail")
    branch = turn_with(store, ids(9), [old, kept, mark])
    assert names_in(store, "windows") == sorted(one.key.hex() for one in (old, kept))
    branch = turn_with(store, ids(13), [kept, new], "s", branch)
    assert names_in(store, "windows") == sorted(one.key.hex() for one in (kept, new))
    assert names_in(store, "tails") == [records(ids(13))[-1].key.hex()]
    store.catalog.branches.fork("default", "s", "copy")
    branch = turn_with(store, ids(14), [], "s", branch)
    assert len(names_in(store, "windows")) == 2, "the fork needs them"
    assert store.check().clean
    store.forget("default", "copy")
    assert names_in(store, "windows") == []
    assert is_whole(store, ids(14))


def test_what_a_turn_needs_is_not_evicted_to_make_room_for_it(folder: Path) -> None:
    store = open_store(folder, quota=6 * FILE)
    (window,) = windows(ids(BLOCK), 0)
    turn_with(store, ids(BLOCK), [window], "old")
    turn(store, ids(2 * BLOCK, 100), "young")
    tokens = ids(4 * BLOCK)
    branch = store.commit(records(tokens), wanted(tokens, "new", dependencies=(window.key,)))
    assert store.catalog.branches.dependencies(branch.branch_id) == {window.key}
    assert store.load(ROOT, window.key, allocate) is not None
    assert store.check().clean
    store.close()


def test_forgetting_deletes_unshared_files_only_and_what_lies_in_quarantine(store: BlockStore) -> None:
    turn(store, ids(9, 0x5EC8E701), "a")
    store.forget("default", "a")
    needle = pack_tokens(ids(BLOCK, 0x5EC8E701))
    assert not any(needle in path.read_bytes() for path in store.path.rglob("*") if path.is_file())
    turn(store, ids(9), "a")
    turn(store, (*ids(8), 50), "b")
    damaged = turn(store, ids(3, 900), "c")
    assert damaged.tail is not None
    path_of(store, damaged.tail).write_bytes(b"x")
    assert store.load(ROOT, damaged.tail, allocate) is None
    assert store.stats()["quarantined"] == 1
    assert store.forget("default", "a")
    assert not store.forget("default", "a")
    assert is_whole(store, (*ids(8), 50))
    assert len(files(store)) == 3
    assert store.stats()["quarantined"] == 0
    assert store.forget("default", "b")
    assert store.forget("default", "c")
    assert files(store) == []


def test_pin_fork_and_list_reach_the_catalog(store: BlockStore) -> None:
    turn(store, ids(9), "a")
    store.catalog.branches.pin("default", "a", True)
    store.catalog.branches.fork("default", "a", "b")
    assert [(i.session_id, i.pinned, i.nbytes) for i in store.catalog.branches.sessions("default")] == [
        ("b", False, 3 * FILE),
        ("a", True, 3 * FILE),
    ]
    assert [branch.tokens for branch in store.catalog.branches.of_session("default", "b")] == [9]
    store.catalog.branches.pin("default", "a", False)
    with pytest.raises(SessionNotFound):
        store.catalog.branches.pin("default", "nobody", True)


def test_the_budget_holds_after_every_turn_and_eviction_is_leaf_first(folder: Path) -> None:
    store = open_store(folder, quota=13 * FILE)
    known: dict[str, tuple[int, ...]] = {}
    for n in range(60):
        session = f"s{n * n % 7}"
        tokens = (*known.get(session, ids(BLOCK)), *ids(1 + n % 6, 100 * n))[-6 * BLOCK :]
        rows = store.catalog.branches.of_session("default", session, ROOT)
        turn(store, tokens, session, rows[0] if rows else None)
        known[session] = tokens
        assert bytes_on_disk(store) == store.stats()["bytes"] <= 13 * FILE
        assert is_whole(store, tokens)
        stored = store.catalog.records.get_many(store.catalog.records.keys())
        assert all(row.parent == ROOT or row.parent in stored for row in stored.values())
    assert store.stats()["evicted"] > 50
    assert store.check().clean
    store.close()


def test_nothing_is_written_beyond_the_budget_even_for_a_moment(folder: Path) -> None:
    store = open_store(folder, quota=6 * FILE)
    most = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            sizes = []
            try:
                paths = [*files(store), *store.path.glob("tmp/*")]
            except FileNotFoundError:  # a folder that became empty
                continue
            for path in paths:
                try:
                    found = path.stat()
                except FileNotFoundError:
                    continue
                sizes.append((found.st_ino, found.st_size))
            most = max(most, sum(size for _, size in set(sizes)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for n in range(80):
        turn(store, ids(3 * BLOCK, 100 * n), f"s{n}")
    done.set()
    watcher.join()
    assert 3 * FILE <= most <= 6 * FILE
    store.close()


def test_pinned_sessions_survive_and_what_cannot_be_stored_evicts_nothing(folder: Path) -> None:
    store = open_store(folder, quota=8 * FILE)
    turn(store, ids(3 * BLOCK), "kept")
    store.catalog.branches.pin("default", "kept", True)
    for n in range(20):
        turn(store, ids(2 * BLOCK, 100 * n + 50), f"s{n}")
    assert is_whole(store, ids(3 * BLOCK))
    before = {path.name for path in files(store)}
    with pytest.raises(OverBudget, match="disk_budget_mb"):
        turn(store, ids(6 * BLOCK, 5000), "big")
    assert {path.name for path in files(store)} == before
    assert store.stats()["reserved"] == 0
    assert store.catalog.branches.session_state(ROOT, "default", "big") == "new"
    turn(store, ids(5 * BLOCK, 5000), "fits")
    assert is_whole(store, ids(3 * BLOCK))
    assert is_whole(store, ids(5 * BLOCK, 5000))
    assert store.check().clean
    store.close()


def test_a_turn_never_evicts_what_it_builds_on(folder: Path) -> None:
    store = open_store(folder, quota=8 * FILE)
    shared = ids(4 * BLOCK)
    turn(store, shared, "first")
    store.forget("default", "first")
    turn(store, shared, "first")
    branch = turn(store, ids(1, 900), "old")
    with store.catalog.transaction() as db:
        db.execute(
            "DELETE FROM branches WHERE session = (SELECT id FROM sessions WHERE session_id = 'first')"
        )
    tokens = (*shared, *ids(3 * BLOCK, 50))
    turn(store, tokens, "new")
    assert is_whole(store, tokens)
    longer = (*tokens, *ids(BLOCK, 90))
    (row,) = store.catalog.branches.of_session("default", "new", ROOT)
    turn(store, longer, "new", row)
    assert is_whole(store, longer)
    assert store.catalog.branches.session_state(ROOT, "default", "old") == "evicted"
    assert branch.tail is not None
    assert store.load(ROOT, branch.tail, allocate) is None
    with pytest.raises(StoreFull):
        turn(store, (*longer, 1), "new", store.catalog.branches.of_session("default", "new", ROOT)[0])
    assert is_whole(store, longer)
    store.close()


def test_the_volume_keeps_its_free_space(folder: Path) -> None:
    volume = os.statvfs(folder.parent)
    store = BlockStore(folder, quota_bytes=MANY, min_free_bytes=volume.f_blocks * volume.f_frsize)
    with pytest.raises(StoreFull) as full:
        turn(store, ids(3))
    assert not isinstance(full.value, OverBudget)
    assert files(store) == []
    store.close()


def test_whether_a_store_can_be_written_is_tried_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(folder)
    before = store.stats()["reserved"], sorted(folder.rglob("*"))
    store.try_to_write()
    assert (store.stats()["reserved"], sorted(folder.rglob("*"))) == before
    assert store.check().clean
    assert store.catalog.noted("trying") == []

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(RecordFiles, "_write_tmp", refuse)
        with pytest.raises(OSError, match="Read-only"):
            store.try_to_write()
    store.catalog.close()
    with pytest.raises(StoreError):
        store.try_to_write()
    store.close()


def test_the_default_budget_is_a_tenth_of_the_volume_or_20_gib(folder: Path) -> None:
    store = BlockStore(folder)
    volume = os.statvfs(folder)
    assert store.quota_bytes == min(20 * 2**30, volume.f_blocks * volume.f_frsize // 10)
    assert store.stats()["quota"] == store.quota_bytes
    store.close()


def test_loading_and_committing_at_once_never_gives_wrong_bytes(folder: Path) -> None:
    store = open_store(folder, quota=12 * FILE)
    done = threading.Event()
    wrong: list[str] = []
    hits = 0

    def read() -> None:
        nonlocal hits
        n = 0
        while not done.is_set():
            n += 1
            for made in records(ids(3 * BLOCK, 100 * (n % 8)), nbytes=8):
                block = store.load(ROOT, made.key, allocate)
                if block is not None:
                    hits += 1
                    if not is_right(block):
                        wrong.append(made.key.hex())

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(100):
        turn(store, ids(3 * BLOCK, 100 * (n % 8)), f"s{n % 8}")
    done.set()
    reader.join()
    assert wrong == []
    assert hits
    assert store.stats()["miss_damaged"] == store.stats()["miss_failed"] == 0
    assert store.check().clean
    store.close()
