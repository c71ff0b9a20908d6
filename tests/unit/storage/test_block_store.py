"""The disk: what goes in comes out, is stored once, stays within its budget, and survives the loss of its index."""

from __future__ import annotations

import json
import os
import resource
import stat
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
import xxhash
from safetensors import safe_open
from support import stored_turns
from support.stored_turns import (
    BLOCK,
    FILE,
    IDENTITY,
    PAYLOAD,
    ROOT,
    allocate,
    content,
    files,
    is_right,
    is_whole,
    path_of,
    record,
    records,
    turn,
    wanted,
)

from agent_memory_core.blocks.block import (
    BlockHash,
    RecordKind,
    block_hash,
    chain as chain_of,
    pack_tokens,
    record_hash,
    root_hash,
)
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.prefix_cache import PrefixCache
from agent_memory_core.blocks.resume_policy import EveryToken, LastTokens, ResumePolicy, WholeState
from agent_memory_core.config import Durability
from agent_memory_core.errors import SessionNotFound, StoreError, StoreFull, StoreUnreadable
from agent_memory_core.storage import block_file, folder as store_folder
from agent_memory_core.storage.block_file import ALIGNMENT
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import BranchRow
from agent_memory_core.storage.record import HostTensor, Record
from agent_memory_core.storage.record_files import MAX_QUARANTINED

MANY = 1000 * FILE
OTHER = root_hash({"model": "other"})
FOLDERS: dict[RecordKind, str] = {
    "block": "blocks",
    "tail": "tails",
    "window": "windows",
    "token_tail": "token_tails",
}


def ids(count: int, start: int = 0) -> tuple[int, ...]:
    return tuple(range(start, start + count))


def open_store(path: Path, quota: int = MANY, durability: Durability = "process") -> BlockStore:
    store = BlockStore(path, quota_bytes=quota, durability=durability)
    store.identify(ROOT, IDENTITY, "default")
    return store


def bytes_on_disk(store: BlockStore) -> int:
    return sum(path.stat().st_size for path in files(store))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[BlockStore]:
    store = open_store(folder)
    yield store
    report = store.check()
    store.close()
    assert report.clean, report
    assert (report.unknown, report.leftovers) == ((), 0)


# The file


def test_any_tool_reads_a_block_and_learns_what_it_is_but_not_its_tokens(store: BlockStore) -> None:
    data = os.urandom(16)
    tokens = ids(BLOCK, 0x5EC8E701)
    key = block_hash(ROOT, tokens)
    tensors = {
        "0.v": HostTensor("BF16", (2, 4), memoryview(data)),
        "0.k.codes": HostTensor("U32", (2, 2), memoryview(data)),
        "scales": HostTensor("F16", (8,), memoryview(data)),
        "nothing": HostTensor("F32", (0, 3), memoryview(b"")),
    }
    store.commit([Record(key, ROOT, tokens, "block", tensors)], wanted(tokens))
    path = path_of(store, key)
    assert path == store.path / "ns" / ROOT.hex() / "blocks" / key.hex()[:2] / f"{key.hex()}.safetensors"
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    assert {name: (x.dtype, tuple(x.shape)) for name, x in arrays.items()} == {
        "0.v": (mx.bfloat16, (2, 4)),
        "0.k.codes": (mx.uint32, (2, 2)),
        "scales": (mx.float16, (8,)),
        "nothing": (mx.float32, (0, 3)),
    }
    assert all(bytes(memoryview(arrays[name]).cast("B")) == data for name in list(tensors)[:3])
    with safe_open(path, framework="numpy") as opened:
        assert opened.get_tensor("0.k.codes").tobytes() == data
        said = opened.metadata()
    raw = path.read_bytes()
    checksum = xxhash.xxh3_128_hexdigest(raw[ALIGNMENT:])
    assert said | {"header_xxh3_128": ""} == {
        "schema": "2",
        "root": ROOT.hex(),
        "key": key.hex(),
        "parent": ROOT.hex(),
        "ntok": str(BLOCK),
        "kind": "block",
        "xxh3_128": checksum,
        "header_xxh3_128": "",
        "writer": "agent-memory",
    }
    assert raw[ALIGNMENT:] == data * 3
    assert pack_tokens(tokens[:1]) not in raw


