"""Sessions and their branches: which chain of records a session ends at, and what committing a turn changes.

A session is named by its namespace and its id, and has one row for each root, that is for each model it was used
with. A branch is the end of a chain: its last full block, its tail, and the further records that it depends on.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from agent_memory_core.blocks.block import BlockHash, record_hash
from agent_memory_core.errors import InvalidRequest, SessionNotFound
from agent_memory_core.messages import SessionInfo, validate_session_id
from agent_memory_core.storage.database import Database
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.record_table import RecordTable
from agent_memory_core.storage.sealing import Locked

SessionState = Literal["new", "live", "evicted", "other_model"]
"""Why a session has no branch under a root: it was never seen, was evicted, or was used with other models only."""

_BRANCH = """SELECT b.branch_id, b.generation, s.root, s.session_id, s.namespace, b.head, b.tail, b.tokens,
  b.prompt_tokens, b.lane, b.created, b.last_use FROM sessions s JOIN branches b ON b.session = s.id"""

_CHAIN = """WITH RECURSIVE chain (key, parent, tokens, kind, ntok, depth) AS (
  SELECT key, parent, tokens, kind, ntok, 0 FROM records WHERE key = ?
  UNION ALL SELECT r.key, r.parent, r.tokens, r.kind, r.ntok, depth + 1 FROM chain
  JOIN records r ON r.key = chain.parent WHERE depth < 1000000)
  SELECT key, parent, tokens, kind, ntok FROM chain ORDER BY depth DESC"""

_DEPENDENCIES = """SELECT r.key, r.parent, r.tokens, r.kind, r.ntok
  FROM dependencies d JOIN records r ON r.key = d.key WHERE d.branch = ?"""

_SESSION_BYTES = """WITH RECURSIVE reach (namespace, session_id, key) AS (
  SELECT s.namespace, s.session_id, b.head FROM branches b JOIN sessions s ON s.id = b.session
  UNION SELECT s.namespace, s.session_id, b.tail FROM branches b JOIN sessions s ON s.id = b.session
  UNION SELECT s.namespace, s.session_id, d.key FROM dependencies d JOIN branches b ON b.branch_id = d.branch
    JOIN sessions s ON s.id = b.session
  UNION SELECT t.namespace, t.session_id, r.parent FROM reach t JOIN records r ON r.key = t.key)
  SELECT t.namespace, t.session_id, sum(r.nbytes) FROM reach t JOIN records r ON r.key = t.key GROUP BY 1, 2"""

_SESSIONS = """SELECT s.namespace, s.session_id,
  coalesce((SELECT r.model FROM sessions t JOIN roots r ON r.root = t.root WHERE t.namespace = s.namespace
    AND t.session_id = s.session_id ORDER BY t.last_use DESC LIMIT 1), ''),
  count(*), max(b.tokens), max(s.pinned), min(s.created), max(b.last_use) AS used, min(s.is_thread)
  FROM sessions s JOIN branches b ON b.session = s.id WHERE ? IS NULL OR s.namespace = ?
  GROUP BY s.namespace, s.session_id ORDER BY used DESC, s.namespace, s.session_id"""

_PUT_SESSION = """INSERT INTO sessions (namespace, session_id, root, pinned, is_thread, is_known, created, last_use)
  VALUES (?, ?, ?, (SELECT coalesce(max(pinned), 0) FROM sessions WHERE namespace = ? AND session_id = ?), ?, ?, ?, ?)
  ON CONFLICT (namespace, session_id, root) DO UPDATE SET last_use = excluded.last_use,
  is_thread = is_thread AND excluded.is_thread, is_known = is_known OR excluded.is_known"""

_DROP_OLDEST_BRANCHES = """DELETE FROM branches WHERE branch_id IN (SELECT branch_id FROM branches
  WHERE session = ? AND branch_id <> ? ORDER BY last_use DESC, branch_id DESC LIMIT -1 OFFSET ?)"""

_COPY_SESSION = """INSERT INTO sessions (namespace, session_id, root, pinned, is_thread, is_known, created, last_use)
  SELECT namespace, ?, root, 0, is_thread, is_known, ?, ? FROM sessions WHERE id = ?"""

_COPY_BRANCH = """INSERT INTO branches (session, generation, head, tail, tokens, prompt_tokens, lane, created,
  last_use) SELECT ?, 1, head, tail, tokens, prompt_tokens, lane, ?, ? FROM branches WHERE branch_id = ?"""

_KEYS_OF_SESSION = """SELECT key FROM records WHERE owner = :id
  UNION SELECT d.key FROM dependencies d JOIN branches b ON b.branch_id = d.branch WHERE b.session = :id
  UNION SELECT head FROM branches WHERE session = :id
  UNION SELECT tail FROM branches WHERE session = :id AND tail IS NOT NULL"""


@dataclass(frozen=True, slots=True)
class BranchRow:
    """One branch of a session, as the catalog has it."""

    branch_id: int
    generation: int
    """grows by one with every commit"""
    root: BlockHash
    session_id: str
    namespace: str
    head: BlockHash
    """its last full block, or the root"""
    tail: BlockHash | None
    """its unfinished last block"""
    tokens: int
    """its length in tokens, the tail included"""
    prompt_tokens: int
    """where the model's last answer begins"""
    lane: str
    created: float
    """seconds since the epoch"""
    last_use: float
    """seconds since the epoch"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOwner:
    """Whose turn it is."""

    root: BlockHash
    namespace: str
    session_id: str
    is_thread: bool = False
    """whether the session id is that of a framework's thread"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchCommit(SessionOwner):
    """What a finished turn wants its branch to be."""

    branch_id: int | None
    """the branch that it continues; None asks for a new one"""
    generation: int
    """the generation that this branch is believed to have"""
    head: BlockHash
    tail: BlockHash | None
    tokens: int
    prompt_tokens: int
    lane: str
    max_branches: int = 16
    """most branches of the session; beyond them the least recently used one is dropped"""
    token_ids: tuple[int, ...] = ()
    """all tokens of the branch, where given: they are written to records whose ids a rebuild lost"""
    dependencies: tuple[BlockHash, ...] = ()
    """further records that it needs to be resumed; those that are not stored are passed over"""


