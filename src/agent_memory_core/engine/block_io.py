"""The thread that writes to disk, and the arrays that are written from and read into. It never waits for the engine.

The writer takes host bytes of evaluated arrays and makes a turn durable; its queue is bounded in bytes, and a
full queue makes the engine wait rather than drop a save. Arrays handed over are evaluated before, since a lazy array
belongs to the thread that made it.

It touches nothing that belongs to the engine: what it did comes back as a value, `Saved`, through one queue.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from agent_memory_core.blocks.block import Block, BlockHash
from agent_memory_core.engine.disk_watch import DiskWatch
from agent_memory_core.engine.results import Results, Saved
from agent_memory_core.engine.workers import Worker
from agent_memory_core.errors import StoreError
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import BranchCommit, SessionOwner
from agent_memory_core.storage.record import HostTensor, Record

log = logging.getLogger("agent_memory")

MAX_PENDING = 512 * 2**20
"""Most bytes that wait to be written."""

ROOM_PATIENCE = 1.0
"""Seconds that the engine waits for a disk that does not keep up, once until it has done something again."""

SAVE_PATIENCE = 10.0
"""Seconds that a turn waits to hear that it was written."""

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
class HostBytes:
    """Where a tensor is read to on a backend whose arrays cannot be written into; copied into one afterwards."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray

    @classmethod
    def allocate(cls, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[HostBytes, memoryview]]:
        found = [
            cls(dtype, shape, bytearray(math.prod(shape) * _DTYPES[dtype].size)) for dtype, shape in tensors
        ]
        return [(host, memoryview(host.data)) for host in found]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return len(self.data)

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


class _Breaker:
    """Spares turns the wait for a disk that keeps failing slowly: it is tried again now and then only."""

    SLOW, FIRST, LONGEST = 2.0, 5.0, 60.0
    """Seconds: how long a failure takes that counts, and the first and the longest pause after one."""

    def __init__(self) -> None:
        self._until, self._pause = 0.0, self.FIRST

    def check(self, now: float) -> None:
        """Refuse to try while it makes no sense.

        Raises:
            StoreError: the disk failed slowly a moment ago.
        """
        if now < self._until:
            raise StoreError("the disk failed a moment ago, after a long wait; it is tried again in a while.")

    def failed(self, begun: float) -> None:
        """A write that began then has failed."""
        now = time.monotonic()
        if now - begun >= self.SLOW:
            self._until, self._pause = now + self._pause, min(2 * self._pause, self.LONGEST)

    def worked(self) -> None:
        """A write has worked."""
        self._until, self._pause = 0.0, self.FIRST


