"""What cannot be read is a miss, counted by its reason, and never ends a turn."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence

from support.stored_turns import (
    BLOCK,
    OTHER,
    ROOT,
    allocate,
    ids,
    is_whole,
    path_of,
    record,
    records,
    turn,
    wanted,
)

from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.record_reader import Counts


def test_numbers_that_were_never_raised_are_read_as_zero() -> None:
    counts = Counts("evicted", "miss_gone")
    counts.add("evicted", 3)
    counts.add("evicted")
    assert counts.read() == {"evicted": 4, "miss_gone": 0}


def test_a_record_of_another_root_is_unknown(store: BlockStore) -> None:
    made = record(ROOT, ids(BLOCK))
    store.commit([made], wanted(ids(BLOCK)))
    assert store.load(OTHER, made.key, allocate) is None
    assert store.stats()["miss_unknown"] == 1


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

    def none_left(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[bytearray, memoryview]]:
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
