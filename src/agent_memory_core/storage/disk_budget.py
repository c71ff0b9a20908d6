"""The bytes of a store: what is stored, what is set aside for turns that are being written, and what is evicted."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agent_memory_core.blocks.block import BlockHash
from agent_memory_core.errors import OverBudget, StoreFull
from agent_memory_core.storage.database import Database
from agent_memory_core.storage.presence import Presence
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.record_table import RecordTable

_REMEMBER_SECONDS = 30 * 24 * 3600.0
"""How long a session whose last branch was evicted stays known as evicted."""

_EVICT_AT_ONCE = 64

_TOTALS = """SELECT coalesce(sum(files), 0), coalesce(sum(bytes), 0),
  (SELECT coalesce(sum(bytes), 0) FROM reservations),
  (SELECT count(*) FROM branches), (SELECT count(DISTINCT session) FROM branches) FROM totals"""

_OLDEST_BRANCH = """SELECT b.branch_id FROM branches b JOIN sessions s ON s.id = b.session
  WHERE NOT s.pinned AND b.branch_id IS NOT ? {among} ORDER BY b.last_use, b.branch_id LIMIT 1"""

_BYTES_BY_NAMESPACE = """SELECT r.namespace, sum(t.bytes) FROM totals t JOIN roots r ON r.root = t.root
  GROUP BY r.namespace"""

_BYTES_OF_NAMESPACE = """SELECT coalesce(sum(bytes), 0) FROM (SELECT root, bytes FROM totals
  UNION ALL SELECT root, bytes FROM reservations) WHERE root IN (SELECT root FROM roots WHERE namespace = ?)"""

_AMONG_ROOTS = "AND root IN (SELECT root FROM roots WHERE namespace = ?)"

_FORGET_EVICTED = """DELETE FROM sessions WHERE NOT pinned AND last_use < ?
  AND NOT EXISTS (SELECT 1 FROM branches b WHERE b.session = sessions.id)"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a turn that is to be written has to keep to, in bytes."""

    total: int
    """most that may be stored and set aside together"""
    namespace: int | None = None
    """the same for the turn's own namespace; None: no limit of its own"""
    shortfall: int = 0
    """what the volume itself lacks"""


