"""The database below the catalog: its tables, the triggers that count for it, and who may use it when.

Threads share one `Database` and never a connection; processes share the file. A transaction holds the write lock
of the store against all of them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sqlite3
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agent_memory_core.config import Durability
from agent_memory_core.errors import StoreError, StoreFull, StoreUnreadable
from agent_memory_core.storage.folder import require_version

log = logging.getLogger("agent_memory")

_BUSY_SECONDS = 10.0
_LIFE = uuid.uuid4().hex[:12]
# A damaged database can make SQLite say things that are no text.
_FAULTS = (sqlite3.Error, UnicodeDecodeError)
# What may keep a sound database from being opened.
_PASSING = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_FULL),
}

_SCHEMA = """
CREATE TABLE roots (root BLOB PRIMARY KEY, namespace TEXT NOT NULL, model TEXT NOT NULL, identity TEXT NOT NULL);
CREATE TABLE sessions (
  id INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, session_id TEXT NOT NULL, root BLOB NOT NULL,
  pinned INTEGER NOT NULL, is_thread INTEGER NOT NULL, created REAL NOT NULL, last_use REAL NOT NULL,
  UNIQUE (namespace, session_id, root));
CREATE TABLE branches (
  branch_id INTEGER PRIMARY KEY AUTOINCREMENT, session INTEGER NOT NULL,
  generation INTEGER NOT NULL, head BLOB NOT NULL, tail BLOB, tokens INTEGER NOT NULL,
  prompt_tokens INTEGER NOT NULL, lane TEXT NOT NULL, created REAL NOT NULL, last_use REAL NOT NULL);
CREATE INDEX branches_session ON branches (session);
CREATE INDEX branches_head ON branches (head);
CREATE INDEX branches_tail ON branches (tail);
CREATE INDEX branches_age ON branches (last_use);
CREATE TABLE dependencies (branch INTEGER NOT NULL, key BLOB NOT NULL, PRIMARY KEY (branch, key)) WITHOUT ROWID;
CREATE INDEX dependencies_key ON dependencies (key);
CREATE TABLE blocks (
  id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, parent BLOB NOT NULL, root BLOB NOT NULL,
  tokens BLOB NOT NULL, ntok INTEGER NOT NULL, kind TEXT NOT NULL, nbytes INTEGER NOT NULL,
  checksum TEXT NOT NULL, stored INTEGER NOT NULL, refs INTEGER NOT NULL, owner INTEGER NOT NULL,
  last_use REAL NOT NULL);