def test_a_long_header_ends_at_the_next_multiple_of_4096(store: BlockStore) -> None:
    tokens = ids(BLOCK)
    views = [memoryview(content(bytes([n]), 8)) for n in range(200)]
    tensors = {f"layer.{n}.keys": HostTensor("U8", (8,), view) for n, view in enumerate(views)}
    made = Record(block_hash(ROOT, tokens), ROOT, tokens, "block", tensors)
    store.commit([made], wanted(tokens))
    with path_of(store, made.key).open("rb") as file:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
    assert start > ALIGNMENT
    assert start % ALIGNMENT == 0
    loaded = store.load(ROOT, made.key, allocate)
    assert loaded is not None
    assert [bytes(x) for x in loaded.tensors.values()] == [bytes(view) for view in views]
    with safe_open(path_of(store, made.key), framework="numpy") as opened:
        assert opened.get_tensor("layer.199.keys").tobytes() == bytes(views[199])


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

    def arrays(dtype: str, shape: tuple[int, ...]) -> tuple[mx.array, memoryview]:
        array = mx.zeros(shape, {"U32": mx.uint32, "BF16": mx.bfloat16}[dtype])
        mx.eval(array)
        return array, memoryview(array).cast("B")

    loaded = store.load(ROOT, made.key, arrays)
    assert loaded is not None
    assert b"".join(bytes(memoryview(x).cast("B")) for x in loaded.tensors.values()) == content(made.key)


def test_bytes_pass_whole_through_calls_that_move_a_part() -> None:
    views = [memoryview(content(bytes([n]), 0 if n % 5 == 0 else 1 + 13 * n)) for n in range(60)] * 40
    wanted_bytes = b"".join(views)
    moved = bytearray()

    def move(batch: list[memoryview], done: int) -> int:
        assert done == len(moved)
        assert 0 < len(batch) <= 1024
        piece = b"".join(batch)[: 1 + done % 977]
        moved.extend(piece)
        return len(piece)

    assert block_file.transfer(views, move) == len(wanted_bytes)
    assert moved == wanted_bytes
    assert block_file.transfer(views, lambda batch, done: min(5, 12 - done)) == 12


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


# Once


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
    plan = store._plan(records(tokens), wanted(tokens, "other"))
    path_of(store, records(tokens)[0].key).unlink()
    assert store._attempt(plan, wanted(tokens, "other")) is None
    assert store.catalog.branches.session_state(ROOT, "default", "other") == "new"
    turn(store, tokens, "other")
    assert is_whole(store, tokens)


# Records of other kinds


def beside(store: BlockStore, kind: RecordKind) -> list[str]:
    """The names of the files in the folder of a kind."""
    return sorted(path.stem for path in store.path.glob(f"ns/{ROOT.hex()}/{FOLDERS[kind]}/*/*.safetensors"))


def windows(tokens: tuple[int, ...], *indices: int) -> list[Record[HostTensor]]:
    """Window parts of these blocks of ``tokens``."""
    chain = records(tokens, nbytes=8)
    return [record(chain[index].key, (), kind="window") for index in indices]


def turn_with(
    store: BlockStore,
    tokens: tuple[int, ...],
    parts: list[Record[HostTensor]],
    session: str = "s",
    branch: BranchRow | None = None,
) -> BranchRow:
    """Commit a branch of ``tokens`` that needs ``parts`` beside its chain."""
    wish = wanted(tokens, session, branch, dependencies=tuple(part.key for part in parts))
    return store.commit([*records(tokens), *parts], wish)


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
        assert one.key.hex() in beside(store, one.kind)
        loaded = store.load(ROOT, one.key, allocate)
        assert loaded is not None
        assert (loaded.key, loaded.parent, loaded.tokens, loaded.kind) == (
            *(one.key, one.parent, one.tokens, one.kind),
        )
        assert loaded.tensors == {} if one is words else is_right(loaded)
    assert store.check().clean


