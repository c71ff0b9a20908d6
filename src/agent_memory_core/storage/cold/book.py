"""What a store notes of its cold tier: which sessions are to be uploaded or forgotten there, and what was seen there.

Notes lie in the store's catalog. A session is marked in the transaction that commits its turn, so whoever kills the
process between the commit and the upload does not lose the upload. There is one mark for a session however many turns
it had, so the marks are never more than the sessions, which the disk's budget bounds. A mark counts the commits since
the last upload: that is what is lost with this disk.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent_memory_core.blocks.block import BlockHash, record_hash
from agent_memory_core.storage.branches import BranchRow
from agent_memory_core.storage.cold.head import Head, HeadBranch, Offer, Position
from agent_memory_core.storage.portable import chain_to, ends_of
from agent_memory_core.storage.record import StoredRecord

if TYPE_CHECKING:
    from agent_memory_core.storage.block_store import BlockStore

Owner = tuple[str, str]
"""Namespace and session id."""

WHOLE = ""
"""In place of a session id, which is never empty: all of the namespace."""

_CHANGED, _FORGOTTEN, _SEEN = "cold changed ", "cold forgotten ", "cold seen "


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen last of the head of a session."""

    e_tag: str = ""
    positions: Mapping[int, Position] = field(default_factory=dict)
    """by the ids of the local branches"""


@dataclass(frozen=True, slots=True)
class Change:
    """A local branch that the head does not have as it is now, and all that it reaches."""

    offer: Offer
    chain: Sequence[StoredRecord]
    """its blocks and its tail, first to last"""
    others: Sequence[StoredRecord]
    """what else it depends on"""

    @property
    def records(self) -> list[StoredRecord]:
        """All of them."""
        return [*self.chain, *self.others]


