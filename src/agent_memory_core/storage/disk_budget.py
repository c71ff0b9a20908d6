"""The bytes of a store: what is stored, what is set aside for turns that are being written, and what is evicted."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence

from agent_memory_core.blocks.block import BlockHash
from agent_memory_core.errors import StoreFull
from agent_memory_core.storage.database import Database, is_alive, process_name
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.record_table import RecordTable

_REMEMBER_SECONDS = 30 * 24 * 3600.0
"""How long a session whose last branch was evicted stays known as evicted."""

_EVICT_AT_ONCE = 64

_TOTALS = """SELECT files, bytes, (SELECT coalesce(sum(bytes), 0) FROM reservations),
  (SELECT count(*) FROM branches), (SELECT count(DISTINCT session) FROM branches) FROM totals"""

_OLDEST_BRANCH = """SELECT b.branch_id FROM branches b JOIN sessions s ON s.id = b.session
  WHERE NOT s.pinned AND b.branch_id IS NOT ? {among} ORDER BY b.last_use, b.branch_id LIMIT 1"""

_BYTES_BY_NAMESPACE = """SELECT t.namespace, sum(r.nbytes) FROM records r JOIN roots t ON t.root = r.root
  GROUP BY t.namespace"""

_FORGET_EVICTED = """DELETE FROM sessions WHERE NOT pinned AND last_use < ?
  AND NOT EXISTS (SELECT 1 FROM branches b WHERE b.session = sessions.id)"""


class DiskBudget:
    """Counts the bytes of one catalog's records, and removes records to make room."""

    def __init__(self, database: Database, records: RecordTable) -> None:
        self._database = database
        self._records = records

    def totals(self) -> dict[str, int]:
        """How many files and bytes are stored, bytes reserved, and branches and sessions there are."""
        names = ("files", "bytes", "reserved", "branches", "sessions")
        return dict(zip(names, next(iter(self._database.read(_TOTALS)), (0,) * len(names)), strict=True))

    def total_bytes(self) -> int:
        """Bytes of all stored files."""
        return self.totals()["bytes"]

    def reserve(
        self,
        nbytes: int,
        quota: int,
        shortfall: int,
        hold: Iterable[BlockHash],
        keep_branch: int | None,
        writes: Sequence[StoredRecord] = (),
    ) -> tuple[int, list[StoredRecord]]:
        """Set bytes aside for a turn until `release`, and evict what stands in their way.

        Args:
            nbytes: the bytes to set aside.
            quota: most bytes that may be stored and set aside together.
            shortfall: evict at least so many bytes, because the volume itself lacks them.
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
                "INSERT INTO reservations (process, bytes) VALUES (?, ?)", (process_name(), nbytes)
            ).lastrowid
            assert reservation is not None
            db.executemany(
                "INSERT INTO writing VALUES (?, ?, ?, ?)",
                [(reservation, record.key, record.root, record.kind) for record in writes],
            )
            for key in hold:
                if db.execute("UPDATE records SET last_use = ? WHERE key = ?", (now, key)).rowcount:
                    db.execute("INSERT INTO holds VALUES (?, ?)", (reservation, key))
            totals = self.totals()
            needed = max(shortfall, totals["bytes"] + totals["reserved"] - quota)
            return reservation, self.evict(needed, keep_branch)

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

    def evict(self, needed: int, keep_branch: int | None = None) -> list[StoredRecord]:
        """Remove the rows of at least ``needed`` bytes and return them: their files may be deleted.

        First go records that no branch reaches, the last of a chain first and the oldest first; then the least
        recently used branches of sessions that are not pinned, with what only they reached. Namespaces that have more
        than their equal share of what is stored give first, so that nobody can empty another's. A session whose last
        branch is evicted stays known as evicted for a month.

        Raises:
            StoreFull: all that may be evicted has fewer bytes; nothing was removed.
        """
        evicted: list[StoredRecord] = []
        with self._database.transaction() as db:
            while needed > 0:
                found = self._records.select(f"WHERE refs = 0 ORDER BY last_use, id LIMIT {_EVICT_AT_ONCE}")
                if not found and not self._drop_oldest_branch(keep_branch):
                    raise StoreFull(
                        f"the disk budget or the volume lacks {needed} bytes, and what is stored belongs to pinned "
                        f"sessions or to the turn itself: raise disk_budget_mb, free space on the volume, or unpin or "
                        f"forget a session."
                    )
                for record in found:
                    if needed > 0:
                        db.execute("DELETE FROM records WHERE key = ?", (record.key,))
                        needed -= record.nbytes
                        evicted += [record] if record.nbytes else []
        return evicted

    def release_dead(self) -> None:
        """Release what processes set aside that do not run any more; the files that they were writing are doomed."""
        with self._database.transaction() as db:
            for process, reservation in db.execute("SELECT process, id FROM reservations").fetchall():
                if not is_alive(process):
                    db.execute(
                        "INSERT OR IGNORE INTO doomed SELECT key, root, kind FROM writing WHERE reservation = ?",
                        (reservation,),
                    )
                    self.release(reservation)

    def _oldest_branch(self, db: sqlite3.Connection, keep_branch: int | None) -> tuple[int] | None:
        over = self._over_their_share(db)
        if over:
            among = f"AND s.namespace IN ({', '.join('?' * len(over))})"
            found = db.execute(_OLDEST_BRANCH.format(among=among), (keep_branch, *over)).fetchone()
            if found is not None:
                return (found[0],)
        found = db.execute(_OLDEST_BRANCH.format(among=""), (keep_branch,)).fetchone()
        return (found[0],) if found is not None else None

    def _over_their_share(self, db: sqlite3.Connection) -> list[str]:
        """The namespaces with more than the mean of all; none where there is only one."""
        if db.execute("SELECT count(DISTINCT namespace) FROM sessions").fetchone()[0] < 2:
            return []
        sizes = dict(db.execute(_BYTES_BY_NAMESPACE).fetchall())
        mean = sum(sizes.values()) / max(1, len(sizes))
        return [namespace for namespace, nbytes in sizes.items() if nbytes > mean]

    def _drop_oldest_branch(self, keep_branch: int | None) -> bool:
        """Remove the least recently used branch that may be evicted; return whether there was one."""
        with self._database.transaction() as db:
            found = self._oldest_branch(db, keep_branch)
            if found is None:
                return False
            db.execute("DELETE FROM branches WHERE branch_id = ?", found)
            db.execute(_FORGET_EVICTED, (time.time() - _REMEMBER_SECONDS,))
            return True