class DiskBudget:
    """Counts the bytes of one catalog's records, and removes records to make room."""

    def __init__(self, database: Database, records: RecordTable, presence: Presence) -> None:
        self._database = database
        self._records = records
        self._presence = presence

    def totals(self) -> dict[str, int]:
        """How many files and bytes are stored, bytes reserved, and branches and sessions there are."""
        names = ("files", "bytes", "reserved", "branches", "sessions")
        return dict(zip(names, next(iter(self._database.read(_TOTALS)), (0,) * len(names)), strict=True))

    def total_bytes(self) -> int:
        """Bytes of all stored files."""
        return self.totals()["bytes"]

    def reserve(
        self,
        root: BlockHash,
        nbytes: int,
        limits: Limits,
        hold: Iterable[BlockHash],
        keep_branch: int | None,
        writes: Sequence[StoredRecord] = (),
    ) -> tuple[int, list[StoredRecord]]:
        """Set bytes aside for a turn until `release`, and evict what stands in their way.

        Args:
            root: what the turn's chain starts from.
            nbytes: the bytes to set aside.
            limits: what may not be exceeded.
            hold: records that no process may evict before `release`, nor what they follow.
            keep_branch: a branch that is not evicted now.
            writes: the records whose files are written before `release`.

        Returns:
            A number for `release`, and the records that were evicted.

        Raises:
            StoreFull: see `evict`; nothing changed.
        """
        now = time.time()
        with self._database.transaction() as db:
            self.release_dead()
            reservation = db.execute(
                "INSERT INTO reservations (process, root, bytes) VALUES (?, ?, ?)",
                (self._presence.name, root, nbytes),
            ).lastrowid
            assert reservation is not None
            db.executemany(
                "INSERT INTO writing VALUES (?, ?, ?, ?)",
                [(reservation, record.key, record.root, record.kind) for record in writes],
            )
            for key in hold:
                if db.execute("UPDATE records SET last_use = ? WHERE key = ?", (now, key)).rowcount:
                    db.execute("INSERT INTO holds VALUES (?, ?)", (reservation, key))
            return reservation, self._make_room(root, limits, keep_branch)

    def _make_room(self, root: BlockHash, limits: Limits, keep_branch: int | None) -> list[StoredRecord]:
        totals = self.totals()
        over_all = totals["bytes"] + totals["reserved"] - limits.total
        needed = max(limits.shortfall, over_all)
        full = StoreFull if limits.shortfall > over_all else OverBudget
        evicted: list[StoredRecord] = []
        if limits.namespace is not None and (namespace := self._namespace_of(root)) is not None:
            over = self.bytes_of(namespace) - limits.namespace
            evicted += self.evict(over, keep_branch, namespace, full=OverBudget)
            needed -= sum(record.nbytes for record in evicted)
        return evicted + self.evict(needed, keep_branch, full=full)

    def _namespace_of(self, root: BlockHash) -> str | None:
        found = self._database.read("SELECT namespace FROM roots WHERE root = ?", (root,))
        return str(found[0][0]) if found else None

    def bytes_of(self, namespace: str) -> int:
        """Bytes stored and set aside in a namespace."""
        return int(self._database.read(_BYTES_OF_NAMESPACE, (namespace,))[0][0])

    def release(self, reservation: int) -> None:
        """Give back what `reserve` set aside and held."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM holds WHERE reservation = ?", (reservation,))
            db.execute("DELETE FROM writing WHERE reservation = ?", (reservation,))
            db.execute("DELETE FROM reservations WHERE id = ?", (reservation,))

    def being_written(self, keys: Iterable[BlockHash]) -> set[BlockHash]:
        """Which of these records a turn is about to store under their names."""
        return {
            key for key in keys if self._database.read("SELECT 1 FROM writing WHERE key = ? LIMIT 1", (key,))
        }

    def evict(
        self,
        needed: int,
        keep_branch: int | None = None,
        namespace: str | None = None,
        *,
        full: type[StoreFull] = StoreFull,
    ) -> list[StoredRecord]:
        """Remove the rows of at least ``needed`` bytes and return them: their files may be deleted.

        With a ``namespace``, only what belongs to it is removed.

        First go records that no branch reaches, the last of a chain first and the oldest first; then the least
        recently used branches of sessions that are not pinned, with what only they reached. Namespaces that have more
        than their equal share of what is stored give first, so that nobody can empty another's. A session whose last
        branch is evicted stays known as evicted for a month.

        Raises:
            StoreFull: all that may be evicted has fewer bytes; nothing was removed. It is of the class ``full``.
        """
        evicted: list[StoredRecord] = []
        with self._database.transaction() as db:
            while needed > 0:
                found = self._unneeded(namespace)
                if not found and not self._drop_oldest_branch(keep_branch, namespace):
                    raise full(_nothing_to_evict(needed, namespace))
                for record in found:
                    if needed > 0:
                        db.execute("DELETE FROM records WHERE key = ?", (record.key,))
                        needed -= record.nbytes
                        evicted += [record] if record.nbytes else []
        return evicted

    def _unneeded(self, namespace: str | None) -> list[StoredRecord]:
        among, values = (
            _AMONG_ROOTS if namespace is not None else "",
            (namespace,) if namespace is not None else (),
        )
        return self._records.select(
            f"WHERE refs = 0 {among} ORDER BY last_use, id LIMIT {_EVICT_AT_ONCE}", values
        )

    def release_dead(self) -> None:
        """Release what was set aside by processes that have ended; the files that they were writing are doomed."""
        with self._database.transaction() as db:
            for process, reservation in db.execute("SELECT process, id FROM reservations").fetchall():
                if not self._presence.is_alive(process):
                    db.execute(
                        "INSERT OR IGNORE INTO doomed SELECT key, root, kind FROM writing WHERE reservation = ?",
                        (reservation,),
                    )
                    self.release(reservation)

    def _oldest_branch(
        self, db: sqlite3.Connection, keep_branch: int | None, namespace: str | None
    ) -> int | None:
        preferred = [namespace] if namespace is not None else self._over_their_share(db)
        tries = [(f"AND s.namespace IN ({', '.join('?' * len(preferred))})", preferred)] if preferred else []
        tries += [("", [])] if namespace is None else []
        for among, names in tries:
            found = db.execute(_OLDEST_BRANCH.format(among=among), (keep_branch, *names)).fetchone()
            if found is not None:
                return int(found[0])
        return None

    def _over_their_share(self, db: sqlite3.Connection) -> list[str]:
        """The namespaces with more than the mean of all; none where there is only one."""
        if db.execute("SELECT count(DISTINCT namespace) FROM sessions").fetchone()[0] < 2:
            return []
        sizes = dict(db.execute(_BYTES_BY_NAMESPACE).fetchall())
        mean = sum(sizes.values()) / max(1, len(sizes))
        return [namespace for namespace, nbytes in sizes.items() if nbytes > mean]

    def _drop_oldest_branch(self, keep_branch: int | None, namespace: str | None) -> bool:
        """Remove the least recently used branch that may be evicted; return whether there was one."""
        with self._database.transaction() as db:
            found = self._oldest_branch(db, keep_branch, namespace)
            if found is None:
                return False
            db.execute("DELETE FROM branches WHERE branch_id = ?", (found,))
            db.execute(_FORGET_EVICTED, (time.time() - _REMEMBER_SECONDS,))
            return True


def _nothing_to_evict(lacking: int, namespace: str | None) -> str:
    if namespace is not None:
        return (
            f"the budget of namespace {namespace!r} lacks {lacking} bytes, and what is stored there belongs to pinned "
            f"sessions or to the turn itself: raise namespace_budget_mb, or unpin or forget a session."
        )
    return (
        f"the disk budget or the volume lacks {lacking} bytes, and what is stored belongs to pinned sessions or to the "
        f"turn itself: raise disk_budget_mb, free space on the volume, or unpin or forget a session."
    )
