"""The index of a store: which blocks it holds, which branches reach them, whose they are. One SQLite database.

A block row is held by its child rows, by the branches that end at it, and for a moment by the turn that is
being written over it; ``refs`` counts them. Triggers keep the counts and the byte total in step with every
insert, move and delete, so a crash cannot part them. Only rows with no refs may go, which makes every removal
leaf first. A block whose file was lost while something still hangs from it stays as a *ghost*: its tokens are
known, its bytes are a miss until it is committed again, and what hangs from it is then of use again.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agent_memory_core.blocks.block import BlockHash, RecordKind, pack_tokens, record_hash, unpack_tokens
from agent_memory_core.errors import InvalidRequest, SessionNotFound, StoreFull
from agent_memory_core.messages import SessionInfo, validate_session_id
from agent_memory_core.storage.database import Database, is_alive, process_name
from agent_memory_core.storage.folder import FORMAT

SessionState = Literal["new", "live", "evicted", "other_model"]

MAX_CHILDREN = 1024
"""Most rows `Catalog.children` returns: the newest."""

_TOUCH_SECONDS = 60.0
_TOMBSTONE_SECONDS = 30 * 24 * 3600.0
_QUERY_KEYS = 256
_COUNTED = """(SELECT count(*) FROM blocks c WHERE c.parent = blocks.key)
  + (SELECT count(*) FROM branches b WHERE b.head = blocks.key)
  + (SELECT count(*) FROM branches b WHERE b.tail = blocks.key)
  + (SELECT count(*) FROM holds h WHERE h.key = blocks.key)
  + (SELECT count(*) FROM dependencies p WHERE p.key = blocks.key)"""
_BLOCK = "SELECT key, parent, root, tokens, kind, nbytes, checksum, ntok FROM blocks"
_BRANCH = """SELECT b.branch_id, b.generation, s.root, s.session_id, s.namespace, b.head, b.tail, b.tokens,
  b.prompt_tokens, b.lane, b.created, b.last_use FROM sessions s JOIN branches b ON b.session = s.id"""
_CHAIN = """WITH RECURSIVE chain (key, parent, tokens, kind, ntok, depth) AS (
  SELECT key, parent, tokens, kind, ntok, 0 FROM blocks WHERE key = ?
  UNION ALL SELECT b.key, b.parent, b.tokens, b.kind, b.ntok, depth + 1 FROM chain
  JOIN blocks b ON b.key = chain.parent WHERE depth < 1000000)
  SELECT key, parent, tokens, kind, ntok FROM chain ORDER BY depth DESC"""
_DEPENDENCIES = """SELECT b.key, b.parent, b.tokens, b.kind, b.ntok FROM dependencies p JOIN blocks b ON b.key = p.key
  WHERE p.branch = ?"""

_PINNED_BYTES = """WITH RECURSIVE reach (key) AS (
  SELECT b.head FROM branches b JOIN sessions s ON s.id = b.session WHERE s.pinned
  UNION SELECT b.tail FROM branches b JOIN sessions s ON s.id = b.session WHERE s.pinned
  UNION SELECT t.key FROM dependencies t JOIN branches b ON b.branch_id = t.branch JOIN sessions s ON s.id = b.session
    WHERE s.pinned
  UNION SELECT p.parent FROM reach r JOIN blocks p ON p.key = r.key)
  SELECT coalesce(sum(nbytes), 0) FROM blocks WHERE key IN reach"""
_SESSION_BYTES = """WITH RECURSIVE reach (namespace, session_id, key) AS (
  SELECT s.namespace, s.session_id, b.head FROM branches b JOIN sessions s ON s.id = b.session
  UNION SELECT s.namespace, s.session_id, b.tail FROM branches b JOIN sessions s ON s.id = b.session
  UNION SELECT s.namespace, s.session_id, t.key FROM dependencies t JOIN branches b ON b.branch_id = t.branch
    JOIN sessions s ON s.id = b.session
  UNION SELECT r.namespace, r.session_id, p.parent FROM reach r JOIN blocks p ON p.key = r.key)
  SELECT r.namespace, r.session_id, sum(p.nbytes) FROM reach r JOIN blocks p ON p.key = r.key GROUP BY 1, 2"""
_SESSIONS = """SELECT s.namespace, s.session_id,
  coalesce((SELECT r.model FROM sessions t JOIN roots r ON r.root = t.root WHERE t.namespace = s.namespace
    AND t.session_id = s.session_id ORDER BY t.last_use DESC LIMIT 1), ''),
  count(*), max(b.tokens), max(s.pinned), min(s.created), max(b.last_use) AS used, min(s.is_thread)
  FROM sessions s JOIN branches b ON b.session = s.id WHERE ? IS NULL OR s.namespace = ?
  GROUP BY s.namespace, s.session_id ORDER BY used DESC, s.namespace, s.session_id"""


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One file known to the catalog.

    ``nbytes`` is the size of the file, ``checksum`` the xxh3-128 of its payload in hex, ``ntok`` its number of
    tokens. ``tokens`` is empty where a rebuild could not know them.
    """

    key: BlockHash
    parent: BlockHash
    root: BlockHash
    tokens: tuple[int, ...]
    kind: RecordKind
    nbytes: int
    checksum: str
    ntok: int


