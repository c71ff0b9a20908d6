"""The catalog's rows of records: which files the store has, what each one follows, and what may be removed.

A row is needed by the rows that follow it, by the branches that end at it or depend on it, and for a moment by the
turn that is being written on top of it. ``refs`` counts them all; triggers in ``schema.sql`` keep the count and the
total of bytes equal to the rows with every insert, update and delete, so that a crash cannot separate them. Only a
row that nothing needs may be removed, so a chain is always removed from its end.

A row whose file is lost stays as a *ghost* while something needs it: its token ids are known but its file is missing.
The records after it can be used again once the missing one has been written again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from agent_memory_core.blocks.block import (
    BlockHash,
    RecordKind,
    pack_tokens,
    record_hash,
    start_name,
    unpack_tokens,
)
from agent_memory_core.storage.database import Database
from agent_memory_core.storage.key_ring import Keys
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.sealing import Cipher, Locked

_QUERY_KEYS = 256
"""Most keys in one SQL statement."""

_SELECT = "SELECT key, parent, root, tokens, kind, nbytes, checksum, ntok FROM records"

_COUNTED_REFS = """(SELECT count(*) FROM records c WHERE c.parent = records.key)
  + (SELECT count(*) FROM branches b WHERE b.head = records.key)
  + (SELECT count(*) FROM branches b WHERE b.tail = records.key)
  + (SELECT count(*) FROM holds h WHERE h.key = records.key)
  + (SELECT count(*) FROM dependencies p WHERE p.key = records.key)"""

_COUNTED_TOTALS = "SELECT root, sum(stored), sum(nbytes) FROM records GROUP BY root"

_PUT = """INSERT INTO records
  (key, parent, root, tokens, ntok, start, kind, nbytes, checksum, stored, refs, owner, last_use)
  VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1, 0, ?, ?) ON CONFLICT (key) DO UPDATE SET stored = 1,
  nbytes = excluded.nbytes, checksum = excluded.checksum,
  start = CASE WHEN excluded.start = x'' THEN start ELSE excluded.start END,
  tokens = CASE WHEN excluded.tokens = x'' THEN tokens ELSE excluded.tokens END"""


class RecordTable:
    """The records of one catalog, and the roots that their chains start from.

    All names are those that the store has, see `Keys.hide`.
    """

    def __init__(self, database: Database, keys: Keys) -> None:
        self._database = database
        self.sealing = keys
        self._ciphers: dict[BlockHash, Cipher] = {}

    # -- how it is sealed ---------------------------------------------------------------------------------

    def cipher(self, root: BlockHash) -> Cipher:
        """What seals and opens the content of a root: with the key of its namespace. One that is unknown has none."""
        if root not in self._ciphers:
            found = self._database.read("SELECT namespace FROM roots WHERE root = ?", (root,))
            if not found:
                return self.sealing.of("")
            self._ciphers[root] = self.sealing.of(found[0][0])
        return self._ciphers[root]

    def seal_tokens(self, root: BlockHash, key: BlockHash, tokens: Sequence[int]) -> bytes:
        """Token ids as the row of a record keeps them.

        Raises:
            StoreError: the key of the namespace cannot be made.
        """
        return self.cipher(root).seal(_tokens_of(root, key), pack_tokens(tokens))

    def open_tokens(
        self, root: BlockHash, key: BlockHash, parent: BlockHash, kept: bytes, kind: RecordKind
    ) -> tuple[int, ...]:
        """The token ids of a row, if they can be opened and the key is the hash of exactly these; else none."""
        try:
            packed = self.cipher(root).open(_tokens_of(root, key), kept)
        except (Locked, OSError):
            return ()
        return proven_tokens(self.sealing.show(key), self.sealing.show(parent), packed, kind)

    # -- what is stored -----------------------------------------------------------------------------------

    def get(self, key: BlockHash) -> StoredRecord | None:
        """One record, if it is stored."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Sequence[BlockHash]) -> dict[BlockHash, StoredRecord]:
        """Those of some records that are stored, by key."""
        return {record.key: record for record in self._among("stored AND key", keys)}

    def stored(self, keys: Sequence[BlockHash]) -> set[BlockHash]:
        """Which of these are stored."""
        return set(self.get_many(keys))

    def known_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """How many of the first records of a chain are stored without a gap."""
        for start in range(0, len(hashes), _QUERY_KEYS):
            chunk = hashes[start : start + _QUERY_KEYS]
            sql = f"SELECT key FROM records WHERE stored AND key IN ({_placeholders(chunk)})"
            found = {row[0] for row in self._database.read(sql, chunk)}
            for index, key in enumerate(chunk, start):
                if key not in found:
                    return index
        return len(hashes)

    def starting(self, starts: Sequence[BlockHash], most: int) -> list[StoredRecord]:
        """The stored records that have one of these starts, of each the ``most`` newest."""
        newest = f"id IN (SELECT id FROM records WHERE start = ? AND stored ORDER BY id DESC LIMIT {most})"
        known = self._known_starts(starts)
        return [record for start in known for record in self.select(f"WHERE {newest}", (start,))]

    def _known_starts(self, starts: Sequence[BlockHash]) -> list[BlockHash]:
        """Those of some starts that any record has."""
        found: list[BlockHash] = []
        for at in range(0, len(starts), _QUERY_KEYS):
            chunk = starts[at : at + _QUERY_KEYS]
            sql = f"SELECT DISTINCT start FROM records WHERE start IN ({_placeholders(chunk)})"
            found += [row[0] for row in self._database.read(sql, chunk)]
        return found

    def keys(self) -> list[BlockHash]:
        """The keys of all stored records, oldest first."""
        return [row[0] for row in self._database.read("SELECT key FROM records WHERE stored ORDER BY id")]

    def places(self, part: int) -> list[tuple[BlockHash, BlockHash, RecordKind]]:
        """Key, root and kind of all stored records whose keys begin with the byte ``part``.

        Raises:
            StoreError: the database cannot be read.
        """
        first = bytes([part])
        sql = "SELECT key, root, kind FROM records WHERE stored AND key >= ? AND key < ?"
        # A key has 32 bytes, so none is as great as this.
        return self._database.read(sql, (first, first + b"\xff" * 32), strict=True)

    def being_deleted(self, keys: Iterable[BlockHash]) -> set[BlockHash]:
        """Which of these have lost their rows, while their files are still to be deleted."""
        return {key for key in keys if self._database.read("SELECT 1 FROM doomed WHERE key = ?", (key,))}

    def select(self, condition: str, values: Sequence[Any] = ()) -> list[StoredRecord]:
        """The rows, ghosts included, that satisfy the SQL that stands after the name of the table."""
        return [self._stored_record(row) for row in self._database.read(f"{_SELECT} {condition}", values)]

    def _stored_record(self, row: Any) -> StoredRecord:
        key, parent, root, kept, kind, nbytes, checksum, ntok = row
        tokens = self.open_tokens(root, key, parent, kept, kind)
        return StoredRecord(key, parent, root, tokens, kind, nbytes, checksum, ntok)

    def _among(self, condition: str, keys: Sequence[BlockHash]) -> list[StoredRecord]:
        found: list[StoredRecord] = []
        for start in range(0, len(keys), _QUERY_KEYS):
            chunk = keys[start : start + _QUERY_KEYS]
            found += self.select(f"WHERE {condition} IN ({_placeholders(chunk)})", chunk)
        return found

    # -- what changes -------------------------------------------------------------------------------------

    def register_root(self, root: BlockHash, identity: Mapping[str, str], namespace: str) -> None:
        """Write down what a root was hashed from. A root that is known already is left as it is."""
        if self._database.read("SELECT 1 FROM roots WHERE root = ?", (root,)):
            return
        model = identity.get("name") or identity.get("model", "")
        values = (root, namespace, model, json.dumps(dict(identity), sort_keys=True))
        with self._database.transaction() as db:
            db.execute("INSERT OR IGNORE INTO roots VALUES (?, ?, ?, ?)", values)

    def identity(self, root: BlockHash) -> dict[str, str]:
        """What a root was hashed from, and the name of its model; empty where that is not known."""
        found = self._database.read("SELECT identity FROM roots WHERE root = ?", (root,))
        return dict(json.loads(found[0][0])) if found else {}

    def put(self, record: StoredRecord, owner: int, last_use: float) -> None:
        """Add the row of a file that has just been written or seen, stored by the session of that row id."""
        with self._database.transaction() as db:
            # An older row may come from a file that lied about its place in the chain.
            db.execute(
                "DELETE FROM records WHERE key = ? AND (root, parent, kind, ntok) <> (?, ?, ?, ?)",
                (record.key, *record.place),
            )
            # Size and checksum are replaced: whoever looked at the file last knows what lies there.
            tokens = self.seal_tokens(record.root, record.key, record.tokens)
            is_known = len(record.tokens) == record.ntok
            start = self.start(record.parent, record.tokens) if is_known else b""
            values = (record.key, record.parent, record.root, tokens, record.ntok, start)
            db.execute(_PUT, (*values, record.kind, record.nbytes, record.checksum, owner, last_use))

    def start(self, parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
        """The start of a record of these tokens as its row keeps it, see `block.start_name`."""
        return self.sealing.hide(start_name(self.sealing.show(parent), tokens))

    def add_starts(self, part: int) -> None:
        """Add the starts of records whose rows are older than that column, if their keys begin with ``part``.

        Raises:
            StoreError: the catalog cannot be written.
        """
        first = bytes([part])
        lacking = "WHERE start = x'' AND (tokens <> x'' OR ntok = 0) AND key >= ? AND key < ?"
        found = self.select(lacking, (first, first + b"\xff" * 32))
        if not found:
            return
        with self._database.transaction() as db:
            starts = [
                (self.start(record.parent, record.tokens), record.key)
                for record in found
                if len(record.tokens) == record.ntok
            ]
            db.executemany("UPDATE records SET start = ? WHERE key = ?", starts)

    def adopt(self, found: Iterable[tuple[StoredRecord, float]]) -> int:
        """Add files found on disk, each with the time of its last use; return how many had no row.

        Neither branches nor token ids can be found again in files. A full block is found by the hash of a prompt,
        which proves its token ids; `BranchCommit.token_ids` brings them back.
        """
        new = 0
        with self._database.transaction():
            for record, last_use in found:
                if self.get(record.key) is None:
                    self.put(record, 0, last_use)
                    new += 1
        return new

    def mark_lost(self, keys: Iterable[BlockHash]) -> None:
        """Note that files are lost. A row that is still needed stays as a ghost, and so do all rows after it."""
        with self._database.transaction() as db:
            for key in keys:
                db.execute("DELETE FROM records WHERE key = ? AND refs = 0", (key,))
                db.execute("UPDATE records SET stored = 0, nbytes = 0, checksum = '' WHERE key = ?", (key,))

    def doomed(self, limit: int) -> list[tuple[BlockHash, BlockHash, RecordKind]]:
        """Some files whose rows are gone: the key, the root and the kind of each."""
        found = self._database.read("SELECT key, root, kind FROM doomed ORDER BY key LIMIT ?", (limit,))
        return [(bytes(key), bytes(root), kind) for key, root, kind in found]

    def deleted(self, keys: Iterable[BlockHash]) -> None:
        """Note that the files of these records, whose rows are gone, are deleted, or stored again."""
        with self._database.transaction() as db:
            db.executemany("DELETE FROM doomed WHERE key = ?", [(key,) for key in keys])

    def remove_unneeded(self, key: BlockHash) -> list[StoredRecord]:
        """Remove a row if nothing needs it, and return it then; what it follows stays."""
        with self._database.transaction() as db:
            found = self.select("WHERE key = ? AND refs = 0", (key,))
            db.execute("DELETE FROM records WHERE key = ? AND refs = 0", (key,))
        return found

    def remove_unneeded_chains(self, keys: Iterable[BlockHash]) -> list[StoredRecord]:
        """Remove those rows that nothing needs, and every ancestor that then is not needed either."""
        pending = list(keys)
        removed: list[StoredRecord] = []
        with self._database.transaction():
            while pending:
                found = self.remove_unneeded(pending.pop())
                pending += [record.parent for record in found]
                removed += found
        return removed

    def remove_namespace(self, namespace: str) -> list[StoredRecord]:
        """Remove the rows of a namespace that nothing needs, and return them."""
        sql = "SELECT key FROM records WHERE root IN (SELECT root FROM roots WHERE namespace = ?)"
        return self.remove_unneeded_chains(key for (key,) in self._database.read(sql, (namespace,)))

    def recount(self, fix: bool) -> list[str]:
        """Compare the counts that the triggers keep with the rows; return what was wrong, one phrase each.

        With ``fix`` the counts are set right.
        """
        wrong: list[str] = []
        with self._database.transaction() if fix else self._database.snapshot() as db:
            (miscounted,) = db.execute(
                f"SELECT count(*) FROM records WHERE refs <> {_COUNTED_REFS}"
            ).fetchone()
            if miscounted:
                wrong.append(f"{miscounted} records with a wrong count of references")
            wrong += [
                f"totals of {root.hex()[:8]} are {noted} instead of {counted} files and bytes"
                for root, noted, counted in self._miscounted_totals(db)
            ]
            if fix and wrong:
                db.execute(f"UPDATE records SET refs = {_COUNTED_REFS}")
                self.count_totals()
        return wrong

    def count_totals(self) -> None:
        """Set the totals right."""
        with self._database.transaction() as db:
            if self._miscounted_totals(db):
                db.execute("DELETE FROM totals")
                db.execute(f"INSERT INTO totals {_COUNTED_TOTALS}")

    def _miscounted_totals(
        self, db: sqlite3.Connection
    ) -> list[tuple[BlockHash, tuple[int, int], tuple[int, int]]]:
        noted = {root: (files, nbytes) for root, files, nbytes in db.execute("SELECT * FROM totals")}
        counted = {root: (files, nbytes) for root, files, nbytes in db.execute(_COUNTED_TOTALS)}
        none = (0, 0)
        return [
            (root, noted.get(root, none), counted.get(root, none))
            for root in sorted(noted.keys() | counted.keys())
            if noted.get(root, none) != counted.get(root, none)
        ]


def proven_tokens(key: BlockHash, parent: BlockHash, packed: bytes, kind: RecordKind) -> tuple[int, ...]:
    """Packed token ids, if the key is the hash of exactly these; else none."""
    if len(packed) % 4:
        return ()
    tokens = unpack_tokens(packed)
    return tokens if key == record_hash(kind, parent, tokens) else ()


def _tokens_of(root: BlockHash, key: BlockHash) -> str:
    return f"tokens {root.hex()} {key.hex()}"


def _placeholders(values: Collection[Any]) -> str:
    return ",".join("?" * len(values))
