"""What is done when the disk is not what the catalog says: a lost or damaged catalog, a lost or damaged file."""

from __future__ import annotations

import json
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from agent_memory_core.blocks.block import BlockHash
from agent_memory_core.config import Durability
from agent_memory_core.errors import StoreError
from agent_memory_core.storage.block_file import Damaged, describe, open_file
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.database import CatalogDamaged
from agent_memory_core.storage.folder import put_aside, read_small
from agent_memory_core.storage.key_ring import Keys
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.record_files import RecordFiles

log = logging.getLogger("agent_memory")


def open_catalog(files: RecordFiles, durability: Durability, keys: Keys, log_bytes: int) -> Catalog:
    """Open the catalog of a store. One that is missing or damaged is made anew from the headers of the files.

    Raises:
        StoreUnreadable: it cannot be opened, or is of another version.
    """
    path = files.path / "catalog.db"
    _clear_way(path)
    try:
        catalog = Catalog(path, files.presence, durability, log_bytes, keys=keys)
    except CatalogDamaged as damage:
        _set_database_aside(files, damage)
        catalog = Catalog(path, files.presence, durability, log_bytes, keys=keys)
    try:
        if catalog.created:
            _rebuild(catalog, files)
        catalog.records.count_totals()
    except BaseException:
        catalog.close()
        raise
    return catalog


def reopen_catalog(catalog: Catalog, files: RecordFiles) -> None:
    """Make the folders and the catalog of a store anew, of which something was deleted or replaced while it is open.

    Raises:
        StoreError: that cannot be done.
        OSError: a folder cannot be made.
    """
    files.make_folders()
    files.presence.show()
    _clear_way(files.path / "catalog.db")
    try:
        catalog.reopen()
    except CatalogDamaged as damage:
        _set_database_aside(files, damage)
        catalog.reopen()
    if catalog.created:
        _rebuild(catalog, files)


def _set_database_aside(files: RecordFiles, damage: CatalogDamaged) -> None:
    log.warning("%s It is rebuilt from the files; its sessions are lost, but their blocks are not.", damage)
    for file in _parts(files.path / "catalog.db"):
        if os.path.lexists(file):
            files.set_aside(file, str(damage))


def _parts(path: Path) -> list[Path]:
    return [Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]


def _clear_way(path: Path) -> None:
    """Put aside what SQLite could not open, and the log of a lost database: it would be replayed into the new one."""
    for log_file in _parts(path)[1:]:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(log_file).st_mode):
                put_aside(log_file)
            elif not path.exists():
                log_file.unlink(missing_ok=True)


def _rebuild(catalog: Catalog, files: RecordFiles) -> None:
    found: list[tuple[StoredRecord, float]] = []
    for file in files.walk():
        if file.key is None:
            register_root(catalog, file.path, file.root)
            continue
        with suppress(OSError, Damaged), open_file(file.path) as (fd, size):
            stored = describe(fd, size, file.root, file.key, file.kind, files.unopened)
            found.append((stored, os.fstat(fd).st_mtime))
    with catalog.transaction():
        catalog.records.adopt(found)
        catalog.finish()


def register_root(catalog: Catalog, path: Path, root: BlockHash) -> None:
    """Tell the catalog what a root was hashed from, as the file at ``path`` says; where that is lost, nobody knows."""
    try:
        content = json.loads(read_small(path))
        identity = {str(name): str(value) for name, value in content["identity"].items()}
        catalog.records.register_root(root, identity, str(content["namespace"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be read: %s", path, error)


def discard(catalog: Catalog, files: RecordFiles, key: BlockHash, path: Path, damage: str = "") -> None:
    """Take a lost record out of the catalog; with ``damage``, also move its file to the quarantine."""
    try:
        with catalog.transaction():
            if damage:
                files.set_aside(path, damage)
            if not os.path.lexists(path):
                catalog.records.mark_lost([key])
    except (StoreError, OSError) as error:
        log.warning("%s could not be set aside: %s", path, error)