class Book:
    """The notes in the catalog of one store. Every method may wait for the disk."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._catalog = store.catalog
        self._local = threading.local()

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Within this, what this thread does is not marked: it comes from the cold tier."""
        self._local.is_quiet = True
        try:
            yield
        finally:
            self._local.is_quiet = False

    @property
    def _is_quiet(self) -> bool:
        return getattr(self._local, "is_quiet", False)

    # -- what is to be done -------------------------------------------------------------------------------

    def mark(self, owner: Owner) -> None:
        """A session has changed. Within a transaction, it counts only with that."""
        if self._is_quiet:
            return
        with self._catalog.transaction():
            self._write_mark(owner, 1 + _commits(self.mark_of(owner)))

    def mark_of(self, owner: Owner) -> str | None:
        """The mark of a session, which is another one after each change."""
        return self._catalog.note(_CHANGED + json.dumps(owner))

    def _write_mark(self, owner: Owner, commits: int) -> None:
        self._catalog.write_note(_CHANGED + json.dumps(owner), f"{commits} {uuid.uuid4().hex}")

    def marked(self) -> list[Owner]:
        """The sessions that have changed."""
        return [_owner(key) for key in self._catalog.noted(_CHANGED)]

    def unsent(self) -> dict[Owner, int]:
        """How many commits of each session that has changed are not uploaded: at most so many turns are only here."""
        return {owner: _commits(self.mark_of(owner)) for owner in self.marked()}

    def mark_forgotten(self, owner: Owner) -> None:
        """A session is to be forgotten in the cold tier, too."""
        name = json.dumps(owner)
        with self._catalog.transaction():
            if not self._is_quiet:
                self._catalog.write_note(_FORGOTTEN + name, repr(time.time()))
            self._catalog.drop_note(_CHANGED + name)
            self._catalog.drop_note(_SEEN + name)

    def forgotten(self, owner: Owner) -> float | None:
        """When a session was forgotten that still is to be forgotten in the cold tier."""
        found = self._catalog.note(_FORGOTTEN + json.dumps(owner))
        return float(found) if found is not None else None

    def all_forgotten(self) -> list[Owner]:
        """The sessions of which that is so."""
        return [_owner(key) for key in self._catalog.noted(_FORGOTTEN)]

    def done_forgetting(self, owner: Owner) -> None:
        """A session is forgotten there."""
        self._catalog.drop_note(_FORGOTTEN + json.dumps(owner))

    # -- what was seen ------------------------------------------------------------------------------------

    def seen(self, owner: Owner) -> Seen:
        """What was seen last of a head."""
        found = self._catalog.note(_SEEN + json.dumps(owner))
        if found is None:
            return Seen()
        said = json.loads(found)
        return Seen(said["e_tag"], {row: Position(*position) for row, *position in said["branches"]})

    def note(self, owner: Owner, seen: Seen, mark: str | None = None) -> None:
        """Note what a head is now. What stood behind a mark is uploaded: only what came since then stays marked."""
        rows = [
            [row, position.generation, position.name, position.seen]
            for row, position in seen.positions.items()
        ]
        name = json.dumps(owner)
        with self._catalog.transaction():
            self._catalog.write_note(_SEEN + name, json.dumps({"e_tag": seen.e_tag, "branches": rows}))
            now = self.mark_of(owner)
            if mark is None or now is None:
                return
            if now == mark:
                self._catalog.drop_note(_CHANGED + name)
            else:
                self._write_mark(owner, max(1, _commits(now) - _commits(mark)))

    # -- what there is ------------------------------------------------------------------------------------

    def rows(self, owner: Owner) -> list[BranchRow]:
        """The local branches of a session."""
        return self._catalog.branches.of_session(*owner)

    def is_thread(self, owner: Owner) -> bool:
        """Whether every turn of a session named it by a framework's thread id."""
        sql = "SELECT min(is_thread) FROM sessions WHERE namespace = ? AND session_id = ?"
        return any(is_thread for (is_thread,) in self._catalog.read(sql, owner))

    def identity(self, root: BlockHash) -> dict[str, str]:
        """What a root was hashed from."""
        return self._catalog.records.identity(root)

    def changes(self, owner: Owner, head: Head) -> list[Change]:
        """The local branches that the head is to get. One of which something was evicted is left out."""
        positions = self.seen(owner).positions
        found = []
        for row in self.rows(owner):
            position = positions.get(row.branch_id)
            if position is not None and position.generation == row.generation:
                continue
            if row.last_use > head.forgotten and (change := self._change(row, position)) is not None:
                found.append(change)
        return found

    def _change(self, row: BranchRow, position: Position | None) -> Change | None:
        end, *dependencies = ends_of(self._store, row)
        chain = chain_to(self._store, row.root, end, set())
        if not chain or not all(map(_is_proven, chain)):
            return None
        seen = {record.key for record in chain}
        others: list[StoredRecord] = []
        for key in dependencies:
            for record in filter(_is_proven, chain_to(self._store, row.root, key, seen)):
                seen.add(record.key)
                others.append(record)
        branch = HeadBranch(
            name="",
            generation=row.generation,
            root=row.root,
            head=row.head,
            tail=row.tail,
            tokens=row.tokens,
            prompt_tokens=row.prompt_tokens,
            lane=row.lane,
            last_use=row.last_use,
            records=(),
            dependencies=tuple(dependencies),
        )
        return Change(Offer(row.branch_id, position, branch), chain, others)


def _is_proven(record: StoredRecord) -> bool:
    """Whether a record's token ids are known: a catalog that was rebuilt from files has lost them."""
    return record.key == record_hash(record.kind, record.parent, record.tokens)


def _commits(mark: str | None) -> int:
    """How many commits a mark stands for; those of earlier releases do not say, and stand for one at least."""
    return int(mark.rpartition(" ")[0] or 1) if mark is not None else 0


def _owner(key: str) -> Owner:
    namespace, session_id = json.loads(key[key.index("[") :])
    return namespace, session_id