@dataclass(frozen=True, slots=True)
class BranchRow:
    """One branch of a session. ``head`` is its last full block, or the root; ``tokens`` counts all of it.

    ``generation`` grows with every commit; ``prompt_tokens`` is where the model's last answer begins. Times are
    in seconds since the epoch.
    """

    branch_id: int
    generation: int
    root: BlockHash
    session_id: str
    namespace: str
    head: BlockHash
    tail: BlockHash | None
    tokens: int
    prompt_tokens: int
    lane: str
    created: float
    last_use: float


@dataclass(frozen=True, slots=True)
class BranchCommit:
    """What a finished turn wants to be true: a branch, and the generation it is believed to have.

    ``branch_id`` None asks for a new branch. ``token_ids``, where given, are all tokens of the branch: they
    name blocks again whose tokens a rebuild lost, and are not looked at otherwise. ``dependencies`` are further records
    that the branch needs in order to be resumed; those that are not stored are passed over.
    """

    root: BlockHash
    namespace: str
    session_id: str
    branch_id: int | None
    generation: int
    head: BlockHash
    tail: BlockHash | None
    tokens: int
    prompt_tokens: int
    lane: str
    max_branches: int = 16
    token_ids: tuple[int, ...] = ()
    dependencies: tuple[BlockHash, ...] = ()
    is_thread: bool = False