def hidden(commit: BranchCommit, hide: Callable[[BlockHash], BlockHash]) -> BranchCommit:
    """A commit with the store's names in place of the engine's, see `Keys.hide`."""
    return replace(
        commit,
        head=hide(commit.head),
        tail=hide(commit.tail) if commit.tail is not None else None,
        dependencies=tuple(hide(key) for key in commit.dependencies),
    )


class Branches:
    """The sessions and branches of one catalog."""

    def __init__(self, database: Database, records: RecordTable) -> None:
        self._database = database
        self._records = records

    # -- what is there ------------------------------------------------------------------------------------

    def of_session(self, namespace: str, session_id: str, root: BlockHash | None = None) -> list[BranchRow]:
        """The branches of a session, oldest first: under one root, or under all."""
        sql = f"""{_BRANCH} WHERE s.namespace = ? AND s.session_id = ? AND (? IS NULL OR s.root = ?)
          ORDER BY b.branch_id"""
        return [self._row(row) for row in self._database.read(sql, (namespace, session_id, root, root))]

    def _row(self, row: Any) -> BranchRow:
        """A branch by the engine's names, with its lane opened; one that cannot be opened is none."""
        found, show = BranchRow(*row), self._records.sealing.show
        tail = show(found.tail) if found.tail is not None else None
        found = replace(found, head=show(found.head), tail=tail)
        try:
            return replace(found, lane=self._records.cipher(found.root).open_text("lane", found.lane))
        except (Locked, OSError):
            return replace(found, lane="")

    def tokens(self, branch: BranchRow) -> tuple[int, ...]:
        """The exact token ids of a branch; where those of a record are unknown, all before it."""
        hide = self._records.sealing.hide
        chain = self._database.read(_CHAIN, (hide(branch.tail),)) if branch.tail is not None else []
        tokens: list[int] = []
        above = hide(branch.root)
        for key, parent, packed, kind, _ in chain or self._database.read(_CHAIN, (hide(branch.head),)):
            proven = self._records.open_tokens(branch.root, key, parent, packed, kind)
            if parent != above or not proven:
                break
            tokens += proven
            above = key
        return tuple(tokens[: branch.tokens])

    def dependencies(self, branch_id: int) -> set[BlockHash]:
        """The keys of the records that a branch needs besides its blocks and its tail."""
        found = self._database.read("SELECT key FROM dependencies WHERE branch = ?", (branch_id,))
        return {self._records.sealing.show(key) for (key,) in found}

    def session_state(self, root: BlockHash, namespace: str, session_id: str) -> SessionState:
        """Whether a session has a branch under a root, and else why not."""
        sql = """SELECT s.root, EXISTS (SELECT 1 FROM branches b WHERE b.session = s.id) FROM sessions s
          WHERE s.namespace = ? AND s.session_id = ? AND s.is_known"""
        lives: dict[BlockHash, int] = dict(self._database.read(sql, (namespace, session_id)))
        if root in lives:
            return "live" if lives[root] else "evicted"
        return "other_model" if lives else "new"

    def sessions(self, namespace: str | None = None) -> list[SessionInfo]:
        """Sessions that have a branch, the most recently used first; None lists all namespaces.

        ``nbytes`` counts the files that its branches reach: a shared file counts in each of its sessions. ``model``
        is the one that was used last.

        Raises:
            StoreError: the database cannot be read.
        """
        sizes = {row[:2]: row[2] for row in self._database.read(_SESSION_BYTES, strict=True)}
        found = self._database.read(_SESSIONS, (namespace, namespace), strict=True)
        return [
            SessionInfo(
                session_id=session_id,
                namespace=space,
                model=model,
                branches=branches,
                tokens=tokens,
                nbytes=sizes.get((space, session_id), 0),
                pinned=bool(pinned),
                created=created,
                last_use=used,
                is_thread=bool(is_thread),
            )
            for space, session_id, model, branches, tokens, pinned, created, used, is_thread in found
        ]

    # -- a turn -------------------------------------------------------------------------------------------

    def commit(
        self, records: Sequence[StoredRecord], commit: BranchCommit
    ) -> tuple[BranchRow, list[StoredRecord]]:
        """Write a turn in one transaction: its records, and its branch if that still has the believed generation.

        A branch that was moved or removed meanwhile is left alone, and the turn becomes a new branch. What is given
        has the store's names, see `hidden`; the branch that is returned has the engine's.

        Returns:
            The branch, and the records that only it needed before and nothing needs now: their rows are removed.

        Raises:
            StoreError: the database cannot be written; nothing changed.
        """
        now = time.time()
        with self._database.transaction() as db:
            session = _put_session(db, commit, now, is_known=True)
            for record in records:
                self._records.put(record, session, now)
            lane = self._records.cipher(commit.root).seal_text("lane", commit.lane)
            branch_id, left = _move(db, session, replace(commit, lane=lane), now)
            left += _set_dependencies(db, branch_id, commit.dependencies)
            superseded = [record for key in left for record in self._records.remove_unneeded(key)]
            if commit.token_ids:
                self._restore_tokens(db, branch_id, commit)
            db.execute(_DROP_OLDEST_BRANCHES, (session, branch_id, max(0, commit.max_branches - 1)))
            found = db.execute(f"{_BRANCH} WHERE b.branch_id = ?", (branch_id,)).fetchone()
        return self._row(found), superseded

    def _restore_tokens(self, db: sqlite3.Connection, branch_id: int, commit: BranchCommit) -> None:
        """Write token ids to the records of a branch that a rebuild left without, where the keys prove them."""
        without = "SELECT 1 FROM records WHERE tokens = x'' AND ntok > 0 AND root = ? LIMIT 1"
        if db.execute(without, (commit.root,)).fetchone() is None:
            return
        show = self._records.sealing.show
        ends = {self._records.sealing.hide(commit.root): 0}
        chain = db.execute(_CHAIN, (commit.tail or commit.head,)).fetchall()
        for key, parent, kept, kind, ntok in (*chain, *db.execute(_DEPENDENCIES, (branch_id,)).fetchall()):
            start = ends.get(parent, len(commit.token_ids))
            given = commit.token_ids[start : start + ntok]
            ends[key] = start + ntok
            if not kept and show(key) == record_hash(kind, show(parent), given):
                tokens = self._records.seal_tokens(commit.root, key, given)
                values = (tokens, self._records.start(parent, given), key)
                db.execute("UPDATE records SET tokens = ?, start = ? WHERE key = ?", values)

    def keep(self, records: Sequence[StoredRecord], owner: SessionOwner) -> None:
        """Write a part of a prompt whose turn has not ended: records of a session that no branch reaches yet.

        Raises:
            StoreError: the database cannot be written; nothing changed.
        """
        now = time.time()
        with self._database.transaction() as db:
            session = _put_session(db, owner, now, is_known=False)
            for record in records:
                self._records.put(record, session, now)

    # -- a session ----------------------------------------------------------------------------------------

    def fork(self, namespace: str, session_id: str, new_session_id: str) -> None:
        """Give a new session the branches that another one has now. No file is copied.

        Raises:
            SessionNotFound: the session has no branch.
            InvalidRequest: the new id cannot be used, or is taken.
        """
        validate_session_id(new_session_id)
        now = time.time()
        with self._database.transaction() as db:
            if _row_ids(db, namespace, new_session_id):
                raise InvalidRequest(
                    f"session {new_session_id!r} exists already: forget it or choose another id."
                )
            copied = 0
            for old in _known_row_ids(db, namespace, session_id):
                new = db.execute(_COPY_SESSION, (new_session_id, now, now, old)).lastrowid
                copied += _copy_branches(db, old, new, now)
            if not copied:
                raise _no_session(namespace, session_id)

    def forget(self, namespace: str, session_id: str) -> list[StoredRecord]:
        """Remove a session under all roots, and return the records whose files may be deleted now.

        These are the records that only it reached, and those it once stored that nothing reaches any more.

        Raises:
            SessionNotFound: there is no such session.
        """
        with self._database.transaction() as db:
            keys: list[BlockHash] = []
            for row_id in _known_row_ids(db, namespace, session_id):
                keys += [key for (key,) in db.execute(_KEYS_OF_SESSION, {"id": row_id})]
                db.execute("DELETE FROM branches WHERE session = ?", (row_id,))
                db.execute("DELETE FROM sessions WHERE id = ?", (row_id,))
            return self._records.remove_unneeded_chains(keys)

    def pin(self, namespace: str, session_id: str, pinned: bool = True) -> None:
        """Protect a session from eviction, or no longer.

        Raises:
            SessionNotFound: there is no such session.
        """
        with self._database.transaction() as db:
            for row_id in _known_row_ids(db, namespace, session_id):
                db.execute("UPDATE sessions SET pinned = ? WHERE id = ?", (pinned, row_id))


