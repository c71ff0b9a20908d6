"""Blocks, tails and other records on disk: one safetensors file each, immutable, found through the catalog.

    <root>/  0700   SCHEMA   catalog.db   tmp/   quarantine/
      ns/<root hash>/identity.json   blocks/<hh>/<block hash>.safetensors
                                     and in the same way tails/ windows/ token_tails/

A turn is written in this order: reserve room, write each file under a temporary name, link it to its own, then
one catalog transaction. So the catalog never names bytes that are not there, and a process that is killed leaves
at most temporary files and sound files that nobody knows yet. Files go only after their rows went, and only
under the catalog's write lock, so that no other process can be about to count on them.

A file is used only if its header says exactly what the catalog says and its payload has the checksum. Whatever
is proven wrong moves to ``quarantine/`` and is a miss; whatever may pass (too many open files, an input error)
is a miss alone. KV can be turned back into text: files are private to their owner and hold no token ids.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from agent_memory_core.blocks.block import RECORD_KINDS, BlockHash, RecordKind, record_hash
from agent_memory_core.config import Durability
from agent_memory_core.errors import SessionNotFound, StoreError, StoreFull
from agent_memory_core.messages import SessionInfo
from agent_memory_core.storage.block_file import (
    Allocate,
    Damaged,
    HostTensor,
    LoadedBlock,
    Record,
    bytes_of,
    checksum_of,
    open_file,
    read_block,
    read_header,
    row_of,
    transfer,
    verify,
    write_header,
)
from agent_memory_core.storage.catalog import BlockRow, BranchCommit, BranchRow, Catalog
from agent_memory_core.storage.database import CatalogDamaged, is_alive, process_name
from agent_memory_core.storage.folder import link, make_dir, opening, prepare_root, remove, sync, sync_folder

log = logging.getLogger("agent_memory")

DEFAULT_QUOTA = 20 * 2**30
CATALOG_ROOM = 16 * 2**20
"""Bytes of the volume that blocks never take: on a full one the catalog could not even evict."""

MAX_QUARANTINED = 8
"""Most damaged files that are kept to be looked at."""

_FOLDERS: dict[RecordKind, str] = {kind: f"{kind}s" for kind in RECORD_KINDS}
_KINDS = {folder: kind for kind, folder in _FOLDERS.items()}
_FILE = re.compile(rf"([0-9a-f]{{64}})/({'|'.join(_KINDS)})/([0-9a-f]{{2}})/(\3[0-9a-f]{{62}})\.safetensors")
_IDENTITY = re.compile(r"([0-9a-f]{64})/identity\.json")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_STALE_SECONDS = 3600.0
_ATTEMPTS = 3
_UNLINK_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What an audit found.

    ``missing`` are rows without a file, ``damaged`` files that are not what they should be or cannot be read,
    ``foreign`` files that are none of ours, ``catalog`` wrong counts, ``over_quota`` bytes. ``unknown`` sound
    files without a row and ``leftovers`` in ``tmp/`` are what a killed process leaves: they do no harm.
    """

    files: int
    nbytes: int
    missing: tuple[BlockHash, ...]
    damaged: tuple[Path, ...]
    foreign: tuple[Path, ...]
    unknown: tuple[Path, ...]
    catalog: tuple[str, ...]
    over_quota: int
    leftovers: int

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong but what a killed process leaves."""
        return not (self.missing or self.damaged or self.foreign or self.catalog or self.over_quota)


@dataclass(frozen=True, slots=True)
class _NewFile:
    """A file to be. The checksum in ``row`` is not yet known."""

    row: BlockRow
    path: Path
    tensors: tuple[HostTensor, ...]
    views: tuple[memoryview, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a commit is made of: rows stored before, files to write, rows evicted for them, and the room."""

    stored: list[BlockRow]
    new: list[_NewFile]
    evicted: list[BlockRow]
    reservation: int