CREATE INDEX blocks_parent ON blocks (parent);
CREATE INDEX blocks_owner ON blocks (owner);
CREATE INDEX blocks_free ON blocks (last_use) WHERE refs = 0;
CREATE INDEX blocks_wordless ON blocks (root) WHERE tokens = x'' AND ntok > 0;
CREATE TABLE verdicts (subject TEXT PRIMARY KEY, verdict TEXT NOT NULL, made REAL NOT NULL);
CREATE TABLE totals (files INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0);
CREATE TABLE reservations (id INTEGER PRIMARY KEY AUTOINCREMENT, process TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE holds (reservation INTEGER NOT NULL, key BLOB NOT NULL);
CREATE INDEX holds_reservation ON holds (reservation);
CREATE INDEX holds_key ON holds (key);

CREATE TRIGGER block_added AFTER INSERT ON blocks BEGIN
  UPDATE totals SET files = files + NEW.stored, bytes = bytes + NEW.nbytes;
  UPDATE blocks SET refs = refs + 1 WHERE key = NEW.parent;
  UPDATE blocks SET refs = (SELECT count(*) FROM blocks WHERE parent = NEW.key)
    + (SELECT count(*) FROM branches WHERE head = NEW.key) + (SELECT count(*) FROM branches WHERE tail = NEW.key)
    + (SELECT count(*) FROM holds WHERE key = NEW.key) + (SELECT count(*) FROM dependencies WHERE key = NEW.key)
    WHERE id = NEW.id;
END;
CREATE TRIGGER block_changed AFTER UPDATE OF stored, nbytes ON blocks BEGIN
  UPDATE totals SET files = files + NEW.stored - OLD.stored, bytes = bytes + NEW.nbytes - OLD.nbytes;
END;
CREATE TRIGGER block_removed AFTER DELETE ON blocks BEGIN
  UPDATE totals SET files = files - OLD.stored, bytes = bytes - OLD.nbytes;
  UPDATE blocks SET refs = refs - 1 WHERE key = OLD.parent;
END;
CREATE TRIGGER hold_added AFTER INSERT ON holds BEGIN
  UPDATE blocks SET refs = refs + 1 WHERE key = NEW.key;
END;
CREATE TRIGGER hold_removed AFTER DELETE ON holds BEGIN
  UPDATE blocks SET refs = refs - 1 WHERE key = OLD.key;
END;
CREATE TRIGGER dependency_added AFTER INSERT ON dependencies BEGIN
  UPDATE blocks SET refs = refs + 1 WHERE key = NEW.key;
END;
CREATE TRIGGER dependency_removed AFTER DELETE ON dependencies BEGIN
  UPDATE blocks SET refs = refs - 1 WHERE key = OLD.key;
END;
CREATE TRIGGER branch_added AFTER INSERT ON branches BEGIN
  UPDATE blocks SET refs = refs + 1 WHERE key = NEW.head;
  UPDATE blocks SET refs = refs + 1 WHERE key = NEW.tail;
END;
CREATE TRIGGER branch_moved AFTER UPDATE OF head, tail ON branches BEGIN
  UPDATE blocks SET refs = refs - 1 WHERE key = OLD.head;
  UPDATE blocks SET refs = refs - 1 WHERE key = OLD.tail;
  UPDATE blocks SET refs = refs + 1 WHERE key = NEW.head;
  UPDATE blocks SET refs = refs + 1 WHERE key = NEW.tail;
END;
CREATE TRIGGER branch_removed AFTER DELETE ON branches BEGIN
  UPDATE blocks SET refs = refs - 1 WHERE key = OLD.head;
  UPDATE blocks SET refs = refs - 1 WHERE key = OLD.tail;
  DELETE FROM dependencies WHERE branch = OLD.branch_id;
END;
"""


class CatalogDamaged(StoreError):
    """The database file is not one, or its pages contradict each other."""


def process_name() -> str:
    """This process: its id, and what tells it from an earlier one that had the same id."""
    return f"{os.getpid()}.{_LIFE}"


def is_alive(process: str) -> bool:
    """Whether the process of that name runs on this machine, as far as can be told."""
    pid = process.partition(".")[0]
    if pid == str(os.getpid()):
        return process == process_name()
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


class Database:
    """The file, open. ``created`` says that the tables were made by this opening.

    Reads that fail (a locked or damaged database) answer that nothing is known, and are counted in
    `failed_reads`; writes raise StoreError.

    Raises:
        CatalogDamaged: the file is not a sound database.
        StoreUnreadable: it cannot be opened, or was written by a newer version.
    """

    def __init__(self, path: Path, durability: Durability = "process") -> None:
        self._path = path
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self._idle: deque[sqlite3.Connection] = deque()
        weakref.finalize(self, _close_all, self._idle)
        _databases.add(self)
        self._local = threading.local()
        self._closed = False
        self.failed_reads = 0
        try:
            self.created = self._prepare()
        except (*_FAULTS, OSError) as error:
            self.close()
            if _is_damage(error):
                raise CatalogDamaged(f"{path} is damaged: {error}.") from error
            raise StoreUnreadable(f"{path} cannot be opened: {error}. Set another cache_dir.") from error
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> bool:
        if self._path.is_dir():
            raise CatalogDamaged(f"{self._path} is a folder.")
        # Never opened where it exists: closing it would undo the locks of other connections of this process.
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with self._connection() as db:
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise CatalogDamaged(f"{self._path} is damaged.")
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise StoreUnreadable(
                    f"{self._path} cannot have a log here. Set a cache_dir on a local disk."
                )
            version: int = db.execute("PRAGMA user_version").fetchone()[0]
            if version:
                require_version(self._path, version)
            elif not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            # A database of something else fails here.
            tables = "roots, sessions, branches, dependencies, blocks, totals, reservations, holds, verdicts"
            db.execute(f"SELECT 1 FROM {tables} LIMIT 0")
            return version == 0

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreError(f"the store at {self._path.parent} is closed.")
        db = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute(f"PRAGMA synchronous = {self._synchronous}")
        # What was forgotten must not be left in free pages.
        db.execute("PRAGMA secure_delete = ON")
        db.execute(f"PRAGMA fullfsync = {int(self._synchronous == 'FULL')}")
        return db

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for this thread alone; inside another use by the same thread, that one."""
        current: sqlite3.Connection | None = getattr(self._local, "db", None)
        if current is not None:
            yield current
            return
        try:
            db = self._idle.pop()
        except IndexError:
            db = self._connect()
        self._local.db = db
        try:
            yield db
        finally:
            self._local.db = None
            self._idle.append(db)
            if self._closed:
                self.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock of the store, against all processes; of what is written inside, all or nothing stays.

        Inside another transaction of the same thread it is part of that one.

        Raises:
            StoreError: the database cannot be written, or stayed locked for ten seconds.
        """
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

    def read(self, sql: str, values: Sequence[Any] = (), *, strict: bool = False) -> list[Any]:
        """All rows of a query. One that fails has none, unless it is ``strict`` or part of a transaction."""
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

    def close(self) -> None:
        """Close every connection. Reads and writes afterwards raise StoreError."""
        self._closed = True
        _close_all(self._idle)


_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _abandon_all() -> None:
    """In a forked child: leave every connection of the parent alone.

    SQLite forbids a child to use a connection that was opened before the fork, and even to close it. So each is kept
    for ever: a reference that nobody gives back also keeps the interpreter's end from closing it.
    """
    for database in list(_databases):
        database._closed = True
        while database._idle:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(database._idle.pop()))


os.register_at_fork(after_in_child=_abandon_all)


def _close_all(idle: deque[sqlite3.Connection]) -> None:
    while idle:
        idle.pop().close()


def _is_damage(error: Exception) -> bool:
    if isinstance(error, OSError):
        return False
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in _PASSING