def _put_session(db: sqlite3.Connection, owner: SessionOwner, now: float, *, is_known: bool) -> int:
    """Add the session's row, or note its use; return the row's id."""
    name = (owner.namespace, owner.session_id)
    db.execute(_PUT_SESSION, (*name, owner.root, *name, owner.is_thread, is_known, now, now))
    sql = "SELECT id FROM sessions WHERE namespace = ? AND session_id = ? AND root = ?"
    return int(db.execute(sql, (*name, owner.root)).fetchone()[0])


def _move(
    db: sqlite3.Connection, session: int, commit: BranchCommit, now: float
) -> tuple[int, list[BlockHash]]:
    """Move the branch, or add one where it is not what was believed; return its id and the tail that it left."""
    state = (commit.head, commit.tail, commit.tokens, commit.prompt_tokens, commit.lane)
    old = db.execute(
        "SELECT tail FROM branches WHERE branch_id = ? AND session = ? AND generation = ?",
        (commit.branch_id, session, commit.generation),
    ).fetchone()
    if old is None:
        added = db.execute(
            """INSERT INTO branches (head, tail, tokens, prompt_tokens, lane, session, generation, created,
              last_use) VALUES (?, ?, ?, ?, ?, ?, 1, ?, ?)""",
            (*state, session, now, now),
        )
        assert added.lastrowid is not None
        return added.lastrowid, []
    assert commit.branch_id is not None
    db.execute(
        """UPDATE branches SET head = ?, tail = ?, tokens = ?, prompt_tokens = ?, lane = ?, last_use = ?,
          generation = generation + 1 WHERE branch_id = ?""",
        (*state, now, commit.branch_id),
    )
    return commit.branch_id, [old[0]] if old[0] is not None else []


