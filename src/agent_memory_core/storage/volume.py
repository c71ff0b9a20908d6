"""The volume below a store: how much of it is free, and whether deleting files frees anything.

Deleted files do not always give their space back. On APFS the snapshots of Time Machine hold it for about a day; btrfs
and ZFS have snapshots too, and any file system keeps a file while a program has it open. A store that went on evicting
in the hope of space would empty itself for nothing.

So the free space is looked at after each eviction that was made because the volume lacked space. If it has not risen
by half of what was deleted, nothing more is evicted for that reason, and no turn is saved for which the volume lacks
space, until it has risen. This is noted in the catalog, so that all processes that use the store know of it.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from agent_memory_core.config import DEFAULT_DISK_MB, DEFAULT_MIN_FREE_MB, MIN_FREE_DIVISOR
from agent_memory_core.errors import StoreFull
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.macos import is_macos, purgeable_free_bytes

log = logging.getLogger("agent_memory")

CATALOG_ROOM = 16 * 2**20
"""Bytes of the volume that blocks never take: on a full one the catalog could not even evict."""

_NOTE = "withheld space"


@dataclass(frozen=True, slots=True)
class WithheldSpace:
    """Space that a volume did not give back when files were deleted."""

    lowest: int
    """the fewest bytes that have been free since then"""
    deleted: int
    """bytes of the files that were deleted in vain"""

    def is_back(self, free: int) -> bool:
        """Whether enough of it is free now to believe that deleting helps again."""
        return 2 * (free - self.lowest) >= self.deleted

    @classmethod
    def parse(cls, text: str | None) -> Self | None:
        """What `__str__` wrote; None where it is empty."""
        return cls(*map(int, text.split())) if text else None

    def __str__(self) -> str:
        return f"{self.lowest} {self.deleted}"


@dataclass(frozen=True, slots=True)
class Mark:
    """What was free at one moment."""

    free: int
    """bytes"""
    catalog: int
    """bytes of the catalog's files, which grow with every eviction: that is not space that was withheld"""


class Volume:
    """The volume of one store's folder.

    Args:
        path: the folder.
        min_free: bytes that the store leaves free; None is the lesser of 5 GiB and 2 % of the volume.
        catalog: where space that was not given back is noted.
    """

    def __init__(self, path: Path, min_free: int | None, catalog: Catalog) -> None:
        self._path = path
        self._catalog = catalog
        self.min_free = default_min_free(path) if min_free is None else min_free

    def free_bytes(self, enough: int = sys.maxsize) -> int:
        """Bytes that can be used. On macOS purgeable space counts; it is asked for below ``enough`` free bytes only."""
        volume = os.statvfs(self._path)
        free = volume.f_bavail * volume.f_frsize
        return free if free >= enough else max(free, purgeable_free_bytes(self._path))

    def mark(self, enough: int = sys.maxsize) -> Mark:
        """What is free now, see `free_bytes`."""
        names = ("catalog.db", "catalog.db-wal")
        return Mark(self.free_bytes(enough), sum(_taken(self._path / name) for name in names))

    def shortfall(self, nbytes: int) -> tuple[int, Mark]:
        """How many bytes to evict before ``nbytes`` are written, and what is free now.

        Where ``min_free`` is not kept, a turn gives back twice what it takes rather than all that is lacking: if the
        volume turns out to give nothing back, little was lost. Only what the catalog needs is made free at once.

        Raises:
            StoreFull: space is lacking, and deleting files has freed none.
        """
        floor = max(self.min_free, CATALOG_ROOM)
        now = self.mark(nbytes + floor)
        lacking = nbytes + floor - now.free
        if lacking <= 0:
            return 0, now
        self.require_giving(now.free)
        return max(nbytes + CATALOG_ROOM - now.free, min(lacking, 2 * nbytes)), now

    def require_giving(self, free: int) -> None:
        """Refuse to go on where deleted files still hold their space.

        Raises:
            StoreFull: they do.
        """
        withheld = self.withheld
        if withheld is None:
            return
        if not withheld.is_back(free):
            self._note_lowest(withheld, free)
            raise StoreFull(f"the volume of {self._path} has only {free} bytes free, and {_advice()}.")
        self.gives()

    def look(self, before: Mark, deleted: int, nbytes: int) -> None:
        """After an eviction: did the volume give the space back?

        Args:
            before: what was free before.
            deleted: bytes of the files that were deleted.
            nbytes: bytes that are now to be written.

        Raises:
            StoreFull: it did not, and without it there is no room for ``nbytes`` and the catalog.
        """
        now = self.mark()
        free, grown = now.free, max(0, now.catalog - before.catalog)
        if WithheldSpace(before.free, deleted).is_back(free + grown):
            return
        self._note(WithheldSpace(min(before.free, free), deleted))
        log.warning("%d bytes were deleted from %s, and %s", deleted, self._path, _advice())
        if free < nbytes + CATALOG_ROOM:
            raise StoreFull(f"the volume of {self._path} has only {free} bytes free, and {_advice()}.")

    def wrote(self) -> None:
        """After a turn was written: what it took must not look like space that comes back later."""
        if (withheld := self.withheld) is not None:
            self._note_lowest(withheld, self.free_bytes())

    def gives(self) -> None:
        """Deleting files was seen to help."""
        if self.withheld is not None:
            self._catalog.write_note(_NOTE, "")

    @property
    def withheld(self) -> WithheldSpace | None:
        """What the volume owes."""
        return WithheldSpace.parse(self._catalog.note(_NOTE))

    def _note(self, withheld: WithheldSpace) -> None:
        self._catalog.write_note(_NOTE, str(withheld))

    def _note_lowest(self, withheld: WithheldSpace, free: int) -> None:
        if free < withheld.lowest:
            self._note(WithheldSpace(free, withheld.deleted))


def default_quota(path: Path) -> int:
    """Most bytes of a store where nothing is set: 20 GiB, or a tenth of a smaller volume."""
    return min(DEFAULT_DISK_MB * 2**20, _size(path) // 10)


def default_min_free(path: Path) -> int:
    """Bytes left free where nothing is set: 5 GiB, or 2 % of a smaller volume."""
    return min(DEFAULT_MIN_FREE_MB * 2**20, _size(path) // MIN_FREE_DIVISOR)


def _taken(path: Path) -> int:
    """Bytes that a file takes on its volume; 0 if there is none."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _size(path: Path) -> int:
    volume = os.statvfs(path)
    return volume.f_blocks * volume.f_frsize


def _advice() -> str:
    if is_macos():
        return "deleted files are still held by snapshots: tmutil listlocalsnapshots /"
    return "files that were deleted have not freed their space: a snapshot or an open file may still hold it"
