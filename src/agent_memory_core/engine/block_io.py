"""The two threads between memory and disk: one writer, one reader. Neither ever waits for the engine.

The writer takes host bytes of evaluated arrays and makes a turn durable; its queue is bounded in bytes, and a
full queue makes the engine wait rather than drop a save. The reader fills newly allocated arrays straight from
the files. Arrays handed over are evaluated before, since a lazy array belongs to the thread that made it.

Neither touches what belongs to the engine: what they did comes back as a value, `Loaded` or `Saved`, through one queue.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from agent_memory_core.blocks.block import Block, BlockHash
from agent_memory_core.errors import StoreError, StoreFull
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import BranchCommit, BranchRow
from agent_memory_core.storage.record import HostTensor, Record

log = logging.getLogger("agent_memory")

MAX_PENDING = 512 * 2**20
"""Most bytes that wait to be written."""

_DTYPES = {
    "U32": mx.uint32,
    "U8": mx.uint8,
    "I32": mx.int32,
    "I64": mx.int64,
    "BOOL": mx.bool_,
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def allocate(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[mx.array, memoryview]]:
    """Evaluated arrays of these dtypes and shapes and their writable bytes, to be filled before anything reads them.

    The CPU makes them, in one evaluation: it has the same memory as the GPU on a Mac, and does not wait behind what the
    GPU computes for others. On CUDA they lie at once where both can reach them.
    """
    # Any, because MLX's types name the buffer protocol on some versions of Python only.
    arrays: list[Any] = [mx.zeros(shape, _DTYPES[dtype], stream=mx.cpu) for dtype, shape in tensors]
    mx.eval(arrays)
    return [(array, memoryview(array).cast("B")) for array in arrays]


def to_record(block: Block) -> Record[HostTensor]:
    """The host form of a block whose arrays are evaluated. It shares their memory.

    Only for the engine's thread: on CUDA, taking a view moves the array to memory that the CPU can reach and frees the
    old place, which must not happen while the engine gives the GPU work that reads it.
    """
    tensors = {
        name: HostTensor(_NAMES[x.dtype], tuple(x.shape), memoryview(x).cast("B"))
        for name, x in block.kv.items()
    }
    return Record(block.hash, block.parent, block.tokens, block.kind, tensors)


def memory_is_writable() -> bool:
    """Whether bytes written through an array's memoryview are what MLX then reads on this backend."""
    ((array, view),) = allocate([("U32", (4,))])
    view[:] = b"\x01\x00\x00\x00" * 4
    return bool(mx.all(array == 1).item())


@dataclass(frozen=True, slots=True)
class _HostBytes:
    """Where a tensor is read to on a backend whose arrays cannot be written into; copied into one afterwards."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray

    @classmethod
    def allocate(cls, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[_HostBytes, memoryview]]:
        found = [
            cls(dtype, shape, bytearray(math.prod(shape) * _DTYPES[dtype].size)) for dtype, shape in tensors
        ]
        return [(host, memoryview(host.data)) for host in found]

    def array(self) -> mx.array:
        """The bytes as an array, not evaluated yet."""
        return mx.array(np.frombuffer(self.data, np.uint8)).view(_DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class BranchPosition:
    """Where a branch stands in the catalog."""

    branch_id: int | None
    """Its row; None if it has none yet."""
    generation: int
    """How often it was committed."""


@dataclass(frozen=True, slots=True, eq=False)
class Save:
    """One turn to make durable."""

    seq_id: int
    """The turn."""
    blocks: tuple[Block, ...]
    """The records to write, evaluated."""
    commit: BranchCommit
    """What the catalog should say of the branch; its id and generation count unless ``after`` says otherwise."""
    after: Future[BranchPosition] | None = None
    """The position of the same branch after the commit before this one, if that may still be on its way."""
    position: Future[BranchPosition] = field(default_factory=Future)
    """The position of the branch after this commit; the writer sets it."""

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(block.nbytes for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of a `Save`."""

    seq_id: int
    row: BranchRow | None
    """The branch as it is in the catalog; None if the turn could not be saved."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Records that were read for a turn."""

    seq_id: int
    blocks: list[Record[Any]]
    """In the order that they were asked for, up to the first that could not be had."""


class Results(Protocol):
    """The queue that takes what was done to the engine's thread."""

    def put(self, item: Loaded | Saved, /) -> None:
        """Add a result."""
        ...