def test_files_of_what_a_branch_needs_no_more_go_at_its_commit(store: BlockStore) -> None:
    old, kept, new = windows(ids(12), 0, 1, 2)
    mark = record(ROOT, ids(3), kind="tail")
    branch = turn_with(store, ids(9), [old, kept, mark])
    assert beside(store, "window") == sorted(one.key.hex() for one in (old, kept))
    branch = turn_with(store, ids(13), [kept, new], "s", branch)
    assert beside(store, "window") == sorted(one.key.hex() for one in (kept, new))
    assert beside(store, "tail") == [records(ids(13))[-1].key.hex()]
    store.catalog.branches.fork("default", "s", "copy")
    branch = turn_with(store, ids(14), [], "s", branch)
    assert len(beside(store, "window")) == 2, "the fork needs them"
    assert store.check().clean
    store.forget("default", "copy")
    assert beside(store, "window") == []
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


# Sessions


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


# Room


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
            for path in [*files(store), *store.path.glob("tmp/*")]:
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


def test_pinned_sessions_survive_and_what_cannot_be_stored_is_refused_early(folder: Path) -> None:
    store = open_store(folder, quota=8 * FILE)
    turn(store, ids(3 * BLOCK), "kept")
    store.catalog.branches.pin("default", "kept", True)
    for n in range(20):
        turn(store, ids(2 * BLOCK, 100 * n + 50), f"s{n}")
    assert is_whole(store, ids(3 * BLOCK))
    store.ensure_room(5 * FILE)
    with pytest.raises(StoreFull, match="disk_budget_mb"):
        store.ensure_room(5 * FILE + 1)
    before = {path.name for path in files(store)}
    with pytest.raises(StoreFull, match="disk_budget_mb"):
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
    with pytest.raises(StoreFull):
        store.ensure_room(1)
    with pytest.raises(StoreFull):
        turn(store, ids(3))
    assert files(store) == []
    store.close()