def _set_dependencies(
    db: sqlite3.Connection, branch_id: int, dependencies: Sequence[BlockHash]
) -> list[BlockHash]:
    """Replace what a branch depends on; return what it does not depend on any more."""
    old = {key for (key,) in db.execute("SELECT key FROM dependencies WHERE branch = ?", (branch_id,))}
    new = set(dependencies)
    db.executemany(
        "DELETE FROM dependencies WHERE branch = ? AND key = ?", [(branch_id, key) for key in old - new]
    )
    db.executemany(
        "INSERT INTO dependencies SELECT ?, key FROM records WHERE key = ? AND stored",
        [(branch_id, key) for key in new - old],
    )
    return list(old - new)


def _copy_branches(db: sqlite3.Connection, session: int, to: int | None, now: float) -> int:
    """Copy the branches of one session's row to another; return how many there were."""
    sql = "SELECT branch_id FROM branches WHERE session = ? ORDER BY branch_id"
    branches = [row[0] for row in db.execute(sql, (session,))]
    for branch in branches:
        copy = db.execute(_COPY_BRANCH, (to, now, now, branch)).lastrowid
        db.execute(
            "INSERT INTO dependencies SELECT ?, key FROM dependencies WHERE branch = ?", (copy, branch)
        )
    return len(branches)


def _row_ids(db: sqlite3.Connection, namespace: str, session_id: str) -> list[int]:
    """The ids of a session's rows, one for each root."""
    sql = "SELECT id FROM sessions WHERE namespace = ? AND session_id = ?"
    return [row[0] for row in db.execute(sql, (namespace, session_id))]


def _known_row_ids(db: sqlite3.Connection, namespace: str, session_id: str) -> list[int]:
    found = _row_ids(db, namespace, session_id)
    if not found:
        raise _no_session(namespace, session_id)
    return found


def _no_session(namespace: str, session_id: str) -> SessionNotFound:
    return SessionNotFound(f"no session {session_id!r} in namespace {namespace!r}.")
