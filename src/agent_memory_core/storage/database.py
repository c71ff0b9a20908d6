"""The database below the catalog: opening it, and who may read and write it when. Its tables are in ``schema.sql``.

Threads share one `Database` but never a connection; processes share the file. A transaction holds the write lock of
the store against all of them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sqlite3
import stat
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agent_memory_core.config import Durability
from agent_memory_core.errors import StoreError, StoreFull, StoreUnreadable
from agent_memory_core.sqlite_file import write_ahead
from agent_memory_core.storage.folder import FORMAT, require_version
from agent_memory_core.storage.layout import SCHEMA, is_ours, layout, renew, wanted_layout

log = logging.getLogger("agent_memory")

_BUSY_SECONDS = 10.0
_OLDEST_SQLITE = (3, 37)
_PAGE = 4096
_MIN_LOG = 16 * _PAGE

MAX_LOG = 1024 * _PAGE
"""Bytes beyond which the log of the database is written back to it; a long transaction may exceed them."""
# A damaged database can make SQLite return an error message that is not valid text.
_FAULTS = (sqlite3.Error, UnicodeDecodeError)
# Errors that can keep a sound database from being opened.
_PASSING = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_FULL),
}


class CatalogDamaged(StoreError):
    """The file is not a database, or not one of ours, or its pages contradict each other."""


class Database:
    """The database file, open.

    A read that fails (the database is locked or damaged) returns no rows and is counted in ``failed_reads``; a write
    that fails raises StoreError.

    Args:
        path: the file.
        durability: see `EngineConfig`.
        log_bytes: where its log is written back, within bounds; see `MAX_LOG`.
        read_only: whether nothing may be written; every transaction raises StoreError then.

    Raises:
        CatalogDamaged: the file is not a sound database of ours.
        StoreUnreadable: it cannot be opened, or is of another version.
    """

    created: bool
    """whether its tables are new: it is empty until `finish` is called"""
    failed_reads: int
    """how many reads have failed"""

    def __init__(
        self,
        path: Path,
        durability: Durability = "process",
        log_bytes: int = MAX_LOG,
        read_only: bool = False,
    ) -> None:
        self._path = path
        self.read_only = read_only
        self._mode = "ro" if read_only else "rw"
        self._log_bytes = min(MAX_LOG, max(_MIN_LOG, log_bytes))
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self._spare: deque[sqlite3.Connection] = deque()
        weakref.finalize(self, _close_all, self._spare)
        _databases.add(self)
        self._local = threading.local()
        self._closed = False
        self._opened = 0
        self._file: tuple[int, int] | None = None
        self.failed_reads = 0
        try:
            self.reopen()
        except BaseException:
            self.close()
            raise

    def reopen(self) -> None:
        """Open the file that lies there now, whatever was there before. It can be tried again if that fails.

        Raises:
            CatalogDamaged, StoreUnreadable: as the constructor does.
        """
        if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
            raise StoreUnreadable(
                f"this Python has SQLite {sqlite3.sqlite_version}, and a store needs 3.37 or newer: use another "
                f"Python, or cache_dir=None to keep nothing."
            )
        self._opened += 1
        # A new file may get the number of the old one, as soon as nobody has the old one open.
        self._file = None
        _close_all(self._spare)
        path = self._path
        try:
            self.created = self._look() if self.read_only else self._prepare()
            self._file = self._file_there()
        except (*_FAULTS, OSError) as error:
            if _is_damage(error):
                raise CatalogDamaged(f"{path} is damaged: {error}.") from error
            raise StoreUnreadable(f"{path} cannot be opened: {error}. Set another cache_dir.") from error

    def is_in_place(self) -> bool:
        """Whether the file that is open is still the one that lies there."""
        return self._file is not None and self._file == self._file_there()

    def _file_there(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _prepare(self) -> bool:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(self._path).st_mode):
                raise CatalogDamaged(f"{self._path} is not a file.")
        # Never opened where it exists: closing it would undo the locks of other connections of this process.
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with self._connection() as db:
            if not write_ahead(db, _BUSY_SECONDS):
                raise StoreUnreadable(
                    f"{self._path} cannot have a log here. Set a cache_dir on a local disk."
                )
            is_new = self._lay_out(db)
            # After that: where only the types of the columns are wrong, this would call sound rows damaged.
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise CatalogDamaged(f"{self._path} is damaged.")
            return is_new

    def _look(self) -> bool:
        """Look at a database that cannot be written; without its log where SQLite cannot open that."""
        for self._mode in ("ro", "ro&immutable=1"):
            with suppress(sqlite3.OperationalError), self._connection() as db:
                if layout(db) != wanted_layout() or db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                    raise StoreUnreadable(
                        f"{self._path} is damaged and cannot be mended, because it is read-only: set another cache_dir."
                    )
                return False
        raise StoreUnreadable(f"{self._path} cannot be read: set another cache_dir, or None to keep nothing.")

    def _lay_out(self, db: sqlite3.Connection) -> bool:
        """Make the tables what they should be; return whether they are new."""
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        if version:
            require_version(self._path, version)
        found = layout(db)
        if not found:
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        elif found != wanted_layout():
            if not version or not is_ours(found):
                raise CatalogDamaged(f"{self._path} has not the tables of a catalog.")
            log.warning(
                "%s is brought to version %d: its rows are copied into new tables", self._path, FORMAT
            )
            renew(db, FORMAT)
        return version == 0

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreError(f"the store at {self._path.parent} is closed.")
        address = f"{self._path.absolute().as_uri()}?mode={self._mode}"
        db = sqlite3.connect(
            address, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            db.execute(f"PRAGMA synchronous = {self._synchronous}")
            db.execute(f"PRAGMA wal_autocheckpoint = {self._log_bytes // _PAGE}")
            db.execute(f"PRAGMA journal_size_limit = {self._log_bytes}")
            # SQL that stands in the file itself is not believed.
            db.execute("PRAGMA trusted_schema = OFF")
            # What was forgotten must not stay in free pages.
            db.execute("PRAGMA secure_delete = ON")
            db.execute(f"PRAGMA fullfsync = {int(self._synchronous == 'FULL')}")
            # On macOS an fsync does not order what the drive writes, so a power cut could tear a checkpoint and with
            # it the catalog. This costs two full syncs a checkpoint there, that is per 1,000 pages, and nothing here.
            db.execute("PRAGMA checkpoint_fullfsync = 1")
        except BaseException:
            db.close()
            raise
        return db

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for this thread alone. Where the thread is using one already, it is the same one."""
        current: sqlite3.Connection | None = getattr(self._local, "db", None)
        if current is not None:
            yield current
            return
        try:
            db = self._spare.pop()
        except IndexError:
            db = self._connect()
        self._local.db, opened = db, self._opened
        try:
            yield db
        finally:
            self._local.db = None
            if opened == self._opened:
                self._spare.append(db)
            else:
                db.close()
            if self._closed:
                self.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock of the store against all processes. Of what is written meanwhile, all or nothing stays.

        Inside another transaction of the same thread it is a part of that one.

        Raises:
            StoreError: the database cannot be written, or stayed locked for ten seconds.
        """
        if self.read_only:
            raise StoreError(
                f"{self._path.parent} is read-only: what is there is used, and nothing is saved."
            )
        try:
            with self._connection() as db:
                if db.in_transaction:
                    yield db
                    return
                try:
                    db.execute("BEGIN IMMEDIATE")
                    yield db
                    db.execute("COMMIT")
                finally:
                    db.rollback()
        except _FAULTS as error:
            full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
            raise (StoreFull if full else StoreError)(f"{self._path} cannot be written: {error}.") from error

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """See the database as it is at one moment, whatever others write meanwhile.

        Raises:
            StoreError: the database cannot be read.
        """
        try:
            with self._connection() as db:
                try:
                    db.execute("BEGIN")
                    yield db
                finally:
                    db.rollback()
        except _FAULTS as error:
            raise StoreError(f"{self._path} cannot be read: {error}.") from error

    def read(self, sql: str, values: Sequence[Any] = (), *, strict: bool = False) -> list[Any]:
        """All rows of a query. One that fails returns none, but raises if it is ``strict`` or part of a transaction."""
        try:
            with self._connection() as db:
                return db.execute(sql, values).fetchall()
        except _FAULTS as error:
            if getattr(self._local, "db", None) is not None:
                raise
            if strict:
                raise StoreError(f"{self._path} cannot be read: {error}.") from error
            self.failed_reads += 1
            log.warning("the catalog could not be read: %s", error)
            return []

    def finish(self) -> None:
        """Note that a new database has all that was to be put into it. Until then every opening finds it new."""
        with self.transaction() as db:
            db.execute(f"PRAGMA user_version = {FORMAT}")

    def faults(self) -> list[str]:
        """What SQLite finds wrong with the whole file, one phrase each; it reads all of it."""
        found = [str(row[0]) for row in self.read("PRAGMA integrity_check(10)", strict=True)]
        return [] if found == ["ok"] else found

    def mend(self) -> None:
        """Make the indexes anew from the rows.

        Raises:
            StoreError: the database cannot be written.
        """
        with self.transaction() as db:
            db.execute("REINDEX")

    def scrub(self) -> None:
        """Empty the database's log, where what was deleted can still be read."""
        self.read("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close every connection. Reads and writes afterwards raise StoreError."""
        self._closed = True
        _close_all(self._spare)


_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _abandon_all() -> None:
    """In a forked child: leave every connection of the parent alone.

    SQLite forbids a child to use a connection that was opened before the fork, and even to close it. So each is kept
    for ever: a reference that nobody gives back also keeps the interpreter's end from closing it.
    """
    for database in list(_databases):
        database._closed = True
        while database._spare:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(database._spare.pop()))


os.register_at_fork(after_in_child=_abandon_all)


def _close_all(connections: deque[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()


def _is_damage(error: Exception) -> bool:
    if isinstance(error, OSError):
        return False
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in _PASSING
