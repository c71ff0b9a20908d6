"""What several threads read for a turn comes in its order, up to the first record that cannot be had."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from support.stored_turns import BLOCK, ROOT, ids, open_store, records, wanted

from agent_memory_core.engine.block_reader import READERS, BlockReader
from agent_memory_core.engine.results import Loaded
from agent_memory_core.storage.record import Record

Results = queue.SimpleQueue[Loaded]


def keys_of(count: int) -> list[bytes]:
    return [bytes([n]) * 32 for n in range(count)]


class Made:
    """A store whose records take as long as they are told to; reading the one that is named waits to be let go."""

    def __init__(
        self,
        seconds: Mapping[bytes, float] | float = 0.0,
        lost: bytes | None = None,
        hangs_at: bytes | None = None,
    ) -> None:
        self.seconds, self.lost, self.hangs_at = seconds, lost, hangs_at
        self.go_on, self.read = threading.Event(), list[bytes]()

    def load(self, root: bytes, key: bytes, allocate: Any) -> Record[Any] | None:
        self.read.append(key)
        if key == self.hangs_at:
            self.go_on.wait(30)
        time.sleep(self.seconds if isinstance(self.seconds, float) else self.seconds[key])
        return None if key == self.lost else Record(key, root, (), "block", {})


@contextmanager
def reading(store: Any, results: Results, **options: Any) -> Iterator[BlockReader]:
    reader = BlockReader(store, results, **options)
    try:
        yield reader
    finally:
        reader.close()


def told(results: Results) -> list[Loaded]:
    """All answers up to the last one of a turn."""
    found = [results.get(timeout=20)]
    while not found[-1].is_last:
        found.append(results.get(timeout=20))
    return found


def names(answers: Sequence[Loaded]) -> list[bytes]:
    return [record.key for loaded in answers for record in loaded.blocks]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(0, 14), st.integers(0, 10**6))
def test_records_come_in_order_up_to_the_first_that_is_lost(count: int, lost: int, seed: int) -> None:
    keys, luck = keys_of(count), random.Random(seed)
    gap = keys[lost] if lost < count else None
    store = Made({key: luck.choice([0.0, 0.0, 0.003]) for key in keys}, lost=gap)
    results: Results = queue.SimpleQueue()
    with reading(store, results) as reader:
        reader.submit(7, ROOT, keys)
        answers = told(results)
    assert names(answers) == keys[:lost]
    assert {loaded.seq_id for loaded in answers} == {7}
    assert results.empty(), "nothing comes after the last answer"
    assert len(store.read) == len(set(store.read)), "no record is read twice"


def test_the_first_records_are_told_before_the_last_one_is_read() -> None:
    keys = keys_of(4)
    store, results = Made(hangs_at=keys[3]), queue.SimpleQueue[Loaded]()
    with reading(store, results) as reader:
        reader.submit(1, ROOT, keys)
        first = [results.get(timeout=20)]
        while len(names(first)) < 3:
            first.append(results.get(timeout=20))
        assert not first[-1].is_last
        store.go_on.set()
        assert names(told(results)) == keys[3:]


def test_what_was_written_is_read_into_arrays(tmp_path: Path) -> None:
    store, results = open_store(tmp_path / "store"), queue.SimpleQueue[Loaded]()
    tokens = ids(3 * BLOCK)
    written = records(tokens)
    store.commit(written, wanted(tokens))
    with reading(store, results) as reader:
        reader.submit(7, ROOT, [record.key for record in written])
        answers = told(results)
    store.close()
    found = [record for loaded in answers for record in loaded.blocks]
    for record, given_ in zip(found, written, strict=True):
        for name, tensor in given_.tensors.items():
            assert bytes(memoryview(record.tensors[name]).cast("B")) == bytes(tensor.data)
            assert isinstance(record.tensors[name], mx.array)


def test_a_slow_disk_is_waited_for_as_long_as_it_answers() -> None:
    """Together its records take far longer than a turn waits for one."""
    keys, results = keys_of(8), queue.SimpleQueue[Loaded]()
    with reading(Made(0.15), results, patience=0.3) as reader:
        reader.submit(1, ROOT, keys)
    assert names(told(results)) == keys


def test_what_was_read_before_a_read_that_hangs_is_used_and_nothing_comes_after_it() -> None:
    keys, results = keys_of(5), queue.SimpleQueue[Loaded]()
    store = Made(hangs_at=keys[2])
    with reading(store, results, patience=0.2) as reader:
        reader.submit(1, ROOT, keys)
        assert names(told(results)) == keys[:2]
        store.go_on.set()
    assert results.empty()


def test_turns_whose_reads_hang_leave_readers_for_others() -> None:
    keys, results = keys_of(6), queue.SimpleQueue[Loaded]()
    store = Made(hangs_at=keys[0])
    with reading(store, results, patience=20) as reader:
        for turn in range(READERS - 1):
            reader.submit(turn, ROOT, keys[:1])
        reader.submit(99, ROOT, keys[1:])
        assert names(told(results)) == keys[1:]
        store.go_on.set()


@pytest.mark.parametrize("place", [0, 2])
def test_a_fault_of_the_store_ends_a_turns_records_there(
    place: int, caplog: pytest.LogCaptureFixture
) -> None:
    keys, results = keys_of(4), queue.SimpleQueue[Loaded]()
    store = Made()
    store.seconds = {key: 0.0 for key in keys if key != keys[place]}
    with reading(store, results) as reader:
        reader.submit(1, ROOT, keys)
        assert names(told(results)) == keys[:place]
        reader.submit(2, ROOT, keys[:place])
        assert told(results)[-1].seq_id == 2
    assert "met a fault" in caplog.text
