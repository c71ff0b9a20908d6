"""What clients leave with the server between two requests: conversations that a later request goes on with by an id.

SQLite in the file ``server.db`` of the cache directory, mode 0600, sealed as the store is; without a cache directory
in memory. Keys and values are not here: a conversation's session has them, and where they are gone they are computed
again from what was said.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from agent_memory_core import InvalidSetting, Locked, StoreError
from agent_memory_core.server.host import Host
from agent_memory_core.sqlite_file import open_shared

T = TypeVar("T")
log = logging.getLogger("agent_memory.server")

FILE = "server.db"
_VERSION = 1
_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation as one request left it."""

    id: str
    """Of the answer, or of the conversation."""
    session_id: str
    """Whose memory holds what the model has read of it."""
    history: list[dict[str, Any]] = field(repr=False)
    """All that was said, as its dialect writes it, the answer included."""
    answer: dict[str, Any] = field(default_factory=dict, repr=False)
    """The object that the client got."""
    held: dict[str, Any] = field(default_factory=dict, repr=False)
    """Fields of the request that a later one does not repeat."""
    prompt: dict[str, Any] = field(default_factory=dict, repr=False)
    """The outline of the prompt, by which a later one is compared with it."""
    asked: int = 0
    """How many entries of the history were there before the answer."""


class Records:
    """The records of a server. One thread of its own reads and writes them, in the order of the calls.

    Args:
        host: whose cache directory and ciphers are used.
        days: how long a record is kept.

    Raises:
        InvalidSetting: the file cannot be used.
    """

    def __init__(self, host: Host, days: float) -> None:
        self._host, self._seconds = host, days * _DAY
        folder = host.memory.config.cache_dir
        self._path = None if folder is None else folder / FILE
        self._thread = ThreadPoolExecutor(1, "server-records")
        try:
            self._db = _opened(self._path)
        except (sqlite3.Error, OSError) as error:
            raise InvalidSetting(
                f"{self._path} cannot be used: {error}. Delete it, or choose another cache_dir."
            ) from error

    def close(self) -> None:
        """Write what is queued, and close the file."""
        self._thread.submit(self._db.close)
        self._thread.shutdown()

    async def get(self, namespace: str, record_id: str) -> Record | None:
        """A record; None if there is none, or what sealed it is gone."""
        return await self._call(lambda: self._get(namespace, record_id))

    async def delete(self, namespace: str, record_id: str) -> bool:
        """Delete a record, and say whether there was one."""
        return await self._call(lambda: self._delete("namespace = ? AND id = ?", namespace, record_id) > 0)

    async def forget(self, namespace: str, session_id: str | None = None) -> int:
        """Delete all records of a namespace, or of one session in it, and return how many there were."""
        if session_id is None:
            return await self._call(lambda: self._delete("namespace = ?", namespace))
        where = "namespace = ? AND session = ?"
        return await self._call(lambda: self._delete(where, namespace, session_id))

    def put(self, namespace: str, record: Record) -> None:
        """Keep a record, in place of one with its id. Later calls find it; an error is only logged."""
        self._thread.submit(self._put, namespace, record)

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise StoreError(
                f"{self._path} cannot be used: {error}. Look at the room on its disk."
            ) from error

    # On the thread ------------------------------------------------------------------------------------------

    def _get(self, namespace: str, record_id: str) -> Record | None:
        query = "SELECT said FROM records WHERE namespace = ? AND id = ?"
        row = self._db.execute(query, (namespace, record_id)).fetchone()
        if row is None:
            return None
        with suppress(Locked):
            text = self._host.memory.cipher(namespace).open_text(f"record {record_id}", row[0])
            return Record(**json.loads(text))
        return None

    def _put(self, namespace: str, record: Record) -> None:
        try:
            cipher = self._host.memory.cipher(namespace)
            sealed = cipher.seal_text(f"record {record.id}", json.dumps(asdict(record)))
            self._delete("created < ?", time.time() - self._seconds)
            self._db.execute(
                "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)",
                (namespace, record.id, record.session_id, time.time(), sealed),
            )
        except (sqlite3.Error, StoreError) as error:
            log.error("%s could not be kept: %s", record.id, error)

    def _delete(self, where: str, *values: object) -> int:
        return self._db.execute(f"DELETE FROM records WHERE {where}", values).rowcount


def _opened(path: Path | None) -> sqlite3.Connection:
    db = open_shared(path)
    try:
        _prepare(db)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection) -> None:
    # Another server may be making the tables, too.
    db.execute("BEGIN IMMEDIATE")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        for statement in resources.files(__package__).joinpath("records.sql").read_text().split(";\n"):
            db.execute(statement)
    db.execute("COMMIT")
    if version not in (0, _VERSION):
        raise sqlite3.DatabaseError(f"it has version {version}, and this release reads {_VERSION}")