class _Worker:
    """A daemon thread that takes jobs from a queue until it is told to stop."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> bool:
        """Queue a job, and say whether it will be done: after `close`, none is."""
        with self._closing:
            if not self._closed:
                self._jobs.put(job)
            return not self._closed

    def close(self) -> None:
        """Finish all jobs and end the thread."""
        with self._closing:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                # The thread's outermost loop: one fault must not end it and leave every later turn waiting.
                log.exception("%s met a fault", self._thread.name)
        # A thread that ran MLX and simply ends aborts the process at exit.
        mx.synchronize()
        mx.clear_streams()


class BlockWriter:
    """Makes turns durable in the order they are handed in."""

    def __init__(self, store: BlockStore, results: Results, max_pending: int = MAX_PENDING) -> None:
        """Each turn's outcome is put into ``results`` as a `Saved`."""
        self._store = store
        self._results = results
        self._max_pending = max_pending
        self._pending = 0
        self._room = threading.Condition()
        self._worker = _Worker("agent-memory-writer")
        self._is_full = False
        self.failed = 0

    def submit(self, save: Save) -> None:
        """Queue a turn; wait while more than `MAX_PENDING` bytes are under way. Only the engine's thread calls it."""
        records = [to_record(block) for block in save.blocks]
        with self._room:
            self._room.wait_for(
                lambda: self._pending == 0 or self._pending + save.nbytes <= self._max_pending
            )
            self._pending += save.nbytes
        self._worker.put(lambda: self._write(save, records))

    def flush(self) -> None:
        """Wait until all that is queued now is written. Any thread may call it, also after `close`."""
        done = threading.Event()
        if self._worker.put(done.set):
            done.wait()

    def close(self) -> None:
        """Write all that is queued, then end."""
        self._worker.close()

    def _write(self, save: Save, records: Sequence[Record[HostTensor]]) -> None:
        before = save.after.result() if save.after is not None else None
        commit = save.commit
        if before is not None:
            commit = dataclasses.replace(commit, branch_id=before.branch_id, generation=before.generation)
        row: BranchRow | None = None
        try:
            row = self._store.commit(records, commit)
            self._tell_room()
        except (StoreError, OSError) as error:
            # The answer stands and older states stay readable; only this turn will be computed again.
            self.failed += 1
            self._tell_failed(error)
        finally:
            with self._room:
                self._pending -= save.nbytes
                self._room.notify_all()
            now = commit if row is None else row
            save.position.set_result(BranchPosition(now.branch_id, now.generation))
            self._results.put(Saved(save.seq_id, row))

    def _tell_failed(self, error: Exception) -> None:
        """Log why a turn was not saved. A full disk is told once, not with every turn."""
        if isinstance(error, StoreFull):
            level, self._is_full = logging.DEBUG if self._is_full else logging.WARNING, True
            log.log(level, "turns are answered but not saved until there is room: %s", error)
        else:
            log.warning("a turn could not be saved: %s", error)

    def _tell_room(self) -> None:
        """Log that a disk that was full has room again."""
        if self._is_full:
            self._is_full = False
            log.warning("turns are saved again")


class BlockReader:
    """Loads chains of blocks. A chain ends before its first block that cannot be had."""

    def __init__(self, store: BlockStore, results: Results) -> None:
        """What was read for a turn is put into ``results`` as a `Loaded`."""
        self._store = store
        self._results = results
        self._writes_into_arrays = memory_is_writable()
        self._worker = _Worker("agent-memory-reader")

    def submit(self, seq_id: int, root: BlockHash, keys: Sequence[BlockHash]) -> None:
        """Load records in order, for the turn of that id."""
        loaded: list[Record[Any]] = []

        def job() -> None:
            try:
                self._load(root, keys, loaded)
            finally:
                self._results.put(Loaded(seq_id, loaded))

        self._worker.put(job)

    def close(self) -> None:
        """Finish what is queued, then end."""
        self._worker.close()

    def _load(self, root: BlockHash, keys: Sequence[BlockHash], loaded: list[Record[Any]]) -> None:
        for key in keys:
            block = self._store.load(root, key, allocate if self._writes_into_arrays else _HostBytes.allocate)
            if block is None:
                break
            if not self._writes_into_arrays:
                arrays = {name: host.array() for name, host in block.tensors.items()}
                mx.eval(arrays)
                block = dataclasses.replace(block, tensors=arrays)
            loaded.append(block)