class BlockStore:
    """The disk tier: commits turns, loads blocks, keeps the budget. Any thread may call it.

    Args:
        path: its folder, made if need be.
        quota_bytes: most bytes of all its files; None is the lesser of 20 GiB and a tenth of the volume.
        min_free_bytes: bytes of the volume it leaves free; less than `CATALOG_ROOM` counts as that.
        durability: see `EngineConfig`.

    Raises:
        StoreUnreadable: the folder cannot be used safely; the message says why and what to do.
    """

    def __init__(
        self,
        path: Path,
        *,
        quota_bytes: int | None = None,
        min_free_bytes: int = 0,
        durability: Durability = "process",
    ) -> None:
        self.path = path
        self._durable = durability == "power"
        self._min_free = min_free_bytes
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._tmp, self._quarantine, self._ns = path / "tmp", path / "quarantine", path / "ns"
        prepare_root(path)
        with opening(path / "SCHEMA"):
            for folder in (self._tmp, self._quarantine, self._ns):
                make_dir(folder)
            for leftover in self._leftovers():
                leftover.unlink(missing_ok=True)
            self.catalog = self._open_catalog(durability)
        volume = os.statvfs(path)
        self.quota_bytes = (
            min(DEFAULT_QUOTA, volume.f_blocks * volume.f_frsize // 10)
            if quota_bytes is None
            else quota_bytes
        )

    def close(self) -> None:
        """Close the catalog."""
        self.catalog.close()

    # -- opening ------------------------------------------------------------------------------------------

    def _leftovers(self) -> list[Path]:
        """Temporary files that nobody is writing."""
        old = time.time() - _STALE_SECONDS
        found: list[Path] = []
        for path in self._tmp.iterdir():
            with suppress(FileNotFoundError):
                if not is_alive(path.name.rpartition(".")[0]) or path.lstat().st_mtime < old:
                    found.append(path)
        return found

    def _open_catalog(self, durability: Durability) -> Catalog:
        path = self.path / "catalog.db"
        parts = [Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]
        if not path.exists():
            # The log of a lost database would be replayed into the new one.
            for part in parts[1:]:
                part.unlink(missing_ok=True)
        try:
            catalog = Catalog(path, durability)
        except CatalogDamaged as damage:
            log.warning("%s It is rebuilt from the files; sessions begin anew over them.", damage)
            for part in parts:
                if part.exists():
                    self._set_aside(part)
            catalog = Catalog(path, durability)
        if catalog.created:
            self._rebuild(catalog)
        return catalog

    def _rebuild(self, catalog: Catalog) -> None:
        rows: list[tuple[BlockRow, float]] = []
        for path, root, key, kind in self._files():
            if key is None:
                self._register(catalog, path, root)
                continue
            with suppress(OSError, Damaged), open_file(path) as (fd, size):
                rows.append((row_of(fd, size, root, key, kind), os.fstat(fd).st_mtime))
        catalog.rebuild(rows)

    def _register(self, catalog: Catalog, path: Path, root: BlockHash) -> None:
        try:
            said = json.loads(path.read_text())
            catalog.register_root(
                root, {str(k): str(v) for k, v in said["identity"].items()}, str(said["namespace"])
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read: %s", path, error)

    def _files(
        self, foreign: list[Path] | None = None
    ) -> Iterator[tuple[Path, BlockHash, BlockHash | None, RecordKind]]:
        """Every file of ours: path, root, key (None: an identity) and kind. Others are added up."""
        for folder, subfolders, names in os.walk(self._ns):
            subfolders.sort()
            links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
            for name in sorted(names) + links:
                path = Path(folder, name)
                relative = path.relative_to(self._ns).as_posix()
                if found := _FILE.fullmatch(relative):
                    yield path, bytes.fromhex(found[1]), bytes.fromhex(found[4]), _KINDS[found[2]]
                elif found := _IDENTITY.fullmatch(relative):
                    yield path, bytes.fromhex(found[1]), None, "block"
                elif foreign is not None:
                    foreign.append(path)

    # -- identity and sessions ----------------------------------------------------------------------------

    def identify(self, root: BlockHash, identity: Mapping[str, str], namespace: str) -> None:
        """Write down once, for people and for a rebuild, what a root was hashed from.

        Raises:
            StoreError: it cannot be written.
        """
        path = self._ns / root.hex() / "identity.json"
        text = json.dumps({"namespace": namespace, "identity": dict(identity)}, indent=1, sort_keys=True)
        try:
            if not path.exists():
                self._make_dirs(path.parent)
                os.replace(self._write_tmp([memoryview(text.encode())]), path)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror}.") from error
        self.catalog.register_root(root, identity, namespace)

    def sessions(self, namespace: str | None = None) -> list[SessionInfo]:
        """See `Catalog.sessions`."""
        return self.catalog.sessions(namespace)

    def fork(self, namespace: str, session_id: str, new_session_id: str) -> None:
        """See `Catalog.fork`."""
        self.catalog.fork(namespace, session_id, new_session_id)

    def pin(self, namespace: str, session_id: str, pinned: bool = True) -> None:
        """See `Catalog.pin`."""
        self.catalog.pin(namespace, session_id, pinned)

    def session_branches(self, namespace: str, session_id: str) -> list[BranchRow]:
        """See `Catalog.session_branches`."""
        return self.catalog.session_branches(namespace, session_id)

    def forget(self, namespace: str, session_id: str) -> bool:
        """Drop a session, delete what it alone reached and all that lies in quarantine; say if there was one."""
        try:
            # The files first: whatever happens meanwhile, they do not outlive the knowledge of whose they were.
            with self.catalog.transaction():
                for row in self.catalog.forget(namespace, session_id):
                    self._path(row).unlink(missing_ok=True)
        except SessionNotFound:
            return False
        self.catalog.scrub()
        for path in self._quarantine.iterdir():
            remove(path)
        return True

    # -- writing ------------------------------------------------------------------------------------------

    def commit(self, records: Sequence[Record], commit: BranchCommit) -> BranchRow:
        """Store what a turn made and move its branch; when this returns, a kill loses nothing of it.

        Raises:
            StoreFull: the budget cannot hold it. What was stored before stays, apart from what was evicted.
            StoreError: a record is not what its name says, or the catalog cannot be written.
            OSError: a file cannot be written.
        """
        for record in records:
            if record.key != record_hash(record.kind, record.parent, record.tokens):
                raise StoreError(f"block {record.key.hex()} is not of the tokens it was given with.")
        for _ in range(_ATTEMPTS):
            done = self._attempt(self._plan(records, commit), commit)
            if done is not None:
                return done
        raise StoreError(
            f"files in {self.path} go away while they are written: does another program do that?"
        )

    def _plan(self, records: Sequence[Record], commit: BranchCommit) -> _Plan:
        """Make room for what is not stored yet, and hold what is."""
        hold = {key for record in records for key in (record.key, record.parent)}
        hold |= {commit.head, *commit.dependencies}
        rows: list[BlockRow] = []
        new: list[_NewFile] = []
        with self.catalog.transaction():
            known = self.catalog.rows([record.key for record in records])
            for record in records:
                file, row = self._new_file(record, commit.root), known.get(record.key)
                if row is not None and _place(row) == _place(file.row) and self._lies_there(row):
                    rows.append(replace(row, tokens=record.tokens))
                else:
                    new.append(file)
            nbytes = sum(file.row.nbytes for file in new)
            lacks = self._volume_lacks(nbytes) if new else 0
            reservation, gone = self.catalog.reserve(nbytes, self.quota_bytes, lacks, hold, commit.branch_id)
        return _Plan(rows, new, gone, reservation)

    def _attempt(self, plan: _Plan, commit: BranchCommit) -> BranchRow | None:
        """Carry a plan out; None where a file that it counted on went away meanwhile."""
        try:
            self._evicted(plan.evicted)
            rows = plan.stored + self._write_all(plan.new, commit)
            with self.catalog.transaction():
                self.catalog.release(plan.reservation)
                if not all(self._lies_there(row) for row in rows):
                    return None
                branch, superseded = self.catalog.commit(rows, commit)
        except BaseException:
            self._undo(plan)
            raise
        self._unlink(superseded)
        return branch

    def _new_file(self, record: Record, root: BlockHash) -> _NewFile:
        row = BlockRow(
            record.key, record.parent, root, record.tokens, record.kind, 0, "0" * 32, len(record.tokens)
        )
        views = tuple(bytes_of(tensor.data) for tensor in record.tensors)
        nbytes = len(write_header(row, record.tensors)) + sum(view.nbytes for view in views)
        return _NewFile(replace(row, nbytes=nbytes), self._path(row), record.tensors, views)

    def _path(self, row: BlockRow) -> Path:
        name = row.key.hex()
        return self._ns / row.root.hex() / _FOLDERS[row.kind] / name[:2] / f"{name}.safetensors"

    def _lies_there(self, row: BlockRow) -> bool:
        try:
            found = os.lstat(self._path(row))
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == row.nbytes

    def _write_all(self, new: Sequence[_NewFile], commit: BranchCommit) -> list[BlockRow]:
        rows = [self._publish_or_evict(new[index:], commit) for index in range(len(new))]
        if self._durable and new:
            sync_folder(self._ns, barrier=False)
        return rows

    def _publish_or_evict(self, pending: Sequence[_NewFile], commit: BranchCommit) -> BlockRow:
        """Write the first of ``pending``. Where others filled the volume meanwhile, evict for all of them."""
        nbytes = sum(file.row.nbytes for file in pending)
        for _ in range(_ATTEMPTS):
            try:
                return self._publish(pending[0])
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
            self._evicted(self.catalog.evict(nbytes, commit.branch_id))
        raise StoreFull(f"the volume of {self.path} is full: free some space on it.")

    def _publish(self, file: _NewFile) -> BlockRow:
        """Give a file its bytes and its name. One that is there already and sound is kept instead."""
        file = replace(file, row=replace(file.row, checksum=checksum_of(file.views)))
        tmp = self._write_tmp([memoryview(write_header(file.row, file.tensors)), *file.views])
        try:
            changed = self._make_dirs(file.path.parent)
            row = self._link_or_adopt(tmp, file)
            for folder in changed if self._durable else ():
                sync_folder(folder, barrier=True)
            return row
        finally:
            tmp.unlink(missing_ok=True)

    def _link_or_adopt(self, tmp: Path, file: _NewFile) -> BlockRow:
        for _ in range(_ATTEMPTS):
            with suppress(FileExistsError):
                link(tmp, file.path)
                return file.row
            try:
                with open_file(file.path) as (fd, size):
                    theirs = replace(file.row, checksum=read_header(fd, size).said.get("xxh3_128", ""))
                    verify(fd, size, theirs)
                return theirs
            except FileNotFoundError:
                continue
            except Damaged as damage:
                self._set_aside(file.path, str(damage))
        raise StoreError(f"{file.path} cannot be replaced: is another program writing there?")

    def _write_tmp(self, views: Sequence[memoryview]) -> Path:
        path = self._tmp / f"{process_name()}.{uuid.uuid4().hex}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        try:
            os.fchmod(fd, 0o600)
            transfer(views, lambda batch, _: os.writev(fd, batch))
            if self._durable:
                sync(fd, barrier=True)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return path

    def _make_dirs(self, folder: Path) -> list[Path]:
        """Make a folder below ``ns/``; return the folders in which a file in it makes a new entry."""
        changed = [folder]
        if not folder.is_dir():
            below = folder.relative_to(self._ns)
            for made in (self._ns, *(self._ns / part for part in reversed(below.parents)), folder):
                if make_dir(made):
                    changed.append(made.parent)
        return changed

    def _unlink(self, rows: Sequence[BlockRow]) -> None:
        """Delete files whose rows are gone, unless somebody has stored them again."""
        for start in range(0, len(rows), _UNLINK_AT_ONCE):
            part = rows[start : start + _UNLINK_AT_ONCE]
            with self.catalog.transaction():
                stored = self.catalog.rows([row.key for row in part])
                for row in part:
                    if row.key not in stored:
                        self._path(row).unlink(missing_ok=True)

    def _undo(self, plan: _Plan) -> None:
        try:
            self.catalog.release(plan.reservation)
            self._unlink([file.row for file in plan.new])
        except (StoreError, OSError) as error:
            log.warning("what a failed commit left could not be removed: %s", error)

    # -- room ---------------------------------------------------------------------------------------------

    def ensure_room(self, nbytes: int) -> None:
        """Refuse early what could not be stored even if all that may go were evicted.

        Raises:
            StoreFull: so it is.
        """
        state = self.catalog.stats()
        lacking = max(state["bytes"] + nbytes - self.quota_bytes, self._volume_lacks(nbytes))
        if lacking > 0 and lacking > self.catalog.evictable_bytes():
            raise StoreFull(
                f"{nbytes} bytes cannot be stored in {self.path}: pinned sessions and other programs leave no room in "
                f"{self.quota_bytes} bytes. Raise disk_budget_mb, free space on the volume, or unpin a session."
            )

    def _volume_lacks(self, nbytes: int) -> int:
        volume = os.statvfs(self.path)
        return nbytes + max(self._min_free, CATALOG_ROOM) - volume.f_bavail * volume.f_frsize

    def _evicted(self, rows: Sequence[BlockRow]) -> None:
        self._unlink(rows)
        self._count("evicted", len(rows))

    # -- reading ------------------------------------------------------------------------------------------

    def load(self, root: BlockHash, key: BlockHash, allocate: Allocate) -> LoadedBlock | None:
        """Read one block into arrays of ``allocate`` and verify it; None is a miss, counted by its reason."""
        row = self.catalog.row(key)
        if row is None or row.root != root:
            self._count("miss_unknown")
            return None
        path = self._path(row)
        try:
            with open_file(path) as (fd, size):
                return read_block(fd, size, row, allocate)
        except FileNotFoundError:
            self._count("miss_gone")
            self._drop(key, path)
        except Damaged as damage:
            self._count("miss_damaged")
            self._drop(key, path, str(damage))
        except (OSError, MemoryError) as error:
            self._count("miss_failed")
            log.warning("%s could not be read: %s", path, error)
        return None

    def _drop(self, key: BlockHash, path: Path, damage: str = "") -> None:
        """Take a lost or damaged block out of the catalog, and its file out of the way."""
        try:
            with self.catalog.transaction():
                if damage:
                    self._set_aside(path, damage)
                if not os.path.lexists(path):
                    self.catalog.drop([key])
        except (StoreError, OSError) as error:
            log.warning("%s could not be set aside: %s", path, error)

    def _set_aside(self, path: Path, reason: str = "") -> None:
        """Move a damaged file to quarantine, of which the newest few are kept."""
        log.warning("%s is damaged and was set aside: %s", path, reason)
        with suppress(FileNotFoundError):
            os.rename(path, self._quarantine / f"{time.time_ns()}.{uuid.uuid4().hex[:8]}.{path.name}")
        for old in sorted(self._quarantine.iterdir())[:-MAX_QUARANTINED]:
            remove(old)

    # -- audit --------------------------------------------------------------------------------------------

    def check(self, fix: bool = False) -> CheckReport:
        """Compare files and catalog both ways and verify every checksum.

        With ``fix``: rows without a file are dropped, damaged files set aside, sound files without a row
        adopted, leftovers removed and counts set right. Foreign files stay. A check evicts nothing: a store over
        its quota is reported, and the next turn makes room.
        """
        foreign: list[Path] = []
        damaged: dict[Path, tuple[BlockHash, str]] = {}
        unknown: dict[Path, tuple[BlockRow, float]] = {}
        files = nbytes = 0
        for path, root, key, kind in self._files(foreign):
            if key is None:
                continue
            row = self.catalog.row(key)
            try:
                with open_file(path) as (fd, size):
                    seen = row_of(fd, size, root, key, kind)
                    verify(fd, size, row or seen)
                    if row is None:
                        unknown[path] = (seen, os.fstat(fd).st_mtime)
                files, nbytes = files + 1, nbytes + size
            except FileNotFoundError:
                continue
            except Damaged as damage:
                damaged[path] = (key, str(damage))
            except OSError:
                damaged[path] = (key, "")
        rows = self.catalog.rows(self.catalog.all_keys()).values()
        missing = [row for row in rows if not os.path.lexists(self._path(row))]
        report = CheckReport(
            files=files,
            nbytes=nbytes,
            missing=tuple(row.key for row in missing),
            damaged=tuple(damaged),
            foreign=tuple(foreign),
            unknown=tuple(unknown),
            catalog=tuple(self.catalog.audit()),
            over_quota=max(0, self.catalog.total_bytes() - self.quota_bytes),
            leftovers=len(list(self._tmp.iterdir())),
        )
        if fix:
            self._fix(missing, damaged, list(unknown.values()))
        return report

    def _fix(
        self,
        missing: Sequence[BlockRow],
        damaged: Mapping[Path, tuple[BlockHash, str]],
        unknown: Sequence[tuple[BlockRow, float]],
    ) -> None:
        self.catalog.audit(fix=True)
        for row in missing:
            self._drop(row.key, self._path(row))
        for path, (key, reason) in damaged.items():
            if reason:
                self._drop(key, path, reason)
        with self.catalog.transaction():
            self.catalog.rebuild([(row, used) for row, used in unknown if self._lies_there(row)])
        for leftover in self._leftovers():
            leftover.unlink(missing_ok=True)

    def stats(self) -> dict[str, int]:
        """Files and bytes stored, the quota, and since opening: blocks evicted and misses by reason."""
        with self._counting:
            counts = dict(self._counts)
        names = ("evicted", "miss_unknown", "miss_gone", "miss_damaged", "miss_failed")
        return {
            **self.catalog.stats(),
            "quota": self.quota_bytes,
            "quarantined": len(list(self._quarantine.iterdir())),
            "failed_reads": self.catalog.failed_reads,
            **{name: counts.get(name, 0) for name in names},
        }

    def _count(self, name: str, by: int = 1) -> None:
        with self._counting:
            self._counts[name] += by


def _place(row: BlockRow) -> tuple[BlockHash, BlockHash, RecordKind, int]:
    return row.root, row.parent, row.kind, row.ntok