class BlockWriter:
    """Makes turns durable in the order they are handed in.

    Args:
        store: where to.
        results: each turn's outcome is put here as a `Saved`, and one before it where the disk is slow.
        max_pending: bytes under way beyond which a turn is not saved.
        patience: seconds that a turn waits to hear that it was written.
    """

    def __init__(
        self,
        store: BlockStore,
        results: Results,
        max_pending: int = MAX_PENDING,
        patience: float = SAVE_PATIENCE,
    ) -> None:
        self._store = store
        self._results = results
        self._max_pending = max_pending
        self._patience = patience
        self._pending = 0
        self._room = threading.Condition()
        self._worker = Worker("agent-memory-writer")
        self._is_stalled = False
        self._failure: Exception | None = None
        self._breaker = _Breaker()
        self._watch = DiskWatch(self._try_to_write, self._worker.put, patience)
        self._identities: dict[BlockHash, tuple[Mapping[str, str], str]] = {}
        self.failed = 0

    @property
    def trouble(self) -> str | None:
        """Why turns cannot be saved now; None where they can. Any thread may ask, and does not wait."""
        return self._watch.trouble

    def submit(self, save: Save) -> None:
        """Queue a turn. Only the engine's thread calls it, and waits for a slow disk a moment at most."""
        if not self._take_room(save.nbytes):
            self._results.put(Saved(save.seq_id, None, "the disk does not keep up.", is_final=False))
            # The blocks are not held until the disk answers.
            self._refuse_later(dataclasses.replace(save, blocks=()))
            return
        records = [to_record(block) for block in save.blocks]
        overdue = Saved(
            save.seq_id, None, f"the disk has not answered for {self._patience:g} seconds.", False
        )
        clock = threading.Timer(self._patience, lambda: self._results.put(overdue))
        clock.daemon = True
        clock.start()

        def job() -> None:
            try:
                self._write(save, records)
            finally:
                clock.cancel()

        self._worker.put(job)

    def keep(self, owner: SessionOwner, blocks: Sequence[Block]) -> None:
        """Queue a part of a prompt whose turn has not ended; it is left out where the disk does not keep up."""
        nbytes = sum(block.nbytes for block in blocks)
        if not self._take_room(nbytes):
            return
        records = [to_record(block) for block in blocks]
        self._worker.put(lambda: self._keep(owner, records, nbytes))

    def _keep(self, owner: SessionOwner, records: Sequence[Record[HostTensor]], nbytes: int) -> None:
        begun = time.monotonic()
        try:
            self._breaker.check(begun)
            with self._watch.asking():
                self._identify(owner.root)
                self._store.keep(records, owner)
        except (StoreError, OSError) as error:
            # The turn's own commit tries it again, and tells.
            self._breaker.failed(begun)
            log.debug("a part of a prompt could not be saved: %s", error)
        finally:
            self._give_room(nbytes)

    def _give_room(self, nbytes: int) -> None:
        with self._room:
            self._pending -= nbytes
            self._is_stalled = False
            self._room.notify_all()

    def _take_room(self, nbytes: int) -> bool:
        with self._room:
            has_room = self._room.wait_for(
                lambda: self._pending == 0 or self._pending + nbytes <= self._max_pending,
                0.0 if self._is_stalled else ROOM_PATIENCE,
            )
            self._is_stalled = not has_room
            self._pending += nbytes if has_room else 0
        return has_room

    def _refuse_later(self, save: Save) -> None:
        """Leave a branch where the commit before this one leaves it."""

        def job() -> None:
            self.failed += 1
            stays = BranchPosition(save.commit.branch_id, save.commit.generation)
            save.position.set_result(save.after.result() if save.after is not None else stays)
            self._results.put(Saved(save.seq_id, None))

        self._worker.put(job)

    def identify(self, root: BlockHash, identity: Mapping[str, str], namespace: str) -> None:
        """Remember what a root was hashed from; it is written down with the first turn that has it."""
        self._identities[root] = identity, namespace

    def later(self, job: Callable[[], None]) -> None:
        """Do something else in turn; what is queued after `close` is not done."""
        self._worker.put(job)

    def flush(self) -> None:
        """Wait until all that is queued now is written. Any thread may call it, also after `close`."""
        done = threading.Event()
        if self._worker.put(done.set):
            done.wait()

    def close(self) -> None:
        """Write all that is queued, then end."""
        self._worker.close()
        self._watch.close()

    def _write(self, save: Save, records: Sequence[Record[HostTensor]]) -> None:
        before = save.after.result() if save.after is not None else None
        commit = save.commit
        if before is not None:
            commit = dataclasses.replace(commit, branch_id=before.branch_id, generation=before.generation)
        row, reason = None, ""
        begun = time.monotonic()
        try:
            self._breaker.check(begun)
            with self._watch.asking():
                self._identify(commit.root)
                row = self._store.commit(records, commit)
            self._breaker.worked()
            self._watch.worked()
            self._tell_works()
        except (StoreError, OSError) as error:
            # The answer stands and older states stay readable; only this turn will be computed again.
            self.failed += 1
            self._breaker.failed(begun)
            self._watch.failed(error)
            reason = str(error)
            self._tell_failed(error)
        finally:
            self._give_room(save.nbytes)
            now = commit if row is None else row
            save.position.set_result(BranchPosition(now.branch_id, now.generation))
            self._tell(Saved(save.seq_id, row, reason), commit)

    def _tell(self, saved: Saved, commit: BranchCommit) -> None:
        """Answer for a turn: what is on this disk may have to be elsewhere, too, before it is safe."""
        if saved.row is None:
            self._results.put(saved)
            return
        self._store.mirror.acknowledge(
            commit.namespace,
            commit.session_id,
            lambda why: self._results.put(dataclasses.replace(saved, reason=why)),
        )

    def _try_to_write(self) -> None:
        begun = time.monotonic()
        self._breaker.check(begun)
        try:
            self._store.try_to_write()
        except (StoreError, OSError):
            self._breaker.failed(begun)
            raise

    def _identify(self, root: BlockHash) -> None:
        if root in self._identities:
            identity, namespace = self._identities[root]
            self._store.identify(root, identity, namespace)
            self._identities.pop(root, None)

    def _tell_failed(self, error: Exception) -> None:
        """Log why a turn was not saved: once, not with every turn that meets the same."""
        is_news, self._failure = type(error) is not type(self._failure), error
        log.log(
            logging.WARNING if is_news else logging.DEBUG,
            "turns are answered but not saved until this is mended: %s",
            error,
        )

    def _tell_works(self) -> None:
        """Log that turns are saved that could not be saved before."""
        if self._failure is not None:
            self._failure = None
            log.warning("turns are saved again")
