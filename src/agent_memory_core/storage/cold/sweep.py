"""Deleting from a bucket: sessions by their age, and records that no session has, by mark and sweep from the heads.

A sweep never takes what is in use away from a machine that is writing. A session that is too old is emptied by
compare-and-swap, so whoever is about to change its head reads it again. A record is deleted only if it is older than a
day, no head has it, and nobody wrote it again while the heads were read. What is deleted all the same, in the moments
between the last look and the deletion, is a miss and no fault: it is computed again.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from agent_memory_core.storage.cold.head import Head, NoHead, forgotten, from_bytes, to_bytes
from agent_memory_core.storage.cold.mirror import GRACE
from agent_memory_core.storage.cold.names import Names, Namespaces, blocks_prefix, heads_prefix
from agent_memory_core.storage.cold.objects import ColdFailure, Objects
from agent_memory_core.storage.sealing import Locked

_DAY = 24 * 3600


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found and deleted."""

    sessions: int = 0
    """that are there"""
    expired: int = 0
    """of these, those that were too old"""
    records: int = 0
    """objects of records that are there"""
    nbytes: int = 0
    """of them"""
    deleted: int = 0
    """of these, those that no session has"""
    deleted_bytes: int = 0

    def to_dict(self) -> dict[str, int]:
        """All of it as plain values."""
        return asdict(self)

    def __add__(self, other: Any) -> Swept:
        return Swept(**{name: value + getattr(other, name) for name, value in self.to_dict().items()})


async def sweep(
    objects: Objects,
    namespaces: Namespaces,
    ttl_days: float | None,
    *,
    dry_run: bool = False,
    grace: float = GRACE,
) -> Swept:
    """Sweep all namespaces of a bucket that this machine can open.

    Args:
        objects: the bucket.
        namespaces: of it.
        ttl_days: after which a session that nobody has used is deleted; None keeps all.
        dry_run: whether nothing is to be deleted.
        grace: seconds for which a record is left that no head has.

    Raises:
        ColdFailure: the bucket cannot be reached, or a head cannot be read; nothing is deleted on a guess.
    """
    swept = Swept()
    for namespace in await namespaces.listed():
        names = await namespaces.find(namespace)
        if names is not None:
            swept += await _Sweep(objects, names, ttl_days, dry_run, grace).run()
    return swept


class _Sweep:
    """Of one namespace."""

    def __init__(
        self, objects: Objects, names: Names, ttl_days: float | None, dry_run: bool, grace: float
    ) -> None:
        self._objects = objects
        self._names = names
        self._oldest = time.time() - ttl_days * _DAY if ttl_days is not None else 0.0
        self._dry_run = dry_run
        self._grace = grace
        self._sessions = self._expired = 0

    async def run(self) -> Swept:
        begun = datetime.now(UTC)
        # Listed before the heads are read: what is written later is younger than the grace.
        found = [listed async for listed in self._objects.listed(blocks_prefix(self._names))]
        marked = await self._mark()
        unmarked = {
            listed.path: listed
            for listed in found
            if listed.path not in marked and (begun - listed.modified).total_seconds() > self._grace
        }
        if unmarked and not self._dry_run:
            again = self._objects.listed(blocks_prefix(self._names))
            still = {listed.path: listed.modified async for listed in again}
            unmarked = {
                path: listed for path, listed in unmarked.items() if still.get(path) == listed.modified
            }
            await self._objects.delete(list(unmarked))
        return Swept(
            self._sessions,
            self._expired,
            len(found),
            sum(listed.size for listed in found),
            len(unmarked),
            sum(listed.size for listed in unmarked.values()),
        )

    async def _mark(self) -> set[str]:
        """Where the records lie that some session has."""
        marked: set[str] = set()
        async for listed in self._objects.listed(heads_prefix(self._names)):
            head = await self._kept(listed.path)
            if head is not None:
                marked |= {self._names.block(record) for record in head.records.values()}
        return marked

    async def _kept(self, path: str) -> Head | None:
        """A head that stays as it is; one that is too old is emptied."""
        while (found := await self._objects.get(path)) is not None:
            head = self._read(path, found.data)
            self._sessions += bool(head.branches)
            if head.last_use >= self._oldest or not head.branches:
                return head
            if self._dry_run or await self._empty(path, head, found.e_tag):
                self._expired += 1
                return None
            self._sessions -= 1
        return None

    def _read(self, path: str, data: memoryview) -> Head:
        try:
            return from_bytes(self._names.open(path, data))
        except (NoHead, Locked) as error:
            raise ColdFailure(
                f"{path} is no head of a session: {error}. Nothing was deleted: delete it, or bring it back."
            ) from error

    async def _empty(self, path: str, head: Head, e_tag: str) -> bool:
        data = to_bytes(forgotten(head, head.last_use))
        return await self._objects.swap(path, b"".join(self._names.seal(path, [data])), e_tag) is not None
