"""The threads that read the records of turns whose prompt is on disk.

A record is handed to the engine as soon as all before it are there: the engine decodes it while the next one is read.
Arrays are filled straight from the files. The threads touch nothing that belongs to the engine: what they read comes to
it as a value, `Loaded`, through its queue.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from agent_memory_core.blocks.block import BlockHash
from agent_memory_core.engine.block_io import HostBytes, allocate, memory_is_writable
from agent_memory_core.engine.results import Loaded, Results
from agent_memory_core.engine.workers import Worker
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.record import Record

log = logging.getLogger("agent_memory")

READERS = 6
"""Threads that read."""

READERS_OF_A_TURN = 2
"""How many of them read for one turn at a time: reads that hang hold up their own turn, and not those of others."""

READ_PATIENCE = 5.0
"""Seconds that a turn waits for the disk; computing a prompt takes about as long."""


class _Load:
    """The records that one turn needs: which are to be read, and which were told in their order.

    They end before the first one that cannot be had. A clock ends them earlier, where the next one takes too long.
    """

    def __init__(self, seq_id: int, keys: Sequence[BlockHash], results: Results, patience: float) -> None:
        self._seq_id = seq_id
        self._keys = keys
        self._results = results
        self._patience = patience
        self._found: dict[int, Record[Any] | None] = {}
        self._taken = self._told = 0
        self._ended = False
        self._lock = threading.Lock()
        with self._lock:
            self._wind()
            self._tell()

    def take(self) -> int | None:
        """The place of a record that nobody reads yet; None if no more are needed."""
        with self._lock:
            if self._ended or self._taken == len(self._keys):
                return None
            self._taken += 1
            return self._taken - 1

    def put(self, place: int, record: Record[Any] | None) -> None:
        """What was read there; None if it cannot be had."""
        with self._lock:
            self._found[place] = record
            self._tell()

    def _tell(self) -> None:
        """Tell the records that follow those told before. Whoever comes after the end is too late."""
        ready: list[Record[Any]] = []
        while (record := self._found.get(self._told)) is not None:
            ready.append(record)
            del self._found[self._told]
            self._told += 1
        if self._told in self._found or self._told == len(self._keys):
            self._end(ready)
        elif ready and not self._ended:
            self._results.put(Loaded(self._seq_id, ready, is_last=False))

    def _end(self, ready: list[Record[Any]]) -> None:
        self._clock.cancel()
        if not self._ended:
            self._ended = True
            self._results.put(Loaded(self._seq_id, ready))

    def _wind(self) -> None:
        self._seen = self._told
        self._clock = threading.Timer(self._patience, self._look)
        self._clock.daemon = True
        self._clock.start()

    def _look(self) -> None:
        with self._lock:
            if self._ended:
                return
            if self._told > self._seen:
                self._wind()
                return
            log.warning("the disk has not answered for %g seconds: a turn goes on without it", self._patience)
            self._end([])


class BlockReader:
    """Loads chains of records. A chain ends before its first record that cannot be had, or not in time.

    Several threads read, so that a read that hangs holds up its own turn only, and that one not for long.

    Args:
        store: where the records are.
        results: what was read for a turn is put here, in one or more `Loaded`.
        patience: seconds without a further record after which a turn goes on with what was read by then.
    """

    def __init__(self, store: BlockStore, results: Results, patience: float = READ_PATIENCE) -> None:
        self._store = store
        self._results = results
        self._patience = patience
        self._writes_into_arrays = memory_is_writable()
        self._worker = Worker("agent-memory-reader", READERS)

    def submit(self, seq_id: int, root: BlockHash, keys: Sequence[BlockHash]) -> None:
        """Load records in order, for the turn of that id."""
        load = _Load(seq_id, keys, self._results, self._patience)

        def job() -> None:
            while (place := load.take()) is not None:
                record = None
                try:
                    record = self._read(root, keys[place])
                finally:
                    load.put(place, record)

        for _ in range(min(READERS_OF_A_TURN, len(keys))):
            self._worker.put(job)

    def close(self) -> None:
        """Finish what is queued, then end."""
        self._worker.close()

    def _read(self, root: BlockHash, key: BlockHash) -> Record[Any] | None:
        if self._writes_into_arrays:
            return self._store.load(root, key, allocate)
        read = self._store.load(root, key, HostBytes.allocate)
        if read is None:
            return None
        arrays = {name: host.array() for name, host in read.tensors.items()}
        mx.eval(arrays)
        return dataclasses.replace(read, tensors=arrays)
