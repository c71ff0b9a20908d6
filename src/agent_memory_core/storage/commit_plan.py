"""What the commit of one turn will write, what it takes for granted, and what makes way for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent_memory_core.storage.record import HostTensor, Record, StoredRecord
from agent_memory_core.storage.volume import Mark


@dataclass(frozen=True, slots=True)
class CommitPlan:
    """How a turn is committed."""

    kept: list[StoredRecord]
    """records of the turn that were stored before"""
    new: list[tuple[StoredRecord, Record[HostTensor]]]
    """records to write; their checksum is not yet known"""
    evicted: list[StoredRecord]
    """records whose rows were removed to make room, and whose files are to be deleted"""
    reservation: int
    free: Mark | None
    """what was free when it was found that the volume lacks some; None where it does not"""

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return bytes_of(self.new)


def bytes_of(new: Sequence[tuple[StoredRecord, Record[HostTensor]]]) -> int:
    """Bytes of the files of records that are to be written."""
    return sum(described.nbytes for described, _ in new)
