"""Reads records from their files and verifies them; what does not come back is counted by its reason."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any

from agent_memory_core.blocks.block import BlockHash
from agent_memory_core.storage.block_file import Damaged, is_locked, open_file, read_record
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.key_ring import Keys
from agent_memory_core.storage.record import Allocate, Record, StoredRecord
from agent_memory_core.storage.record_files import RecordFiles
from agent_memory_core.storage.recovery import discard
from agent_memory_core.storage.sealing import Locked

log = logging.getLogger("agent_memory")


class Counts:
    """Numbers by name, which any thread may raise."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, by: int = 1) -> None:
        """Raise a number."""
        with self._lock:
            self._counts[name] += by

    def read(self) -> dict[str, int]:
        """All numbers as they are now."""
        with self._lock:
            return {name: self._counts[name] for name in self._names}


class RecordReader:
    """The reading half of a store. Any thread may call it."""

    def __init__(self, catalog: Catalog, files: RecordFiles, keys: Keys, counts: Counts) -> None:
        self._catalog, self._files, self._keys, self._counts = catalog, files, keys, counts

    def load(self, root: BlockHash, key: BlockHash, allocate: Allocate) -> Record[Any] | None:
        """Read one record into arrays of ``allocate`` and verify it; None is a miss, counted by its reason."""
        name, key = key, self._keys.hide(key)
        stored = self._catalog.records.get(key)
        if stored is None or stored.root != root:
            self._counts.add("miss_unknown")
            return None
        path = self._files.path_of(stored)
        try:
            with open_file(path) as (fd, size):
                found = read_record(fd, size, stored, allocate, self._catalog.records.cipher(root))
            return replace(found, key=name, parent=self._keys.show(found.parent))
        except FileNotFoundError:
            self._counts.add("miss_gone")
            discard(self._catalog, self._files, key, path)
        except Damaged as damage:
            self._counts.add("miss_damaged")
            discard(self._catalog, self._files, key, path, str(damage))
        except Locked:
            self._counts.add("miss_locked")
            self._drop_locked(stored)
        except (OSError, MemoryError) as error:
            self._counts.add("miss_failed")
            log.warning("%s could not be read: %s", path, error)
        return None

    def _drop_locked(self, found: StoredRecord) -> None:
        """Delete a record that did not open, and all of its root that another key has sealed: nobody opens them again.

        All at once, because a chain is read up to its first miss: each restart would find one more.
        """
        cipher = self._catalog.records.cipher(found.root)
        lost = [found]
        for record in self._catalog.records.select("WHERE stored AND root = ?", (found.root,)):
            with suppress(OSError, Damaged), open_file(self._files.path_of(record)) as (fd, size):
                lost += [record] if is_locked(fd, size, cipher) else []
        log.warning("%d records cannot be opened by the key of their namespace: they are deleted", len(lost))
        for record in lost:
            with suppress(OSError):
                self._files.delete(record)
            discard(self._catalog, self._files, record.key, self._files.path_of(record))
