"""The writer says what it did as values, in the order it was asked, and touches nothing else."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.stored_turns import BLOCK, IDENTITY, ROOT, ids, wanted

from agent_memory_core.blocks.block import Block, record_hash
from agent_memory_core.engine.block_io import ROOM_PATIENCE, BlockWriter, Save
from agent_memory_core.engine.results import Saved
from agent_memory_core.errors import StoreFull
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import BranchCommit, BranchRow
from agent_memory_core.storage.record import HostTensor, Record

Results = queue.SimpleQueue[Saved]


class FailsOnce(BlockStore):
    """A store whose first commit finds no room."""

    failed = False

    def commit(self, *arguments: Any) -> Any:
        if not self.failed:
            self.failed = True
            raise StoreFull("no room")
        return super().commit(*arguments)


@pytest.fixture
def results() -> Results:
    return queue.SimpleQueue()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    opened = BlockStore(tmp_path / "store")
    opened.identify(ROOT, IDENTITY, "default")
    yield opened
    opened.close()


def blocks(tokens: Sequence[int]) -> tuple[Block, ...]:
    """Full blocks of ``tokens``, with arrays that follow from them."""
    made: list[Block] = []
    for start in range(0, len(tokens), BLOCK):
        part = tuple(tokens[start : start + BLOCK])
        parent = made[-1].hash if made else ROOT
        kv = {"0.v": mx.array(part, dtype=mx.float32)}
        mx.eval(kv)
        made.append(Block(record_hash("block", parent, part), parent, part, kv["0.v"].nbytes, kv))
    return tuple(made)


def save(seq_id: int, count: int, after: Save | None = None) -> Save:
    tokens = ids(count * BLOCK)
    return Save(seq_id, blocks(tokens), wanted(tokens), after=after.position if after else None)


def test_two_turns_of_one_branch_that_wait_together_are_one_branch(
    store: BlockStore, results: Results
) -> None:
    writer = BlockWriter(store, results)
    first = save(1, 1)
    second = save(2, 2, after=first)
    writer.submit(first)
    writer.submit(second)
    writer.close()
    outcomes = [results.get_nowait(), results.get_nowait()]
    assert [outcome.seq_id for outcome in outcomes] == [1, 2]
    (row,) = store.catalog.branches.of_session("default", "s")
    assert outcomes[1] == Saved(2, row)
    assert (row.generation, row.tokens) == (2, 2 * BLOCK)
    assert second.position.result().branch_id == row.branch_id


def next_saved(results: Results) -> Saved:
    return results.get(timeout=60)


def test_a_turn_after_one_that_failed_begins_where_that_one_began(tmp_path: Path, results: Results) -> None:
    store = FailsOnce(tmp_path / "store")
    store.identify(ROOT, IDENTITY, "default")
    writer = BlockWriter(store, results)
    first = save(1, 1)
    writer.submit(first)
    writer.submit(save(2, 2, after=first))
    writer.close()
    failed = next_saved(results)
    assert (failed.seq_id, failed.row, failed.is_final) == (1, None, True)
    assert failed.reason == "no room"
    (row,) = store.catalog.branches.of_session("default", "s")
    assert results.get_nowait() == Saved(2, row)
    assert writer.failed == 1
    assert first.position.result().branch_id is None
    store.close()


class Hangs(BlockStore):
    """A store that does not write before it is told to."""

    go_on: threading.Event

    def commit(self, records: Sequence[Record[HostTensor]], commit: BranchCommit) -> BranchRow:
        assert self.go_on.wait(60)
        return super().commit(records, commit)


@pytest.fixture
def hangs(tmp_path: Path) -> Iterator[Hangs]:
    store = Hangs(tmp_path / "store")
    store.go_on = threading.Event()
    store.identify(ROOT, IDENTITY, "default")
    yield store
    store.close()


def test_a_turn_does_not_wait_for_a_disk_that_hangs_and_is_there_in_the_end(
    hangs: Hangs, results: Results
) -> None:
    writer = BlockWriter(hangs, results, patience=0.05)
    writer.submit(save(1, 1))
    told = next_saved(results)
    assert (told.seq_id, told.row, told.is_final) == (1, None, False)
    assert "has not answered" in told.reason
    while writer.trouble != told.reason:
        time.sleep(0.001)
    hangs.go_on.set()
    writer.close()
    assert not writer.trouble
    (row,) = hangs.catalog.branches.of_session("default", "s")
    assert results.get_nowait() == Saved(1, row)


def test_beyond_what_may_wait_a_turn_is_refused_and_the_branch_goes_on_after_it(
    hangs: Hangs, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread waits once, and then no more until the disk has done something."""
    waits: list[float | None] = []
    wait_for = threading.Condition.wait_for

    def noted(self: threading.Condition, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        waits.append(timeout)
        return wait_for(self, ready, 0.01 if timeout else timeout)

    monkeypatch.setattr(threading.Condition, "wait_for", noted)
    writer = BlockWriter(hangs, results, max_pending=1, patience=60)
    first = save(1, 1)
    writer.submit(first)
    second = save(2, 2, after=first)
    writer.submit(second)
    writer.submit(save(3, 3, after=second))
    assert [next_saved(results).is_final for _ in range(2)] == [False, False]
    assert waits == [ROOM_PATIENCE, ROOM_PATIENCE, 0.0]
    hangs.go_on.set()
    writer.flush()
    assert [next_saved(results).seq_id for _ in range(3)] == [1, 2, 3]
    writer.submit(save(4, 4, after=second))
    writer.close()
    row = next_saved(results).row
    assert row is not None
    assert (row.branch_id, row.generation) == (first.position.result().branch_id, 2)
    assert writer.failed == 2


def test_flushing_after_the_end_returns_at_once(store: BlockStore, results: Results) -> None:
    writer = BlockWriter(store, results)
    writer.close()
    writer.flush()