def test_the_default_budget_is_a_tenth_of_the_volume_or_20_gib(folder: Path) -> None:
    store = BlockStore(folder)
    volume = os.statvfs(folder)
    assert store.quota_bytes == min(20 * 2**30, volume.f_blocks * volume.f_frsize // 10)
    assert store.stats()["quota"] == store.quota_bytes
    store.close()


# Passing faults


def test_too_many_open_files_is_a_miss_and_the_file_stays(store: BlockStore) -> None:
    made = record(ROOT, ids(BLOCK))
    store.commit([made], wanted(ids(BLOCK)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        os.close(lowest)
        holes = []
        while True:
            try:
                holes.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        missed = store.load(ROOT, made.key, allocate)
        for fd in holes:
            os.close(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert missed is None
    assert store.stats()["miss_failed"] == 1
    assert is_whole(store, ids(BLOCK))


def test_too_little_memory_is_a_miss_and_the_file_stays(store: BlockStore) -> None:
    made = record(ROOT, ids(BLOCK))
    store.commit([made], wanted(ids(BLOCK)))

    def none_left(dtype: str, shape: tuple[int, ...]) -> tuple[bytearray, memoryview]:
        raise MemoryError

    assert store.load(ROOT, made.key, none_left) is None
    assert store.stats()["miss_failed"] == 1
    assert is_whole(store, ids(BLOCK))


def test_a_deleted_file_is_a_miss_and_comes_back_with_the_next_turn(store: BlockStore) -> None:
    tokens = ids(3 * BLOCK)
    branch = turn(store, tokens)
    chain = [made.key for made in records(tokens)]
    path_of(store, chain[1]).unlink()
    assert store.catalog.records.known_prefix(chain) == 3
    assert store.load(ROOT, chain[1], allocate) is None
    assert store.stats()["miss_gone"] == 1
    assert store.catalog.records.known_prefix(chain) == 1
    assert store.catalog.branches.tokens(branch) == tokens
    turn(store, (*tokens, 7), "s", branch)
    assert is_whole(store, (*tokens, 7))


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


# Opening


def refused(path: Path, match: str) -> None:
    with pytest.raises(StoreUnreadable, match=match):
        BlockStore(path)


def test_a_folder_that_others_can_read_is_refused_with_the_command_that_mends_it(folder: Path) -> None:
    for mode in (0o750, 0o701, 0o777, 0o500):
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
        refused(folder, f"chmod 700 {folder}")
    folder.chmod(0o700)
    BlockStore(folder).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    refused(folder, "belongs to user 12345")


def test_what_is_not_a_folder_or_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "not a folder")
    refused(tmp_path / "file" / "below", "cannot be made")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "cannot be made")


@pytest.mark.parametrize(("text", "match"), [("3\n", "upgrade"), ("many", "'many'")])
def test_a_newer_or_unknown_schema_is_refused_and_left_as_it_is(folder: Path, text: str, match: str) -> None:
    open_store(folder).close()
    (folder / "SCHEMA").write_text(text)
    refused(folder, match)
    assert (folder / "SCHEMA").read_text() == text


@pytest.mark.parametrize("lost", ["", "SCHEMA", "catalog.db"])
def test_a_store_of_version_1_is_refused_with_the_command_that_starts_anew(folder: Path, lost: str) -> None:
    """The folder was written by agent-memory as it was before this version; without its catalog nothing is found."""
    folder.mkdir(mode=0o700)
    with tarfile.open(Path(stored_turns.__file__).with_name("store_of_version_1.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    if lost:
        (folder / lost).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        StoreUnreadable, match="version 1, which this agent-memory-mlx cannot read"
    ) as refusal:
        BlockStore(folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before
    command = str(refusal.value).partition("with: ")[2]
    (folder / "transcripts").mkdir()
    subprocess.run(command, shell=True, check=False, stderr=subprocess.DEVNULL)
    store = open_store(folder)
    turn(store, ids(9))
    assert is_whole(store, ids(9))
    assert store.check().clean
    assert (folder / "transcripts").is_dir()
    store.close()


def test_the_file_system_of_the_tests_is_told_and_not_a_remote_one(tmp_path: Path) -> None:
    kind = store_folder.file_system(tmp_path)
    assert kind
    assert kind not in store_folder.REMOTE


def test_only_leftovers_of_dead_processes_are_removed(folder: Path) -> None:
    store = open_store(folder)
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        dead = [f"{int(ended.stdout)}.0.0", f"{os.getpid()}.of-an-earlier-life.0", "nonsense"]
        ours = Path(store.files._write_tmp([memoryview(b"x")])).name
        kept = [f"{alive.pid}.0.0", f"{os.getppid()}.0.0", ours]
        for name in (*dead, *kept):
            (folder / "tmp" / name).touch()
        open_store(folder).close()
        assert sorted(path.name for path in (folder / "tmp").iterdir()) == sorted(kept)
        os.utime(folder / "tmp" / ours, (0, 0))
        open_store(folder).close()
        assert sorted(path.name for path in (folder / "tmp").iterdir()) == sorted(kept[:2])
        alive.communicate(b"\n")
    store.close()


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


# A lost index


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


def test_windows_and_tails_come_back_from_their_files_and_a_tails_words_from_its_branch(folder: Path) -> None:
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
        found = whole.match(ROOT, prompt, chain_of(ROOT, prompt, BLOCK), store.catalog.records)
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


# The audit


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


@pytest.mark.parametrize("quota", [0, 1, FILE, 7 * FILE])
def test_a_check_says_how_far_a_store_is_over_its_quota_and_evicts_nothing(folder: Path, quota: int) -> None:
    store = open_store(folder)
    known = {f"s{n}": ids(3 * BLOCK + 1, 100 * n) for n in range(6)}
    for session, tokens in known.items():
        turn(store, tokens, session)
    store.close()
    small = open_store(folder, quota)
    before = (small.catalog.branches.sessions(), files(small), small.stats())
    for fix in (False, True, True):
        assert small.check(fix).over_quota == bytes_on_disk(small) - quota > 0
        assert (small.catalog.branches.sessions(), files(small), small.stats()) == before
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


def test_the_quarantine_keeps_the_newest_few(store: BlockStore) -> None:
    for n in range(12):
        made = record(ROOT, ids(BLOCK, 100 * n))
        store.commit([made], wanted(made.tokens, f"s{n}"))
        path_of(store, made.key).write_bytes(json.dumps(n).encode())
        assert store.load(ROOT, made.key, allocate) is None
    kept = sorted(int(path.read_text()) for path in (store.path / "quarantine").iterdir())
    assert kept == list(range(12 - MAX_QUARANTINED, 12))
