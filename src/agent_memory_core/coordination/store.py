"""Where sessions are kept: one SQLite file, in which a turn is there as a whole or not at all."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_memory_core import SessionNotFound, StoreError, StoreUnreadable
from agent_memory_core.coordination.books import Book, Draft, Mind
from agent_memory_core.coordination.plain import (
    event_data,
    event_of,
    mind_data,
    mind_of,
    spoken_data,
    spoken_of,
)
from agent_memory_core.coordination.spec import SessionSpec
from agent_memory_core.sqlite_file import open_shared

VERSION = 1
"""Of the tables."""

_TABLES = f"""
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY, namespace TEXT NOT NULL, created REAL NOT NULL,
    spec TEXT NOT NULL, minds TEXT NOT NULL, closed INTEGER NOT NULL DEFAULT 0, asking TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE entries (
    session_id TEXT NOT NULL REFERENCES sessions ON DELETE CASCADE,
    kind TEXT NOT NULL, number INTEGER NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (session_id, kind, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE minds (
    namespace TEXT NOT NULL, prefix TEXT NOT NULL, agent_id TEXT NOT NULL, mind TEXT NOT NULL, session_id TEXT NOT NULL,
    PRIMARY KEY (namespace, prefix, agent_id)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True, slots=True)
class Stored:
    """A session as it is kept."""

    session_id: str
    book: Book
    created: float
    """Seconds since the epoch."""
    closed: bool
    asking: Mapping[str, Any] | None
    """The open question, its choices and the votes that were entered for it."""


class Store:
    """The sessions of all namespaces; safe for threads. ``None`` keeps them in memory.

    Raises:
        StoreUnreadable: the file cannot be opened, or is of another version.
    """

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.RLock()
        try:
            self._db = _open(path)
        except (OSError, sqlite3.Error) as error:
            raise StoreUnreadable(f"{path} cannot be opened: {error}. Give another path.") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # Sessions

    def create(self, session_id: str, namespace: str, book: Book, draft: Draft) -> None:
        """Keep a new session, and that its permanent agents are in it."""
        spec, minds = book.spec, {name: mind_data(mind) for name, mind in book.minds.items()}
        with self.transaction() as db:
            row = (session_id, namespace, time.time(), spec.model_dump_json(), json.dumps(minds))
            db.execute(
                "INSERT INTO sessions (session_id, namespace, created, spec, minds) VALUES (?, ?, ?, ?, ?)",
                row,
            )
            for agent in spec.speakers:
                if agent.lifecycle == "permanent":
                    mind = json.dumps(minds[agent.agent_id])
                    of = (namespace, spec.persistent_cache_prefix, agent.agent_id, mind, session_id)
                    db.execute("INSERT OR REPLACE INTO minds VALUES (?, ?, ?, ?, ?)", of)
            self._add(db, session_id, draft, ())

    def load(self, session_id: str, namespace: str) -> Stored:
        """A session with all that happened in it.

        Raises:
            SessionNotFound: there is none of that id.
        """
        with self.transaction() as db:
            row = db.execute(
                "SELECT spec, minds, created, closed, asking FROM sessions WHERE session_id = ? AND namespace = ?",
                (session_id, namespace),
            ).fetchone()
            if row is None:
                raise SessionNotFound(f"there is no session {session_id!r} in namespace {namespace!r}.")
            events = tuple(map(event_of, self._entries(session_id, "event")))
            spoken = tuple(map(spoken_of, self._entries(session_id, "spoken")))
        minds = {name: mind_of(mind) for name, mind in json.loads(row[1]).items()}
        book = Book(SessionSpec.of(json.loads(row[0])), minds, events, spoken)
        return Stored(session_id, book, row[2], bool(row[3]), json.loads(row[4]) if row[4] else None)

    def ids(self, namespace: str) -> list[str]:
        """The ids of the sessions of a namespace, oldest first."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT session_id FROM sessions WHERE namespace = ? ORDER BY created, rowid", (namespace,)
            )
            return [row[0] for row in rows]

    def append(self, session_id: str, draft: Draft, stats: Sequence[Mapping[str, Any]] = ()) -> None:
        """Keep what happened, all or nothing.

        Raises:
            SessionNotFound: the session was deleted meanwhile.
        """
        with self.transaction() as db:
            self._add(db, session_id, draft, stats)

    def note(self, session_id: str, kind: str, bodies: Sequence[Mapping[str, Any]]) -> None:
        """Keep entries of another kind than events and turns."""
        with self.transaction() as db:
            self._insert(db, session_id, kind, self._count(db, session_id, kind), bodies)

    def notes(self, session_id: str, kind: str) -> list[dict[str, Any]]:
        """The entries of a kind, oldest first."""
        with self.transaction():
            return self._entries(session_id, kind)

    def close_session(self, session_id: str) -> None:
        """Note that nothing more happens in a session."""
        with self.transaction() as db:
            db.execute("UPDATE sessions SET closed = 1, asking = '' WHERE session_id = ?", (session_id,))

    def ask(self, session_id: str, asking: Mapping[str, Any] | None) -> None:
        """Keep the open question of a session, or that there is none."""
        text = json.dumps(asking) if asking is not None else ""
        with self.transaction() as db:
            db.execute("UPDATE sessions SET asking = ? WHERE session_id = ?", (text, session_id))

    def delete(self, session_id: str) -> None:
        """Delete a session. What its permanent agents remember has to be kept before."""
        with self.transaction() as db:
            db.execute("DELETE FROM sessions WHERE session_id = ?", (session_id,))

    # Permanent agents

    def mind(self, namespace: str, prefix: str, agent_id: str) -> tuple[Mind, str] | None:
        """What a permanent agent brought into its last session, and which that is; empty where it is deleted."""
        with self.transaction() as db:
            row = db.execute(
                "SELECT mind, session_id FROM minds WHERE namespace = ? AND prefix = ? AND agent_id = ?",
                (namespace, prefix, agent_id),
            ).fetchone()
        return (mind_of(json.loads(row[0])), row[1]) if row is not None else None

    def keep_minds(self, session_id: str, minds: Mapping[str, Mind]) -> None:
        """Keep what agents remember of a session that is going to be deleted."""
        with self.transaction() as db:
            for agent_id, mind in minds.items():
                values = (json.dumps(mind_data(mind)), agent_id, session_id)
                db.execute(
                    "UPDATE minds SET mind = ?, session_id = '' WHERE agent_id = ? AND session_id = ?", values
                )

    def in_sessions(self, namespace: str, prefix: str) -> set[str]:
        """The last sessions of the permanent agents of a prefix, where they are not deleted."""
        with self.transaction() as db:
            rows = db.execute(
                "SELECT session_id FROM minds WHERE namespace = ? AND prefix = ?", (namespace, prefix)
            )
            return {row[0] for row in rows} - {""}

    def forget_minds(self, namespace: str, prefix: str) -> list[str]:
        """Forget the permanent agents of a prefix; return their ids."""
        with self.transaction() as db:
            rows = db.execute(
                "DELETE FROM minds WHERE namespace = ? AND prefix = ? RETURNING agent_id", (namespace, prefix)
            )
            return [row[0] for row in rows.fetchall()]

    # Rows

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Keep other threads and processes out; of what is written meanwhile, all or nothing stays.

        Inside another transaction of the same thread it is a part of that one.
        """
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise StoreError(f"the sessions cannot be read or written: {error}.") from error
            finally:
                with suppress(sqlite3.Error):
                    self._db.rollback()

    def _add(
        self, db: sqlite3.Connection, session_id: str, draft: Draft, stats: Sequence[Mapping[str, Any]]
    ) -> None:
        known = len(draft.book.events), len(draft.book.spoken)
        events, spoken = map(event_data, draft.events), map(spoken_data, draft.spoken)
        self._insert(db, session_id, "event", known[0], list(events))
        self._insert(db, session_id, "spoken", known[1], list(spoken))
        self._insert(db, session_id, "stats", self._count(db, session_id, "stats"), stats)

    def _insert(
        self,
        db: sqlite3.Connection,
        session_id: str,
        kind: str,
        start: int,
        bodies: Sequence[Mapping[str, Any]],
    ) -> None:
        if not db.execute("SELECT 1 FROM sessions WHERE session_id = ?", (session_id,)).fetchone():
            raise SessionNotFound(f"the session {session_id!r} was deleted.")
        rows = [(session_id, kind, start + n, json.dumps(body)) for n, body in enumerate(bodies)]
        db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?)", rows)

    def _count(self, db: sqlite3.Connection, session_id: str, kind: str) -> int:
        query = "SELECT count(*) FROM entries WHERE session_id = ? AND kind = ?"
        return int(db.execute(query, (session_id, kind)).fetchone()[0])

    def _entries(self, session_id: str, kind: str) -> list[dict[str, Any]]:
        query = "SELECT body FROM entries WHERE session_id = ? AND kind = ? ORDER BY number"
        return [json.loads(row[0]) for row in self._db.execute(query, (session_id, kind))]


def _open(path: Path | None) -> sqlite3.Connection:
    db = open_shared(path)
    try:
        # Another process may be making the tables, too.
        db.execute("BEGIN IMMEDIATE")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            for statement in _TABLES.split(";\n"):
                db.execute(statement)
        db.execute("COMMIT")
        if version not in (0, VERSION):
            raise StoreUnreadable(
                f"{path} is of version {version}, and this program knows {VERSION}: use a newer one."
            )
    except BaseException:
        with closing(db):
            raise
    return db
