"""The book of agents: who they are and what was said, in SQLite, apart from keys and values.

The file ``agents.db`` lies in the cache directory, mode 0600. The history here is the truth: from it a prompt is made,
and whatever of that prompt is stored is not computed again. Several processes may share the file: rows are only ever
added at the end, within one transaction.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from agent_memory_core import Cipher, Locked, Message, StoreError, StoreFull, ToolCall
from agent_memory_core.agents.errors import AgentExists
from agent_memory_core.sqlite_file import open_shared

FILE = "agents.db"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """An agent as the book has it. Times are in seconds since the epoch."""

    agent_id: str
    agent_type: str
    system_prompt: str = field(repr=False)
    model: str
    template: str | None = None
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    created: float = field(default_factory=time.time)
    last_access: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class LocalAgent:
    """An agent as the book has it, with what the object store has of that."""

    record: AgentRecord
    messages: tuple[Message, ...] = field(repr=False)
    sent: int
    """How many of the messages are in the object store; below 0 before any is, and after they were cleared."""
    clearings: int
    """How often its history was cleared."""
    copy: str
    """The name of this copy of the agent."""
    given: int
    """How many messages this copy has given to the object store in all, as far as is known here."""

    @property
    def is_new(self) -> bool:
        """Whether nothing of it was ever there."""
        return self.sent < 0 and not self.clearings

    @property
    def unsent(self) -> tuple[Message, ...]:
        """The messages that are only here, as far as is known here."""
        return self.messages[max(0, self.sent) :]


class AgentBook:
    """The agents of one namespace. Any thread may use it.

    Args:
        folder: where the file lies; None keeps everything in memory.
        namespace: whose agents.
        cipher: seals what was said, as the store is sealed.

    Raises:
        StoreError: the file cannot be opened, or is no book of this version.
    """

    def __init__(self, folder: Path | None, namespace: str, cipher: Cipher) -> None:
        self._namespace = namespace
        self._cipher = cipher
        self._lock = threading.Lock()
        self._path = None if folder is None else folder / FILE
        with self._as_store_error():
            self._db = self._open()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # -- agents -------------------------------------------------------------------------------------------

    def get(self, agent_id: str) -> AgentRecord | None:
        """An agent, or None if there is none; so too where it was sealed with a key that is gone."""
        with self._reading() as db:
            return self._get(db, agent_id)

    def all(self) -> list[tuple[AgentRecord, int]]:
        """All agents, the one used last first, each with its number of messages."""
        count = "(SELECT count(*) FROM messages WHERE agent = agents.id)"
        with self._reading() as db:
            rows = db.execute(
                f"{_AGENTS.replace('FROM', f', {count} FROM')} ORDER BY last_access DESC, agent_id",
                (self._namespace,),
            ).fetchall()
        found = [(self._record(row[:-1]), row[-1]) for row in rows]
        return [(record, messages) for record, messages in found if record is not None]

    def add(self, record: AgentRecord, messages: Sequence[Message] = ()) -> None:
        """Write a new agent down, with what was said so far.

        Raises:
            AgentExists: the id is taken.
            StoreError: it cannot be written.
        """
        with self._writing() as db:
            # Within the transaction: another process may be making one of that id.
            if self._get(db, record.agent_id) is not None:
                raise AgentExists(
                    f"agent {record.agent_id!r} exists already: choose another id, or delete it."
                )
            self._insert(db, record)
            self._append(db, record.agent_id, messages)

    def copy(self, agent_id: str, new_id: str) -> None:
        """Write a new agent down that is as another one.

        Raises:
            AgentExists: the new id is taken.
            StoreError: it cannot be written.
        """
        record = self.get(agent_id)
        assert record is not None, "only an agent that exists is copied"
        self.add(replace(record, agent_id=new_id, created=time.time()), self.messages(agent_id))

    def delete(self, agent_id: str, *, mark: bool = False) -> bool:
        """Delete an agent and all that was said; say whether there was one.

        Args:
            agent_id: the agent.
            mark: whether the object store is to be told.
        """
        with self._writing() as db:
            if mark:
                known = self._get(db, agent_id)
                # Not before it was made, by whatever clock that was.
                when = max(time.time(), known.created if known is not None else 0.0)
                values = (self._namespace, agent_id, when)
                db.execute("INSERT OR REPLACE INTO deleted VALUES (?, ?, ?)", values)
            return self._delete(db, agent_id)

    # -- what was said ------------------------------------------------------------------------------------

    def messages(self, agent_id: str) -> list[Message]:
        """What was said, oldest first, the system prompt not included."""
        with self._reading() as db:
            return self._messages(db, agent_id)

    def append(self, agent_id: str, messages: Sequence[Message], model: str) -> None:
        """Add what was said in one turn; all of it or nothing. Nothing happens if the agent is gone.

        Raises:
            StoreError: it cannot be written.
        """
        with self._writing() as db:
            self._append(db, agent_id, messages)
            db.execute(
                "UPDATE agents SET last_access = ?, model = ? WHERE namespace = ? AND agent_id = ?",
                (time.time(), model, self._namespace, agent_id),
            )

    def clear(self, agent_id: str) -> None:
        """Delete what was said; the agent stays."""
        with self._writing() as db:
            cleared = db.execute(f"DELETE FROM messages WHERE agent IN ({_ID})", (self._namespace, agent_id))
            # What was not uploaded counts as given: it may be there all the same, and must not pass for later words.
            db.execute(
                "UPDATE carried SET sent = -1, clearings = clearings + 1, given = given + ? - max(0, sent) "
                f"WHERE agent IN ({_ID})",
                (cleared.rowcount, self._namespace, agent_id),
            )

    # -- what the object store has ------------------------------------------------------------------------

    def local(self, agent_id: str) -> tuple[LocalAgent | None, float]:
        """An agent with what is known of the object store, and when it was deleted here, if nobody was told; else 0."""
        with self._writing() as db:
            sql = "SELECT at FROM deleted WHERE namespace = ? AND agent_id = ?"
            row = db.execute(sql, (self._namespace, agent_id)).fetchone()
            return self._local(db, agent_id), row[0] if row else 0.0

    def settle(self, agent_id: str, was: LocalAgent | None, now: LocalAgent | None) -> bool:
        """Take over what the object store has, unless the agent has changed here since ``was``; say whether so.

        Args:
            agent_id: the agent.
            was: what `local` said.
            now: what it is to be; None deletes it.
        """
        with self._writing() as db:
            if self._local(db, agent_id) != was:
                return False
            db.execute(
                "DELETE FROM deleted WHERE namespace = ? AND agent_id = ?", (self._namespace, agent_id)
            )
            if now is None:
                self._delete(db, agent_id)
                return True
            if was is None or (was.record, was.messages) != (now.record, now.messages):
                self._insert(db, now.record)
                self._append(db, agent_id, now.messages)
            db.execute(
                f"INSERT OR REPLACE INTO carried SELECT id, ?, ?, ?, ? FROM ({_ID})",
                (now.sent, now.clearings, now.copy, now.given, self._namespace, agent_id),
            )
            return True

    def unsent(self) -> list[str]:
        """The agents of which the object store lacks something, as far as is known here."""
        sql = (
            "SELECT agent_id FROM agents LEFT JOIN carried ON agent = id WHERE namespace = ? AND "
            "(sent IS NULL OR sent < (SELECT count(*) FROM messages WHERE messages.agent = id)) "
            "UNION SELECT agent_id FROM deleted WHERE namespace = ?"
        )
        with self._reading() as db:
            return [agent_id for (agent_id,) in db.execute(sql, (self._namespace, self._namespace))]

    # -- the file -----------------------------------------------------------------------------------------

    def _get(self, db: sqlite3.Connection, agent_id: str) -> AgentRecord | None:
        row = db.execute(f"{_AGENTS} AND agent_id = ?", (self._namespace, agent_id)).fetchone()
        return None if row is None else self._record(row)

    def _messages(self, db: sqlite3.Connection, agent_id: str) -> list[Message]:
        rows = db.execute(
            "SELECT message FROM messages JOIN agents ON agents.id = agent "
            "WHERE namespace = ? AND agent_id = ? ORDER BY seq",
            (self._namespace, agent_id),
        ).fetchall()
        try:
            return [from_json(self._open_text(agent_id, text)) for (text,) in rows]
        except Locked:
            return []

    def _local(self, db: sqlite3.Connection, agent_id: str) -> LocalAgent | None:
        record = self._get(db, agent_id)
        if record is None:
            return None
        # Named before anything of it is given away.
        db.execute(
            f"INSERT OR IGNORE INTO carried SELECT id, -1, 0, ?, 0 FROM ({_ID})",
            (uuid.uuid4().hex, self._namespace, agent_id),
        )
        sql = f"SELECT sent, clearings, copy, given FROM carried WHERE agent IN ({_ID})"
        carried = db.execute(sql, (self._namespace, agent_id)).fetchone()
        return LocalAgent(record, tuple(self._messages(db, agent_id)), *carried)

    def _insert(self, db: sqlite3.Connection, record: AgentRecord) -> None:
        # There may be one that was sealed with a key that is gone.
        self._delete(db, record.agent_id)
        about = json.dumps({"system_prompt": record.system_prompt, "metadata": record.metadata})
        columns = (record.agent_type, record.template, record.model, record.created, record.last_access)
        db.execute(
            "INSERT INTO agents (namespace, agent_id, type, template, model, created, last_access, about) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (self._namespace, record.agent_id, *columns, self._seal(record.agent_id, about)),
        )

    def _append(self, db: sqlite3.Connection, agent_id: str, messages: Sequence[Message]) -> None:
        db.executemany(
            "INSERT INTO messages (agent, seq, role, message) "
            "SELECT id, (SELECT coalesce(max(seq) + 1, 0) FROM messages WHERE agent = id), ?, ? "
            "FROM agents WHERE namespace = ? AND agent_id = ?",
            [(m.role, self._seal(agent_id, to_json(m)), self._namespace, agent_id) for m in messages],
        )

    def _delete(self, db: sqlite3.Connection, agent_id: str) -> bool:
        cursor = db.execute(
            "DELETE FROM agents WHERE namespace = ? AND agent_id = ?", (self._namespace, agent_id)
        )
        return cursor.rowcount > 0

    def _record(self, row: Sequence[Any]) -> AgentRecord | None:
        agent_id, agent_type, template, model, created, last_access, about = row
        try:
            said = json.loads(self._open_text(agent_id, about))
        except Locked:
            return None
        return AgentRecord(
            agent_id=agent_id,
            agent_type=agent_type,
            system_prompt=said["system_prompt"],
            model=model,
            template=template,
            metadata=said["metadata"],
            created=created,
            last_access=last_access,
        )

    def _seal(self, agent_id: str, text: str) -> str:
        return self._cipher.seal_text(f"agent {agent_id}", text)

    def _open_text(self, agent_id: str, text: str) -> str:
        return self._cipher.open_text(f"agent {agent_id}", text)

    def _open(self) -> sqlite3.Connection:
        db = open_shared(self._path)
        try:
            _prepare(db, str(self._path))
        except BaseException:
            db.close()
            raise
        return db

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._as_store_error():
            yield self._db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other process writes into."""
        with self._lock, self._as_store_error():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _as_store_error(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            raise (StoreFull if is_full else StoreError)(
                f"the book of agents {self._path} cannot be used: {error}. Look at its folder, its permissions and "
                "the room on its disk."
            ) from error


_AGENTS = (
    "SELECT agent_id, type, template, model, created, last_access, about FROM agents WHERE namespace = ?"
)
_CARRIED = (
    "CREATE TABLE IF NOT EXISTS carried (agent INTEGER PRIMARY KEY REFERENCES agents ON DELETE CASCADE, "
    "sent INTEGER NOT NULL, clearings INTEGER NOT NULL, copy TEXT NOT NULL, given INTEGER NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS deleted (namespace TEXT NOT NULL, agent_id TEXT NOT NULL, at REAL NOT NULL, "
    "PRIMARY KEY (namespace, agent_id)) STRICT, WITHOUT ROWID",
)
"""What the object store has of each agent, and which it is still to be told were deleted."""
_ID = "SELECT id FROM agents WHERE namespace = ? AND agent_id = ?"


def _prepare(db: sqlite3.Connection, path: str) -> None:
    db.execute("BEGIN IMMEDIATE")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        for statement in resources.files(__package__).joinpath("agents.sql").read_text().split(";\n"):
            db.execute(statement)
    # Later than the first release; earlier ones pass over them.
    for table in _CARRIED:
        db.execute(table)
    db.execute("COMMIT")
    if version not in (0, _VERSION):
        raise StoreError(
            f"the book of agents {path} has version {version}, and this release reads {_VERSION}: use the release that "
            "wrote it, or another cache_dir."
        )


def to_json(message: Message) -> str:
    """A message as JSON."""
    said = asdict(message)
    del said["cache_points"]
    return json.dumps({name: value for name, value in said.items() if value or name == "content"})


def from_json(text: str) -> Message:
    """The inverse of `to_json`."""
    said = json.loads(text)
    calls = tuple(ToolCall(**call) for call in said.pop("tool_calls", ()))
    return Message(**said, tool_calls=calls)
