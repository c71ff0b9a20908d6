"""Rows and files are brought together in the background, whoever separated them.

A process that is killed finishes what it began when the store is opened again. Other programs leave no note: they
delete files, put back an older catalog, or restore a folder from a backup. So every opening with an engine looks once
at all names, a 256th at a time: a sound file without a row is adopted and counts against the quota, a row without a
file is dropped, and a folder that is empty goes. No payload is read.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection

from agent_memory_core.errors import StoreError
from agent_memory_core.storage.block_file import Damaged, describe, open_file
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.record_files import FoundFile, RecordFiles
from agent_memory_core.storage.recovery import discard, register_root

log = logging.getLogger("agent_memory")

PARTS = 256
"""How many steps it takes to see all: one for each first byte of a key."""

_PAUSE_SECONDS = 0.01
_AT_ONCE = 64


class Reconciler:
    """A thread that reconciles a store once, and ends.

    Args:
        catalog, files: of the store; they stay open until `stop` returns.
    """

    def __init__(self, catalog: Catalog, files: RecordFiles) -> None:
        self._catalog = catalog
        self._files = files
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agent-memory-reconcile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is in the middle of."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        mended = 0
        try:
            for part in range(PARTS):
                mended += reconcile(self._catalog, self._files, part)
                if self._stopped.wait(_PAUSE_SECONDS):
                    return
        except (StoreError, OSError) as error:
            log.warning("files and catalog of %s could not be compared: %s", self._files.path, error)
        if mended:
            log.info("%d records of %s had lost their row or their file", mended, self._files.path)


def reconcile(catalog: Catalog, files: RecordFiles, part: int) -> int:
    """Bring together the rows and files whose keys begin with the byte ``part``; return how many were apart.

    Raises:
        StoreError: the catalog cannot be read or written.
    """
    catalog.records.add_starts(part)
    there = {file.path: file for file in files.in_part(part)}
    named = {files.place(root, key, kind): key for key, root, kind in catalog.records.places(part)}
    unknown = [file for path, file in there.items() if path not in named]
    missing = [key for path, key in named.items() if path not in there]
    for start in range(0, max(len(unknown), len(missing)), _AT_ONCE):
        _drop_lost(missing[start : start + _AT_ONCE], catalog, files)
        _adopt(unknown[start : start + _AT_ONCE], catalog, files)
    return len(unknown) + len(missing)


def _drop_lost(keys: Collection[bytes], catalog: Catalog, files: RecordFiles) -> None:
    with catalog.transaction():
        rows = catalog.records.get_many(list(keys)).values()
        catalog.records.mark_lost(row.key for row in rows if not os.path.lexists(files.path_of(row)))


def _adopt(unknown: Collection[FoundFile], catalog: Catalog, files: RecordFiles) -> None:
    """Give rows to files, but for those that somebody is writing or deleting just now."""
    with catalog.transaction():
        keys = [file.key for file in unknown if file.key is not None]
        busy = catalog.budget.being_written(keys) | catalog.records.being_deleted(keys)
        for file in unknown:
            if file.key is None or file.key in busy or catalog.records.get(file.key) is not None:
                continue
            found = _described(file, file.key, catalog, files)
            if found is not None:
                register_root(catalog, files.identity_of(file.root), file.root)
                catalog.records.adopt([found])


def _described(
    file: FoundFile, key: bytes, catalog: Catalog, files: RecordFiles
) -> tuple[StoredRecord, float] | None:
    try:
        with open_file(file.path) as (fd, size):
            return describe(fd, size, file.root, key, file.kind, files.unopened), os.fstat(fd).st_mtime
    except Damaged as damage:
        discard(catalog, files, key, file.path, str(damage))
    except OSError as error:
        log.warning("%s could not be read: %s", file.path, error)
    return None
