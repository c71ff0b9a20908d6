"""The audit of a store: every file against the catalog, the catalog against every file, and every checksum."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from agent_memory_core.blocks.block import BlockHash
from agent_memory_core.storage.block_file import Damaged, describe, open_file, verify
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.record_files import FoundFile, RecordFiles
from agent_memory_core.storage.recovery import discard


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What an audit found."""

    files: int
    """sound files"""
    nbytes: int
    """bytes of them"""
    missing: tuple[BlockHash, ...]
    """records of the catalog that have no file"""
    damaged: tuple[Path, ...]
    """files that are not what they should be, or cannot be read"""
    foreign: tuple[Path, ...]
    """files that do not belong to the store"""
    unknown: tuple[Path, ...]
    """sound files that the catalog does not know; a process that was killed leaves them, and they do no harm"""
    catalog: tuple[str, ...]
    """counts in the catalog that are wrong, one phrase each"""
    over_quota: int
    """bytes above the quota; the next turn evicts them"""
    leftovers: int
    """temporary files; a process that was killed leaves them, and they do no harm"""
    quarantined: int
    """files in the quarantine, which were found damaged earlier; they are not used"""

    @property
    def clean(self) -> bool:
        """Whether nothing was found but what a killed process leaves."""
        return not (self.missing or self.damaged or self.foreign or self.catalog or self.over_quota)


@dataclass(slots=True)
class _Findings:
    """What is found on the way, with what is needed to mend it."""

    files: int = 0
    nbytes: int = 0
    damaged: dict[Path, tuple[BlockHash, str]] = field(default_factory=dict)
    """key of each damaged file, and what is wrong with it; empty where the file could only not be read"""
    unknown: dict[Path, tuple[StoredRecord, float]] = field(default_factory=dict)
    """description and time of each file without a row"""
    foreign: list[Path] = field(default_factory=list)
    missing: list[StoredRecord] = field(default_factory=list)


def check(catalog: Catalog, files: RecordFiles, record_quota: int, fix: bool) -> CheckReport:
    """Compare files and catalog, and verify every checksum. Nothing is ever evicted, whatever the quota.

    ``record_quota`` is how many bytes records may have.

    With ``fix``, records without a file are dropped, damaged files put aside, sound files without a row adopted,
    leftovers removed, and counts set right. Foreign files stay.
    """
    found = _Findings()
    for file in files.walk(found.foreign):
        if file.key is not None:
            _look_at(file, file.key, catalog, files, found)
    stored = catalog.records.get_many(catalog.records.keys()).values()
    found.missing = [record for record in stored if not os.path.lexists(files.path_of(record))]
    report = CheckReport(
        files=found.files,
        nbytes=found.nbytes,
        missing=tuple(record.key for record in found.missing),
        damaged=tuple(found.damaged),
        foreign=tuple(found.foreign),
        unknown=tuple(found.unknown),
        catalog=(*catalog.faults(), *catalog.records.recount(fix=False)),
        over_quota=max(0, catalog.budget.total_bytes() - record_quota),
        leftovers=files.temporary(),
        quarantined=files.quarantined(),
    )
    if fix:
        _mend(found, catalog, files)
    return report


def _look_at(file: FoundFile, key: BlockHash, catalog: Catalog, files: RecordFiles, found: _Findings) -> None:
    row = catalog.records.get(key)
    try:
        with open_file(file.path) as (fd, size):
            described = describe(fd, size, file.root, key, file.kind, files.unopened)
            verify(fd, size, row or described, files.unopened)
            _judge(file.path)
            if row is None:
                found.unknown[file.path] = (described, os.fstat(fd).st_mtime)
        found.files, found.nbytes = found.files + 1, found.nbytes + size
    except FileNotFoundError:
        return
    except Damaged as damage:
        found.damaged[file.path] = (key, str(damage))
    except OSError:
        found.damaged[file.path] = (key, "")


def _judge(path: Path) -> None:
    """Ask safetensors itself, whose reader shares no code with ours, whether other tools can read the file."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise Damaged(f"safetensors cannot read it: {error}") from error


def _mend(found: _Findings, catalog: Catalog, files: RecordFiles) -> None:
    catalog.mend()
    catalog.records.recount(fix=True)
    for record in found.missing:
        discard(catalog, files, record.key, files.path_of(record))
    for path, (key, damage) in found.damaged.items():
        if damage:
            discard(catalog, files, key, path, damage)
    with catalog.transaction():
        catalog.records.adopt((record, used) for record, used in found.unknown.values() if files.has(record))
    files.remove_leftovers()