class Catalog(Database):
    """Blocks, branches and sessions of one store."""

    # -- roots and blocks ---------------------------------------------------------------------------------

    def register_root(self, root: BlockHash, identity: Mapping[str, str], namespace: str) -> None:
        """Make a root known, with what it was hashed from. Once is enough."""
        if self.read("SELECT 1 FROM roots WHERE root = ?", (root,)):
            return
        model = identity.get("name") or identity.get("model", "")
        values = (root, namespace, model, json.dumps(dict(identity), sort_keys=True))
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO roots VALUES (?, ?, ?, ?)", values)

    def known_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are stored."""
        for start in range(0, len(hashes), _QUERY_KEYS):
            part = hashes[start : start + _QUERY_KEYS]
            found = {
                row[0]
                for row in self.read(
                    f"SELECT key FROM blocks WHERE stored AND key IN ({_placeholders(part)})", part
                )
            }
            for index, key in enumerate(part, start):
                if key not in found:
                    return index
        return len(hashes)

    def row(self, key: BlockHash) -> BlockRow | None:
        """The row of one stored block."""
        return self.rows([key]).get(key)

    def rows(self, keys: Sequence[BlockHash]) -> dict[BlockHash, BlockRow]:
        """The rows of those blocks that are stored."""
        found: dict[BlockHash, BlockRow] = {}
        for start in range(0, len(keys), _QUERY_KEYS):
            part = keys[start : start + _QUERY_KEYS]
            for row in self.read(f"{_BLOCK} WHERE stored AND key IN ({_placeholders(part)})", part):
                found[row[0]] = _block_row(row)
        return found

    def stored(self, keys: Sequence[BlockHash]) -> set[BlockHash]:
        """Which of these are stored."""
        return set(self.rows(keys))

    def tails(self, parents: Sequence[BlockHash]) -> list[BlockRow]:
        """Stored tails that directly follow one of ``parents``."""
        found: list[BlockRow] = []
        for start in range(0, len(parents), _QUERY_KEYS):
            part = parents[start : start + _QUERY_KEYS]
            sql = f"{_BLOCK} WHERE parent IN ({_placeholders(part)}) AND stored AND kind = 'tail'"
            found += [_block_row(row) for row in self.read(sql, part)]
        return found

    def dependencies(self, branch_id: int) -> set[BlockHash]:
        """What a branch needs beside its blocks and its tail."""
        return {row[0] for row in self.read("SELECT key FROM dependencies WHERE branch = ?", (branch_id,))}

    def children(self, parent: BlockHash) -> list[BlockRow]:
        """Stored blocks and tails that directly follow ``parent``, by key; at most the newest `MAX_CHILDREN`."""
        sql = f"{_BLOCK} WHERE parent = ? AND stored ORDER BY id DESC LIMIT {MAX_CHILDREN}"
        return sorted((_block_row(row) for row in self.read(sql, (parent,))), key=lambda row: row.key)

    def all_keys(self) -> list[BlockHash]:
        """The keys of all stored blocks."""
        return [row[0] for row in self.read("SELECT key FROM blocks WHERE stored ORDER BY id")]

    def drop(self, keys: Iterable[BlockHash]) -> None:
        """Take note that files are lost.

        Descendants stay, and while a block has any, or a branch ends at it, so does its row, as a ghost. The
        next turn over it commits it again, and then all that follows is of use again.
        """
        with self.transaction() as db:
            for key in keys:
                db.execute("DELETE FROM blocks WHERE key = ? AND refs = 0", (key,))
                db.execute("UPDATE blocks SET stored = 0, nbytes = 0, checksum = '' WHERE key = ?", (key,))

    def rebuild(self, rows: Iterable[tuple[BlockRow, float]]) -> int:
        """Adopt files found on disk, each with its age in seconds since the epoch; return how many were unknown.

        Branches cannot be rebuilt, nor can token ids. A full block is found again by the hash of a prompt, and
        that hash proves the ids; `BranchCommit.token_ids` brings them back.
        """
        new = 0
        with self.transaction() as db:
            for row, used in rows:
                if db.execute("SELECT 1 FROM blocks WHERE key = ? AND stored", (row.key,)).fetchone() is None:
                    self._put(db, row, 0, used)
                    new += 1
            db.execute(f"PRAGMA user_version = {FORMAT}")
        return new

    def _put(self, db: sqlite3.Connection, row: BlockRow, owner: int, now: float) -> None:
        # A row made from a file that lied of its place in the chain.
        place = (row.parent, row.root, row.kind, row.ntok)
        db.execute(
            "DELETE FROM blocks WHERE key = ? AND (parent, root, kind, ntok) <> (?, ?, ?, ?)",
            (row.key, *place),
        )
        # Whoever writes a row has just seen its file: the last one to look knows what lies there.
        db.execute(
            """INSERT INTO blocks (key, parent, root, tokens, ntok, kind, nbytes, checksum, stored, refs, owner,
              last_use) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 1, 0, ?, ?) ON CONFLICT (key) DO UPDATE SET stored = 1,
              nbytes = excluded.nbytes, checksum = excluded.checksum,
              tokens = CASE WHEN tokens = x'' THEN excluded.tokens ELSE tokens END""",
            (
                *(row.key, row.parent, row.root, pack_tokens(row.tokens), row.ntok, row.kind),
                *(row.nbytes, row.checksum, owner, now),
            ),
        )

    # -- branches and sessions ----------------------------------------------------------------------------

    def branches(self, root: BlockHash, namespace: str, session_id: str) -> list[BranchRow]:
        """The branches of a session under one root, oldest first."""
        sql = f"{_BRANCH} WHERE s.namespace = ? AND s.session_id = ? AND s.root = ? ORDER BY b.branch_id"
        return [BranchRow(*row) for row in self.read(sql, (namespace, session_id, root))]

    def session_branches(self, namespace: str, session_id: str) -> list[BranchRow]:
        """The branches of a session under all roots, oldest first."""
        sql = f"{_BRANCH} WHERE s.namespace = ? AND s.session_id = ? ORDER BY b.branch_id"
        return [BranchRow(*row) for row in self.read(sql, (namespace, session_id))]

    def branch_tokens(self, branch: BranchRow) -> tuple[int, ...]:
        """The exact token ids of a branch; where those of a block are unknown, all before it."""
        chain = self.read(_CHAIN, (branch.tail,)) if branch.tail is not None else []
        tokens: list[int] = []
        above = branch.root
        for key, parent, packed, kind, _ in chain or self.read(_CHAIN, (branch.head,)):
            part = _proven(key, parent, packed, kind)
            if parent != above or not part:
                break
            tokens += part
            above = key
        return tuple(tokens[: branch.tokens])

    def session_state(self, root: BlockHash, namespace: str, session_id: str) -> SessionState:
        """Why a session has no branch under a root: never seen, evicted, or seen under other roots only."""
        sql = """SELECT s.root, EXISTS (SELECT 1 FROM branches b WHERE b.session = s.id) FROM sessions s
          WHERE s.namespace = ? AND s.session_id = ?"""
        lives: dict[BlockHash, int] = dict(self.read(sql, (namespace, session_id)))
        if root in lives:
            return "live" if lives[root] else "evicted"
        return "other_model" if lives else "new"

    def commit(self, rows: Sequence[BlockRow], commit: BranchCommit) -> tuple[BranchRow, list[BlockRow]]:
        """Make a turn true in one transaction: its blocks, and its branch if that still is what was believed.

        A branch that moved on or went away is left alone, and the turn becomes a new branch. Beyond
        ``max_branches`` the least recently used other branch of the session goes.

        Returns:
            The branch, and the rows that it needed before and nothing needs any more: they are gone.

        Raises:
            StoreError: the database cannot be written; nothing changed.
        """
        now = time.time()
        with self.transaction() as db:
            session = self._session(db, commit, now)
            for row in rows:
                self._put(db, row, session, now)
            branch_id, left = self._move(db, session, commit, now)
            left += self._set_dependencies(db, branch_id, commit.dependencies)
            superseded = [row for key in left for row in self._remove(db, key)]
            if commit.token_ids:
                self._name_tokens(db, branch_id, commit)
            db.execute(
                """DELETE FROM branches WHERE branch_id IN (SELECT branch_id FROM branches WHERE session = ? AND
                  branch_id <> ? ORDER BY last_use DESC, branch_id DESC LIMIT -1 OFFSET ?)""",
                (session, branch_id, max(0, commit.max_branches - 1)),
            )
            found = db.execute(f"{_BRANCH} WHERE b.branch_id = ?", (branch_id,)).fetchone()
        return BranchRow(*found), superseded

    def _session(self, db: sqlite3.Connection, commit: BranchCommit, now: float) -> int:
        owner = (commit.namespace, commit.session_id)
        db.execute(
            """INSERT INTO sessions (namespace, session_id, root, pinned, is_thread, created, last_use) VALUES (?, ?, ?,
              (SELECT coalesce(max(pinned), 0) FROM sessions WHERE namespace = ? AND session_id = ?), ?, ?, ?)
              ON CONFLICT (namespace, session_id, root) DO UPDATE SET last_use = excluded.last_use,
              is_thread = is_thread AND excluded.is_thread""",
            (*owner, commit.root, *owner, commit.is_thread, now, now),
        )
        sql = "SELECT id FROM sessions WHERE namespace = ? AND session_id = ? AND root = ?"
        return int(db.execute(sql, (*owner, commit.root)).fetchone()[0])

    def _move(
        self, db: sqlite3.Connection, session: int, commit: BranchCommit, now: float
    ) -> tuple[int, list[BlockHash]]:
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
        self, db: sqlite3.Connection, branch_id: int, dependencies: Sequence[BlockHash]
    ) -> list[BlockHash]:
        """Say what a branch needs, and return what it needed until now and does not any more."""
        old = {key for (key,) in db.execute("SELECT key FROM dependencies WHERE branch = ?", (branch_id,))}
        new = set(dependencies)
        db.executemany(
            "DELETE FROM dependencies WHERE branch = ? AND key = ?", [(branch_id, key) for key in old - new]
        )
        db.executemany(
            "INSERT INTO dependencies SELECT ?, key FROM blocks WHERE key = ? AND stored",
            [(branch_id, key) for key in new - old],
        )
        return list(old - new)

    def _remove(self, db: sqlite3.Connection, key: BlockHash) -> list[BlockRow]:
        """Remove a row that nothing holds; what it hangs from stays."""
        found = db.execute(f"{_BLOCK} WHERE key = ? AND refs = 0", (key,)).fetchall()
        db.execute("DELETE FROM blocks WHERE key = ? AND refs = 0", (key,))
        return [_block_row(row) for row in found]

    def _name_tokens(self, db: sqlite3.Connection, branch_id: int, commit: BranchCommit) -> None:
        """Give their ids back to the rows of a branch that a rebuild left without, where the names prove them."""
        wordless = "SELECT 1 FROM blocks WHERE tokens = x'' AND ntok > 0 AND root = ? LIMIT 1"
        if db.execute(wordless, (commit.root,)).fetchone() is None:
            return
        end = commit.tail or commit.head
        ends = {commit.root: 0}
        chain = db.execute(_CHAIN, (end,)).fetchall()
        for key, parent, packed, kind, ntok in (*chain, *db.execute(_DEPENDENCIES, (branch_id,)).fetchall()):
            start = ends.get(parent, len(commit.token_ids))
            given = pack_tokens(commit.token_ids[start : start + ntok])
            ends[key] = start + ntok
            if not packed and _proven(key, parent, given, kind):
                db.execute("UPDATE blocks SET tokens = ? WHERE key = ?", (given, key))

    def touch(self, branch_id: int) -> None:
        """Note that a branch is in use; written at most once a minute."""
        now = time.time()
        stale = "SELECT 1 FROM branches WHERE branch_id = ? AND last_use < ?"
        if self.read(stale, (branch_id, now - _TOUCH_SECONDS)):
            with self.transaction() as db:
                db.execute("UPDATE branches SET last_use = ? WHERE branch_id = ?", (now, branch_id))

    def fork(self, namespace: str, session_id: str, new_session_id: str) -> None:
        """Give a new session the branches that another one has now. Nothing is copied but names.

        Raises:
            SessionNotFound: the session has no branch.
            InvalidRequest: the new id cannot be one, or is taken.
        """
        validate_session_id(new_session_id)
        now = time.time()
        with self.transaction() as db:
            if _ids(db, namespace, new_session_id):
                raise InvalidRequest(
                    f"session {new_session_id!r} exists already: forget it or choose another id."
                )
            copied = 0
            for old in self._known_ids(db, namespace, session_id):
                new = db.execute(
                    """INSERT INTO sessions (namespace, session_id, root, pinned, is_thread, created, last_use)
                      SELECT namespace, ?, root, 0, is_thread, ?, ? FROM sessions WHERE id = ?""",
                    (new_session_id, now, now, old),
                ).lastrowid
                copied += self._copy_branches(db, old, new, now)
            if not copied:
                raise _no_session(namespace, session_id)

    def _copy_branches(self, db: sqlite3.Connection, session: int, to: int | None, now: float) -> int:
        sql = "SELECT branch_id FROM branches WHERE session = ? ORDER BY branch_id"
        branches = [row[0] for row in db.execute(sql, (session,))]
        for branch in branches:
            copy = db.execute(
                """INSERT INTO branches (session, generation, head, tail, tokens, prompt_tokens, lane, created,
                  last_use) SELECT ?, 1, head, tail, tokens, prompt_tokens, lane, ?, ? FROM branches
                  WHERE branch_id = ?""",
                (to, now, now, branch),
            ).lastrowid
            db.execute(
                "INSERT INTO dependencies SELECT ?, key FROM dependencies WHERE branch = ?", (copy, branch)
            )
        return len(branches)

    def forget(self, namespace: str, session_id: str) -> list[BlockRow]:
        """Drop a session under all roots, and return the rows whose files may go now.

        These are the blocks that only it reached, and those it once stored that nothing reaches any more.

        Raises:
            SessionNotFound: there is no such session.
        """
        with self.transaction() as db:
            doomed: list[BlockHash] = []
            for session in self._known_ids(db, namespace, session_id):
                doomed += [key for (key,) in db.execute("SELECT key FROM blocks WHERE owner = ?", (session,))]
                needed = """SELECT key FROM dependencies
                  WHERE branch IN (SELECT branch_id FROM branches WHERE session = ?)"""
                doomed += [key for (key,) in db.execute(needed, (session,))]
                for ends in db.execute("SELECT head, tail FROM branches WHERE session = ?", (session,)):
                    doomed += [key for key in ends if key is not None]
                db.execute("DELETE FROM branches WHERE session = ?", (session,))
                db.execute("DELETE FROM sessions WHERE id = ?", (session,))
            return self._remove_free(db, doomed)

    def _remove_free(self, db: sqlite3.Connection, keys: list[BlockHash]) -> list[BlockRow]:
        """Remove those of ``keys`` that nothing holds, and every ancestor that this leaves so."""
        removed: list[BlockRow] = []
        while keys:
            found = db.execute(f"{_BLOCK} WHERE key = ? AND refs = 0", (keys.pop(),)).fetchone()
            if found is not None:
                removed.append(_block_row(found))
                db.execute("DELETE FROM blocks WHERE key = ?", (found[0],))
                keys.append(found[1])
        return removed

    def scrub(self) -> None:
        """Empty the database's log, where what was deleted can still be read."""
        self.read("PRAGMA wal_checkpoint(TRUNCATE)")

    def pin(self, namespace: str, session_id: str, pinned: bool) -> None:
        """Keep a session from eviction, or no longer.

        Raises:
            SessionNotFound: there is no such session.
        """
        with self.transaction() as db:
            for session in self._known_ids(db, namespace, session_id):
                db.execute("UPDATE sessions SET pinned = ? WHERE id = ?", (pinned, session))

    def _known_ids(self, db: sqlite3.Connection, namespace: str, session_id: str) -> list[int]:
        found = _ids(db, namespace, session_id)
        if not found:
            raise _no_session(namespace, session_id)
        return found

    def sessions(self, namespace: str | None = None) -> list[SessionInfo]:
        """Sessions with at least one branch, last used first; None lists all namespaces.

        ``nbytes`` are those of the files its branches reach: a shared file counts in each of its sessions.
        ``model`` is the one used last.

        Raises:
            StoreError: the database cannot be read.
        """
        sizes = {row[:2]: row[2] for row in self.read(_SESSION_BYTES, strict=True)}
        found = self.read(_SESSIONS, (namespace, namespace), strict=True)
        return [
            SessionInfo(
                *(sid, space, model, branches, tokens, sizes.get((space, sid), 0)),
                *(bool(pinned), created, used, bool(is_thread)),
            )
            for space, sid, model, branches, tokens, pinned, created, used, is_thread in found
        ]

    # -- room ---------------------------------------------------------------------------------------------

    def total_bytes(self) -> int:
        """Bytes of all stored files."""
        return self.stats()["bytes"]

    def stats(self) -> dict[str, int]:
        """How many files and bytes are stored and reserved, and for how many sessions and branches."""
        sql = """SELECT files, bytes, (SELECT coalesce(sum(bytes), 0) FROM reservations),
          (SELECT count(*) FROM branches), (SELECT count(DISTINCT session) FROM branches) FROM totals"""
        names = ("files", "bytes", "reserved", "branches", "sessions")
        return dict(zip(names, next(iter(self.read(sql)), (0,) * len(names)), strict=True))

    def evictable_bytes(self) -> int:
        """Bytes of all files that eviction could free: those that no pinned session reaches."""
        return self.total_bytes() - int(next(iter(self.read(_PINNED_BYTES)), (0,))[0])

    def reserve(
        self, nbytes: int, quota: int, shortfall: int, hold: Iterable[BlockHash], keep_branch: int | None
    ) -> tuple[int, list[BlockRow]]:
        """Set ``nbytes`` of ``quota`` aside until `release`, and evict for them, at least ``shortfall`` bytes.

        Until then no process evicts a block in ``hold`` or what it hangs from; this eviction spares ``keep_branch``.

        Returns:
            A name for `release`, and the rows that were evicted.

        Raises:
            StoreFull: see `evict`; nothing changed.
        """
        now = time.time()
        with self.transaction() as db:
            for process, reservation in db.execute("SELECT process, id FROM reservations").fetchall():
                if not is_alive(process):
                    self.release(reservation)
            reservation = db.execute(
                "INSERT INTO reservations (process, bytes) VALUES (?, ?)", (process_name(), nbytes)
            ).lastrowid
            assert reservation is not None
            for key in hold:
                if db.execute("UPDATE blocks SET last_use = ? WHERE key = ?", (now, key)).rowcount:
                    db.execute("INSERT INTO holds VALUES (?, ?)", (reservation, key))
            state = self.stats()
            needed = max(shortfall, state["bytes"] + state["reserved"] - quota)
            return reservation, self.evict(needed, keep_branch)

    def release(self, reservation: int) -> None:
        """Give back what `reserve` set aside and held."""
        with self.transaction() as db:
            db.execute("DELETE FROM holds WHERE reservation = ?", (reservation,))
            db.execute("DELETE FROM reservations WHERE id = ?", (reservation,))

    def evict(self, needed: int, keep_branch: int | None = None) -> list[BlockRow]:
        """Remove rows of at least ``needed`` bytes and return them: their files may go.

        First blocks that no branch reaches, leaf first and oldest first; then the least recently used branches
        of sessions that are not pinned, and what they alone reached. A session whose last branch goes stays
        known as evicted for a month.

        Raises:
            StoreFull: all that may go is less than that; nothing was removed.
        """
        gone: list[BlockRow] = []
        with self.transaction() as db:
            while needed > 0:
                found = db.execute(f"{_BLOCK} WHERE refs = 0 ORDER BY last_use, id LIMIT 64").fetchall()
                if not found and not self._expire(db, keep_branch):
                    raise StoreFull(
                        f"the disk budget lacks {needed} bytes, and what it holds belongs to pinned sessions or to the "
                        f"turn itself: raise disk_budget_mb, free space on the volume, or unpin or forget a session."
                    )
                for row in map(_block_row, found):
                    if needed > 0:
                        db.execute("DELETE FROM blocks WHERE key = ?", (row.key,))
                        needed -= row.nbytes
                        gone += [row] if row.nbytes else []
        return gone

    def _expire(self, db: sqlite3.Connection, keep_branch: int | None) -> bool:
        """Drop the least recently used branch that may go; return whether there was one."""
        found = db.execute(
            """SELECT b.branch_id FROM branches b JOIN sessions s ON s.id = b.session
              WHERE NOT s.pinned AND b.branch_id IS NOT ? ORDER BY b.last_use, b.branch_id LIMIT 1""",
            (keep_branch,),
        ).fetchone()
        if found is None:
            return False
        db.execute("DELETE FROM branches WHERE branch_id = ?", found)
        db.execute(
            """DELETE FROM sessions WHERE NOT pinned AND last_use < ?
              AND NOT EXISTS (SELECT 1 FROM branches b WHERE b.session = sessions.id)""",
            (time.time() - _TOMBSTONE_SECONDS,),
        )
        return True

    # -- verdicts -----------------------------------------------------------------------------------------

    def verdict(self, subject: str) -> str | None:
        """What was recorded of a model by `parity`."""
        found = self.read("SELECT verdict FROM verdicts WHERE subject = ?", (subject,))
        return str(found[0][0]) if found else None

    def record_verdict(self, subject: str, verdict: str) -> None:
        """Record what was found of a model, over what was recorded before."""
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (subject, verdict, time.time()))

    # -- audit --------------------------------------------------------------------------------------------

    def audit(self, fix: bool = False) -> list[str]:
        """Recount what the triggers keep; return what was wrong, in words, and set it right if told to."""
        wrong: list[str] = []
        with self.transaction() as db:
            (miscounted,) = db.execute(f"SELECT count(*) FROM blocks WHERE refs <> {_COUNTED}").fetchone()
            if miscounted:
                wrong.append(f"{miscounted} blocks with a wrong count of references")
            counted = db.execute(
                "SELECT coalesce(sum(stored), 0), coalesce(sum(nbytes), 0) FROM blocks"
            ).fetchone()
            noted = db.execute("SELECT files, bytes FROM totals").fetchone()
            if counted != noted:
                wrong.append(f"totals are {noted} instead of {counted} files and bytes")
            if fix and wrong:
                db.execute(f"UPDATE blocks SET refs = {_COUNTED}")
                db.execute("UPDATE totals SET files = ?, bytes = ?", counted)
        return wrong


def _ids(db: sqlite3.Connection, namespace: str, session_id: str) -> list[int]:
    sql = "SELECT id FROM sessions WHERE namespace = ? AND session_id = ?"
    return [row[0] for row in db.execute(sql, (namespace, session_id))]


def _no_session(namespace: str, session_id: str) -> SessionNotFound:
    return SessionNotFound(f"no session {session_id!r} in namespace {namespace!r}.")


def _placeholders(values: Collection[Any]) -> str:
    return ",".join("?" * len(values))


def _block_row(row: Any) -> BlockRow:
    key, parent, root, packed, kind, nbytes, checksum, ntok = row
    tokens = _proven(key, parent, packed, kind)
    return BlockRow(key, parent, root, tokens, kind, nbytes, checksum, ntok)


def _proven(key: BlockHash, parent: BlockHash, packed: bytes, kind: RecordKind) -> tuple[int, ...]:
    """The token ids of a row if its name says they are; else none."""
    tokens = unpack_tokens(packed)
    return tokens if key == record_hash(kind, parent, tokens) else ()
