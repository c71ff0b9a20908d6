"""How a session gets into the cold tier and back: its records first, then its head, by compare-and-swap.

    push    upload the records that no head has, then swap the head; if somebody else swapped it, read it and try again
    pull    read the head, download what is not here, verify it, and commit its branches to the store

A reader never relies on a record that it has not verified: a name proves what the tokens are, and a checksum the
bytes. What is missing or wrong ends its chain there, and the turn computes the rest.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from agent_memory_core.blocks.block import BlockHash
from agent_memory_core.storage.branches import BranchCommit, BranchRow, SessionOwner
from agent_memory_core.storage.cold.book import Book, Change, Owner, Seen
from agent_memory_core.storage.cold.head import (
    Head,
    HeadBranch,
    HeadRecord,
    NoHead,
    Offer,
    Position,
    forgotten,
    from_bytes,
    merged,
    to_bytes,
)
from agent_memory_core.storage.cold.names import Names, Namespaces, head_path
from agent_memory_core.storage.cold.objects import UNCHANGED, ColdFailure, Objects
from agent_memory_core.storage.portable import on_host, packed, unpacked
from agent_memory_core.storage.record import HostTensor, Record
from agent_memory_core.storage.sealing import Locked

if TYPE_CHECKING:
    from agent_memory_core.storage.block_store import BlockStore

log = logging.getLogger("agent_memory")

GRACE = 24 * 3600
"""Seconds for which an object that no head has is left: its head may be on its way."""

PARALLEL = 16
"""Most requests for records at a time."""

MOST_PULLED = 16
"""Most branches of a head that are pulled, the most recently used ones: a store keeps as many of a session."""

_ATTEMPTS = 100
_BACKOFF = 0.05
_KEPT_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class _Read:
    """A head, and the e_tag that it has; None where there is no head yet."""

    head: Head
    e_tag: str | None


class Mirror:
    """Pushes and pulls the sessions of one store. Its methods run on one event loop.

    Args:
        store: the local store.
        book: its notes.
        objects: the bucket.
        namespaces: of the bucket.
        counts: what was done, by name.
    """

    def __init__(
        self, store: BlockStore, book: Book, objects: Objects, namespaces: Namespaces, counts: Counter[str]
    ) -> None:
        self._store = store
        self._book = book
        self._objects = objects
        self._namespaces = namespaces
        self._counts = counts
        self._lost: set[str] = set()
        self._at_once = asyncio.Semaphore(PARALLEL)

    # -- there --------------------------------------------------------------------------------------------

    async def push(self, owner: Owner) -> None:
        """Bring the head of a session up to what is here.

        Raises:
            ColdFailure: it cannot be done now.
            StoreError: it cannot be done.
        """
        names = await self._namespaces.of(owner[0])
        sent: dict[BlockHash, HeadRecord] = {}
        for attempt in range(_ATTEMPTS):
            read = await self._read(names, owner)
            mark = await asyncio.to_thread(self._book.mark_of, owner)
            changes = await asyncio.to_thread(self._book.changes, owner, read.head)
            offers = await self._upload(names, read.head, changes, sent)
            if not offers:
                await asyncio.to_thread(self._settled, owner, read, {}, mark)
                return
            roots = {offer.branch.root for offer in offers}
            identities = {root: await asyncio.to_thread(self._book.identity, root) for root in roots}
            is_thread = await asyncio.to_thread(self._book.is_thread, owner)
            head, placed = merged(read.head, offers, identities, is_thread)
            e_tag = await self._swap(names, head, read.e_tag)
            if e_tag is not None:
                self._counts["pushed"] += 1
                await asyncio.to_thread(self._settled, owner, _Read(head, e_tag), placed, mark)
                return
            self._counts["conflicts"] += 1
            await asyncio.sleep(random.random() * _BACKOFF * min(attempt + 1, 10))
        raise ColdFailure("others keep changing the session in the object store.")

    async def forget(self, owner: Owner, when: float) -> None:
        """Empty the head of a session, so that no machine brings it back; its records go with the next sweep."""
        names = await self._namespaces.find(owner[0])
        if names is None:
            return
        for _ in range(_ATTEMPTS):
            read = await self._read(names, owner)
            is_gone = read.e_tag is None or read.head.forgotten >= when
            if is_gone or await self._swap(names, forgotten(read.head, when), read.e_tag) is not None:
                return
            await asyncio.sleep(random.random() * _BACKOFF)
        raise ColdFailure("others keep changing the session in the object store.")

    async def forget_namespace(self, namespace: str) -> None:
        """Delete all that the bucket has of a namespace: first its key, if it is sealed, then the rest."""
        prefix = self._namespaces.forgotten(namespace)
        found = [listed.path async for listed in self._objects.listed(prefix)]
        await self._objects.delete(sorted(found, key=lambda path: path != f"{prefix}key"))

    async def _read(self, names: Names, owner: Owner) -> _Read:
        path = head_path(names, owner[1])
        found = await self._objects.get(path)
        if found is None:
            return _Read(Head(namespace=owner[0], session_id=owner[1]), None)
        return _Read(self._opened(names, path, found.data), found.e_tag)

    def _opened(self, names: Names, path: str, data: memoryview) -> Head:
        try:
            return from_bytes(names.open(path, data))
        except (NoHead, Locked) as error:
            raise ColdFailure(f"{path} in the object store is no head of a session: {error}.") from error

    async def _swap(self, names: Names, head: Head, e_tag: str | None) -> str | None:
        path = head_path(names, head.session_id)
        data = b"".join(names.seal(path, [to_bytes(head)]))
        return await self._objects.swap(path, data, e_tag)

    def _settled(self, owner: Owner, read: _Read, placed: Mapping[int, Position], mark: str | None) -> None:
        rows = {row.branch_id for row in self._book.rows(owner)}
        known = {**self._book.seen(owner).positions, **placed}
        positions = {row: position for row, position in known.items() if row in rows}
        # The next look fetches what did not come now, which the e_tag would keep it from.
        is_all = {branch.name for branch in read.head.branches} <= {at.name for at in positions.values()}
        self._book.note(owner, Seen((is_all and read.e_tag) or "", positions), mark)

    async def _upload(
        self, names: Names, head: Head, changes: Sequence[Change], sent: dict[BlockHash, HeadRecord]
    ) -> list[Offer]:
        """Write all records of the changes that the bucket lacks; the offers of those that it has all of then."""
        known = {key: record for key, record in head.records.items() if names.block(record) not in self._lost}
        lacking = {
            record.key: record.root
            for change in changes
            for record in change.records
            if record.key not in known and record.key not in sent
        }
        done = await asyncio.gather(*(self._send(names, root, key) for key, root in lacking.items()))
        sent |= {record.key: record for record in done if record is not None}
        return [offer for change in changes if (offer := _offer(change, known | sent)) is not None]

    async def _send(self, names: Names, root: BlockHash, key: BlockHash) -> HeadRecord | None:
        async with self._at_once:
            loaded = await asyncio.to_thread(self._store.load, root, key, on_host)
            if loaded is None:
                return None
            checksum, parts = packed(loaded)
            record = HeadRecord(key, checksum, sum(len(part) for part in parts))
            path = names.block(record)
            sealed = await asyncio.to_thread(names.seal, path, parts)
            if path in self._lost:
                await self._objects.put(path, sealed)
            elif not await self._objects.put_new(path, sealed):
                modified = await self._objects.modified(path)
                if modified is None or _age(modified) > GRACE / 2:
                    # No head that this one follows has it, so a sweep may be about to delete it.
                    await self._objects.put(path, sealed)
            self._lost.discard(path)
            self._counts["uploaded_bytes"] += record.nbytes
            return record

    # -- back ---------------------------------------------------------------------------------------------

    async def pull(self, owner: Owner, seconds: float) -> bool:
        """Bring what is here up to the head of a session; say whether anything came.

        Args:
            owner: the session.
            seconds: after which it is given up; what came by then stays.

        Raises:
            ColdFailure: the object store cannot be reached.
            StoreError: the local store cannot take it.
        """
        deadline = time.monotonic() + seconds
        names = await self._namespaces.find(owner[0])
        if names is None:
            return False
        path = head_path(names, owner[1])
        seen, rows = await asyncio.to_thread(lambda: (self._book.seen(owner), self._book.rows(owner)))
        ids = {row.branch_id for row in rows}
        is_whole = bool(ids) and seen.positions.keys() <= ids
        found = await self._objects.get(path, unless=seen.e_tag if is_whole and seen.e_tag else None)
        if found is None or found is UNCHANGED:
            return False
        head = self._opened(names, path, found.data)
        if rows and all(row.last_use < head.forgotten for row in rows):
            await asyncio.to_thread(self._forget_here, owner)
            rows = []
        wanted, placed = _wanted(head, seen, rows)
        if wanted:
            is_here = await self._download(names, owner, head, [branch for branch, _ in wanted], deadline)
            placed |= await asyncio.to_thread(self._commit, owner, head, wanted, is_here)
            self._counts["pulled"] += 1
        await asyncio.to_thread(self._settled, owner, _Read(head, found.e_tag), placed, None)
        return bool(wanted)

    def _forget_here(self, owner: Owner) -> None:
        with self._book.quietly():
            self._store.forget(*owner)

    async def _download(
        self, names: Names, owner: Owner, head: Head, branches: Sequence[HeadBranch], deadline: float
    ) -> set[BlockHash]:
        """Fetch the records of branches that are not here, in order; return the names of all that are here then."""
        for root, identity in head.identities.items():
            await asyncio.to_thread(self._store.identify, root, identity, owner[0])
        roots = {record.key: branch.root for branch in branches for record in branch.records}
        records = {record.key: record for branch in branches for record in branch.records}
        is_here = await asyncio.to_thread(self._store.tier.stored, list(records)) | set(roots.values())
        lacking = [record for key, record in records.items() if key not in is_here]
        queue = [asyncio.ensure_future(self._fetch(names, record)) for record in lacking]
        try:
            for start in range(0, len(queue), _KEPT_AT_ONCE):
                chunk = queue[start : start + _KEPT_AT_ONCE]
                await asyncio.wait(chunk, timeout=max(0.0, deadline - time.monotonic()))
                await asyncio.to_thread(self._keep, owner, [_result(task) for task in chunk], roots, is_here)
                if not all(task.done() for task in chunk):
                    raise ColdFailure("the object store did not answer in the time that a turn waits for it.")
        finally:
            for task in queue:
                task.cancel()
        return is_here

    async def _fetch(self, names: Names, record: HeadRecord) -> Record[HostTensor] | None:
        """A record from the bucket; None if it is not there or not what the head says."""
        path = names.block(record)
        async with self._at_once:
            found = await self._objects.get(path)
        if found is None:
            log.warning("%s is missing in the object store: what follows it is computed", path)
        else:
            try:
                return await asyncio.to_thread(_verified, names, path, found.data, record)
            except (ValueError, Locked) as error:
                log.warning("%s in the object store is damaged, and not used: %s", path, error)
        self._counts["misses"] += 1
        # Whoever has it here writes it again with the next turn.
        self._lost.add(path)
        return None

    def _keep(
        self,
        owner: Owner,
        found: Sequence[Record[HostTensor] | None],
        roots: Mapping[BlockHash, BlockHash],
        is_here: set[BlockHash],
    ) -> None:
        """Store records whose parents are here; their names are added to ``is_here``."""
        by_root: dict[BlockHash, list[Record[HostTensor]]] = {}
        for record in found:
            if record is not None and record.parent in is_here:
                is_here.add(record.key)
                by_root.setdefault(roots[record.key], []).append(record)
        for root, records in by_root.items():
            self._store.keep(records, SessionOwner(root=root, namespace=owner[0], session_id=owner[1]))
            self._counts["downloaded_bytes"] += sum(record.nbytes for record in records)

    def _commit(
        self,
        owner: Owner,
        head: Head,
        wanted: Sequence[tuple[HeadBranch, BranchRow | None]],
        is_here: set[BlockHash],
    ) -> dict[int, Position]:
        """Move or add the local branches whose records are here; return where they stand then."""
        placed: dict[int, Position] = {}
        for branch, row in wanted:
            ends = {branch.head, branch.tail or branch.head}
            if ends <= is_here:
                with self._book.quietly():
                    new = self._store.commit([], _to_commit(owner, head, branch, row, is_here))
                placed[new.branch_id] = Position(new.generation, branch.name, branch.generation)
        return placed


def _result(task: asyncio.Future[Record[HostTensor] | None]) -> Record[HostTensor] | None:
    if not task.done() or task.cancelled():
        return None
    if isinstance(task.exception(), ColdFailure):
        return None
    return task.result()


def _verified(names: Names, path: str, data: memoryview, record: HeadRecord) -> Record[HostTensor]:
    found = unpacked(names.open(path, data), record.checksum)
    if found.key != record.key:
        raise ValueError("it is another record")
    return found


def _offer(change: Change, known: Mapping[BlockHash, HeadRecord]) -> Offer | None:
    """What a change offers, if the bucket has its whole chain; what else is missing is left out."""
    if any(record.key not in known for record in change.chain):
        return None
    records = tuple(known[record.key] for record in change.records if record.key in known)
    names = {record.key for record in records}
    dependencies = tuple(key for key in change.offer.branch.dependencies if key in names)
    return replace(
        change.offer, branch=replace(change.offer.branch, records=records, dependencies=dependencies)
    )


def _wanted(
    head: Head, seen: Seen, rows: Sequence[BranchRow]
) -> tuple[list[tuple[HeadBranch, BranchRow | None]], dict[int, Position]]:
    """The branches of the head that are not here, least recently used first, each with the local one that it moves.

    A local branch that has changed meanwhile is not moved: the head's becomes one of its own beside it. What two
    machines have done alike is here already: where such branches stand is returned, too.
    """
    by_id = {row.branch_id: row for row in rows}
    here = {position.name: (by_id.get(row), position) for row, position in seen.positions.items()}
    ends = {(row.root, row.head, row.tail, row.tokens, row.lane): row for row in rows}
    found: list[tuple[HeadBranch, BranchRow | None]] = []
    alike: dict[int, Position] = {}
    for branch in sorted(head.branches, key=lambda branch: branch.last_use)[-MOST_PULLED:]:
        row, position = here.get(branch.name, (None, None))
        if row is not None and position is not None and position.seen == branch.generation:
            continue
        if (same := ends.get(branch.end)) is not None:
            alike[same.branch_id] = Position(same.generation, branch.name, branch.generation)
            continue
        is_unchanged = row is not None and position is not None and row.generation == position.generation
        found.append((branch, row if is_unchanged else None))
    return found, alike


def _to_commit(
    owner: Owner, head: Head, branch: HeadBranch, row: BranchRow | None, is_here: set[BlockHash]
) -> BranchCommit:
    return BranchCommit(
        root=branch.root,
        namespace=owner[0],
        session_id=owner[1],
        is_thread=head.is_thread,
        branch_id=row.branch_id if row is not None else None,
        generation=row.generation if row is not None else 0,
        head=branch.head,
        tail=branch.tail,
        tokens=branch.tokens,
        prompt_tokens=branch.prompt_tokens,
        lane=branch.lane,
        dependencies=tuple(key for key in branch.dependencies if key in is_here),
    )


def _age(modified: datetime) -> float:
    return (datetime.now(UTC) - modified).total_seconds()
