"""Blocks and tails on disk: one safetensors file each, immutable, found through the catalog.

    <root>/  0700   SCHEMA   catalog.db   tmp/   quarantine/
      ns/<root hash>/identity.json   b/<hh>/<block hash>.safetensors   t/<hh>/<tail hash>.safetensors

A turn is written in this order: reserve room, write each file under a temporary name, link it to its own, then
one catalog transaction. So the catalog never names bytes that are not there, and a process that is killed leaves
at most temporary files and sound files that nobody knows yet. Files go only after their rows went, and only
under the catalog's write lock, so that no other process can be about to count on them.

A file is used only if its header says exactly what the catalog says and its payload has the checksum. Whatever
is proven wrong moves to ``quarantine/`` and is a miss; whatever may pass (too many open files, an input error)
is a miss alone. KV can be turned back into text: files are private to their owner and hold no token ids.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import json
import logging
import os
import re
import shutil
import stat
import struct
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from agent_memory_core.block import BlockHash, block_hash, tail_hash
from agent_memory_core.catalog import (
    BlockRow,
    BranchCommit,
    BranchRow,
    Catalog,
    CatalogDamaged,
    is_alive,
    process_name,
)
from agent_memory_core.config import Durability
from agent_memory_core.errors import SessionNotFound, StoreError, StoreFull, StoreUnreadable
from agent_memory_core.messages import SessionInfo

log = logging.getLogger("agent_memory")

SCHEMA = 1
"""Version of the folder; part of every block's header."""

ALIGNMENT = 4096
MAX_HEADER = 2**20
DEFAULT_QUOTA = 20 * 2**30
CATALOG_ROOM = 16 * 2**20
"""Bytes of the volume that blocks never take: on a full one the catalog could not even evict."""

MAX_QUARANTINED = 8
"""Most damaged files that are kept to be looked at."""

_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
_ITEM_BYTES |= {"U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FOLDERS = {False: "b", True: "t"}
_FILE = re.compile(r"([0-9a-f]{64})/([bt])/([0-9a-f]{2})/(\3[0-9a-f]{62})\.safetensors")
_IDENTITY = re.compile(r"([0-9a-f]{64})/identity\.json")
_MAX_BUFFERS = 1024
_MAX_CALL = 2**30
_PIECE = 2**20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_FOREIGN = {errno.ELOOP, errno.ENXIO}
_STALE_SECONDS = 3600.0
_ATTEMPTS = 3
_UNLINK_AT_ONCE = 128
_REMOTE = {"nfs", "nfs4", "smbfs", "smb3", "cifs", "afpfs", "webdav", "fuse.sshfs"}
_F_BARRIERFSYNC = 85
_F_FULLFSYNC = 51

Allocate = Callable[[str, tuple[int, ...]], tuple[Any, memoryview]]
"""From a safetensors dtype and a shape to an array and its writable bytes, which the store fills."""


@dataclass(frozen=True, slots=True)
class HostTensor:
    """One tensor in host memory. ``dtype`` is safetensors' name; ``data`` are its contiguous bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class Record:
    """One block or tail to store. ``tensors`` are laid down in this order, without gaps."""

    key: BlockHash
    parent: BlockHash
    tokens: tuple[int, ...]
    is_tail: bool
    tensors: tuple[HostTensor, ...]


@dataclass(frozen=True, slots=True)
class LoadedBlock:
    """One verified block. ``tensors`` are the arrays that were allocated for it; ``nbytes`` is their size.

    ``tokens`` is empty where the catalog was rebuilt and the ids were not yet named again.
    """

    key: BlockHash
    parent: BlockHash
    tokens: tuple[int, ...]
    is_tail: bool
    tensors: dict[str, Any]
    nbytes: int


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
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Header:
    """A parsed header: what it says of its block, its tensors in order, and where the payload starts."""

    said: dict[str, str]
    tensors: tuple[_Tensor, ...]
    start: int

    @property
    def payload(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


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


class _Damaged(Exception):
    """A file is proven not to be what the catalog says."""


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
        _prepare_root(path)
        with _opening(path / "SCHEMA"):
            for folder in (self._tmp, self._quarantine, self._ns):
                _make_dir(folder)
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
        for path, root, key, is_tail in self._files():
            if key is None:
                self._register(catalog, path, root)
                continue
            with suppress(OSError, _Damaged), _open_file(path) as (fd, size):
                rows.append((_adopted(fd, size, root, key, is_tail), os.fstat(fd).st_mtime))
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
    ) -> Iterator[tuple[Path, BlockHash, BlockHash | None, bool]]:
        """Every file of ours: path, root, key (None: an identity) and whether it is a tail. Others are added up."""
        for folder, subfolders, names in os.walk(self._ns):
            subfolders.sort()
            links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
            for name in sorted(names) + links:
                path = Path(folder, name)
                relative = path.relative_to(self._ns).as_posix()
                if found := _FILE.fullmatch(relative):
                    yield path, bytes.fromhex(found[1]), bytes.fromhex(found[4]), found[2] == "t"
                elif found := _IDENTITY.fullmatch(relative):
                    yield path, bytes.fromhex(found[1]), None, False
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
            _remove(path)
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
            name = (tail_hash if record.is_tail else block_hash)(record.parent, record.tokens)
            if name != record.key:
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
        hold = {key for record in records for key in (record.key, record.parent)} | {commit.head}
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
        if superseded is not None:
            self._unlink([replace(_NO_ROW, key=superseded, root=commit.root)])
        return branch

    def _new_file(self, record: Record, root: BlockHash) -> _NewFile:
        row = BlockRow(
            record.key, record.parent, root, record.tokens, record.is_tail, 0, "0" * 32, len(record.tokens)
        )
        views = tuple(_bytes_of(tensor.data) for tensor in record.tensors)
        nbytes = len(_write_header(row, record.tensors)) + sum(view.nbytes for view in views)
        return _NewFile(replace(row, nbytes=nbytes), self._path(row), record.tensors, views)

    def _path(self, row: BlockRow) -> Path:
        name = row.key.hex()
        return self._ns / row.root.hex() / _FOLDERS[row.is_tail] / name[:2] / f"{name}.safetensors"

    def _lies_there(self, row: BlockRow) -> bool:
        try:
            found = os.lstat(self._path(row))
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == row.nbytes

    def _write_all(self, new: Sequence[_NewFile], commit: BranchCommit) -> list[BlockRow]:
        rows = [self._publish_or_evict(new[index:], commit) for index in range(len(new))]
        if self._durable and new:
            _sync_folder(self._ns, barrier=False)
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
        file = replace(file, row=replace(file.row, checksum=_checksum(file.views)))
        tmp = self._write_tmp([memoryview(_write_header(file.row, file.tensors)), *file.views])
        try:
            changed = self._make_dirs(file.path.parent)
            row = self._link_or_adopt(tmp, file)
            for folder in changed if self._durable else ():
                _sync_folder(folder, barrier=True)
            return row
        finally:
            tmp.unlink(missing_ok=True)

    def _link_or_adopt(self, tmp: Path, file: _NewFile) -> BlockRow:
        for _ in range(_ATTEMPTS):
            with suppress(FileExistsError):
                _link(tmp, file.path)
                return file.row
            try:
                with _open_file(file.path) as (fd, size):
                    theirs = replace(file.row, checksum=_read_header(fd, size).said.get("xxh3_128", ""))
                    _verify(fd, size, theirs)
                return theirs
            except FileNotFoundError:
                continue
            except _Damaged as damage:
                self._set_aside(file.path, str(damage))
        raise StoreError(f"{file.path} cannot be replaced: is another program writing there?")

    def _write_tmp(self, views: Sequence[memoryview]) -> Path:
        path = self._tmp / f"{process_name()}.{uuid.uuid4().hex}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        try:
            os.fchmod(fd, 0o600)
            _transfer(views, lambda batch, _: os.writev(fd, batch))
            if self._durable:
                _sync(fd, barrier=True)
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
                if _make_dir(made):
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
            with _open_file(path) as (fd, size):
                return _read_block(fd, size, row, allocate)
        except FileNotFoundError:
            self._count("miss_gone")
            self._drop(key, path)
        except _Damaged as damage:
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
            _remove(old)

    # -- audit --------------------------------------------------------------------------------------------

    def check(self, fix: bool = False) -> CheckReport:
        """Compare files and catalog both ways and verify every checksum.

        With ``fix``: rows without a file are dropped, damaged files set aside, sound files without a row
        adopted, leftovers removed, counts set right, and what is over the quota evicted. Foreign files stay.
        """
        foreign: list[Path] = []
        damaged: dict[Path, tuple[BlockHash, str]] = {}
        unknown: dict[Path, tuple[BlockRow, float]] = {}
        files = nbytes = 0
        for path, root, key, is_tail in self._files(foreign):
            if key is None:
                continue
            row = self.catalog.row(key)
            try:
                with _open_file(path) as (fd, size):
                    seen = _adopted(fd, size, root, key, is_tail)
                    _verify(fd, size, row or seen)
                    if row is None:
                        unknown[path] = (seen, os.fstat(fd).st_mtime)
                files, nbytes = files + 1, nbytes + size
            except FileNotFoundError:
                continue
            except _Damaged as damage:
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
        self._evicted(self.catalog.evict(self.catalog.total_bytes() - self.quota_bytes))

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


_NO_ROW = BlockRow(b"", b"", b"", (), True, 0, "", 0)


def _place(row: BlockRow) -> tuple[BlockHash, BlockHash, bool, int]:
    return row.root, row.parent, row.is_tail, row.ntok


# -- the folder -------------------------------------------------------------------------------------------


def _prepare_root(path: Path) -> None:
    """Make the folder, or refuse one that others can read or that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_dir(path)
        found = os.stat(path)
    except OSError as error:
        raise StoreUnreadable(f"{path} cannot be made: {error.strerror}. Set another cache_dir.") from error
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        raise StoreUnreadable(f"{path} is not a folder. Set another cache_dir.")
    if found.st_uid != os.geteuid():
        raise StoreUnreadable(
            f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}. Set another cache_dir."
        )
    if mode & 0o077 or mode & 0o700 != 0o700:
        raise StoreUnreadable(
            f"{path} has mode {mode:04o}, but what lies there is as private as the conversations: chmod 700 {path}"
        )
    if os.statvfs(path).f_flag & os.ST_RDONLY or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StoreUnreadable(f"{path} is read-only. Set another cache_dir, or None to keep nothing.")
    kind = _file_system(path)
    if kind in _REMOTE:
        raise StoreUnreadable(
            f"{path} is on {kind}, where locks and shared memory cannot be relied on. Set a cache_dir on a local disk."
        )


def _file_system(path: Path) -> str:
    """The type of the file system below ``path`` as the system calls it, "" where that cannot be told."""
    try:
        if sys.platform == "darwin":
            answer = ctypes.create_string_buffer(4096)
            if ctypes.CDLL(None).statfs(os.fsencode(path), answer) != 0:
                return ""
            return ctypes.string_at(ctypes.byref(answer, 72), 16).split(b"\0")[0].decode()
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except (OSError, ValueError, AttributeError):
        return ""
    real = os.path.realpath(path)
    over = [(len(at), kind) for at, kind in mounts if os.path.commonpath([real, at]) == at]
    return max(over, default=(0, ""), key=lambda mount: mount[0])[1]


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Let one process at a time open the store, and only one of a version that can be read."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnreadable(f"{path} cannot be opened: {error.strerror}. Set another cache_dir.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        text = os.pread(fd, 32, 0).decode(errors="replace").strip()
        if not text:
            os.pwrite(fd, f"{SCHEMA}\n".encode(), 0)
        elif not text.isdecimal():
            raise StoreUnreadable(f"{path} holds {text!r} instead of a version. Set another cache_dir.")
        elif int(text) > SCHEMA:
            raise StoreUnreadable(
                f"{path} says version {text}, newer than {SCHEMA}: upgrade agent-memory-mlx or set another cache_dir."
            )
        yield
    finally:
        os.close(fd)


def _make_dir(path: Path) -> bool:
    """Make one private folder; return whether it is new."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    path.chmod(0o700)
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _link(tmp: Path, path: Path) -> None:
    """Give ``tmp`` its final name, unless that is taken."""
    try:
        os.link(tmp, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # No hard links here. Whoever comes second replaces equal content.
        if os.path.lexists(path):
            raise FileExistsError(path) from error
        os.rename(tmp, path)


def _sync(fd: int, *, barrier: bool) -> None:
    """Bring a file to the drive; with ``barrier`` it is enough that it gets there before what follows."""
    if sys.platform == "darwin":
        with suppress(OSError):
            fcntl.fcntl(fd, _F_BARRIERFSYNC if barrier else _F_FULLFSYNC)
            return
    os.fsync(fd)


def _sync_folder(folder: Path, *, barrier: bool) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(fd, barrier=barrier)
    finally:
        os.close(fd)


# -- the file ---------------------------------------------------------------------------------------------


def _bytes_of(data: memoryview) -> memoryview:
    return data if data.format == "B" and data.ndim == 1 else data.cast("B")


def _checksum(views: Sequence[memoryview]) -> str:
    digest = xxhash.xxh3_128()
    for view in views:
        digest.update(view)
    return digest.hexdigest()


def _transfer(views: Sequence[memoryview], move: Callable[[list[memoryview], int], int]) -> int:
    """Pass all bytes through a vectored call that may move fewer; return how many it moved before the end."""
    pending = deque(view for view in views if view.nbytes)
    done = 0
    while pending:
        room = _MAX_CALL
        batch: list[memoryview] = []
        for view in itertools.islice(pending, _MAX_BUFFERS):
            batch.append(view[:room])
            room -= batch[-1].nbytes
            if room == 0:
                break
        moved = move(batch, done)
        if moved == 0:
            break
        done += moved
        while moved:
            view = pending.popleft()
            if view.nbytes > moved:
                pending.appendleft(view[moved:])
            moved -= min(moved, view.nbytes)
    return done


def _said_of(row: BlockRow) -> dict[str, str]:
    """What the header of a block says of it."""
    return {
        "schema": str(SCHEMA),
        "root": row.root.hex(),
        "key": row.key.hex(),
        "parent": row.parent.hex(),
        "ntok": str(row.ntok),
        "kind": "tail" if row.is_tail else "block",
        "xxh3_128": row.checksum,
    }


def _digest_of(said: Mapping[str, str], table: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([said, table], sort_keys=True).encode())


def _write_header(row: BlockRow, tensors: Sequence[HostTensor]) -> bytes:
    table: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.data.nbytes
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    said = {**_said_of(row), "writer": "agent-memory"}
    said["header_xxh3_128"] = _digest_of(said, table)
    text = json.dumps({"__metadata__": said, **table}, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)


@contextmanager
def _open_file(path: Path) -> Iterator[tuple[int, int]]:
    """A regular file, opened for reading, and its size in bytes; anything else in its place is damage."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _FOREIGN:
            raise _Damaged("it is not a file") from error
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _Damaged("it is not a file")
        yield fd, found.st_size
    finally:
        os.close(fd)


def _read_header(fd: int, size: int) -> _Header:
    """Parse a header as strictly as it is written. Nothing is allocated by what it says."""
    first = os.pread(fd, ALIGNMENT, 0)
    if len(first) < ALIGNMENT:
        raise _Damaged("it is shorter than a header")
    start = 8 + int.from_bytes(first[:8], "little")
    if start % ALIGNMENT or not ALIGNMENT <= start <= min(MAX_HEADER, size):
        raise _Damaged("its header has no possible length")
    text = first[8:] if start == ALIGNMENT else os.pread(fd, start - 8, 8)
    try:
        table = json.loads(text)
        said = table.pop("__metadata__")
        tensors = tuple(_tensor(name, entry) for name, entry in table.items())
        bounds = [tuple(entry["data_offsets"]) for entry in table.values()]
        digest = said.pop("header_xxh3_128")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _Damaged("its header cannot be read") from error
    ends = list(itertools.accumulate(tensor.nbytes for tensor in tensors))
    if bounds != list(zip([0, *ends], ends, strict=False)) or digest != _digest_of(said, table):
        raise _Damaged("its header contradicts itself")
    if size != start + sum(tensor.nbytes for tensor in tensors):
        raise _Damaged("it is not as long as its header says")
    return _Header(said, tensors, start)


def _tensor(name: str, entry: Mapping[str, Any]) -> _Tensor:
    shape = tuple(entry["shape"])
    if not all(type(n) is int and 0 <= n < 2**40 for n in (*shape, *entry["data_offsets"])):
        raise ValueError("a shape of whole numbers")
    nbytes = _ITEM_BYTES[entry["dtype"]]
    for n in shape:
        nbytes *= n
    return _Tensor(name, entry["dtype"], shape, nbytes)


def _check_said(header: _Header, row: BlockRow) -> None:
    for name, value in _said_of(row).items():
        if header.said.get(name) != value:
            raise _Damaged(f"its {name} is {str(header.said.get(name))[:80]!r} instead of {value!r}")


def _header_of(fd: int, size: int, row: BlockRow) -> _Header:
    """The header of a file that has the size of its row and says the same."""
    if size != row.nbytes:
        raise _Damaged(f"it has {size} bytes instead of {row.nbytes}")
    header = _read_header(fd, size)
    _check_said(header, row)
    return header


def _read_block(fd: int, size: int, row: BlockRow, allocate: Allocate) -> LoadedBlock:
    header = _header_of(fd, size, row)
    arrays: dict[str, Any] = {}
    views: list[memoryview] = []
    for tensor in header.tensors:
        arrays[tensor.name], view = allocate(tensor.dtype, tensor.shape)
        assert view.nbytes == tensor.nbytes
        views.append(view)
    moved = _transfer(views, lambda batch, done: os.preadv(fd, batch, header.start + done))
    if moved != header.payload:
        raise _Damaged("it was cut while it was read")
    if _checksum(views) != row.checksum:
        raise _Damaged("its payload does not have its checksum")
    return LoadedBlock(row.key, row.parent, row.tokens, row.is_tail, arrays, header.payload)


def _adopted(fd: int, size: int, root: BlockHash, key: BlockHash, is_tail: bool) -> BlockRow:
    """The row of a file as its header has it, without token ids; its place must agree with its header."""
    header = _read_header(fd, size)
    try:
        parent, ntok = bytes.fromhex(header.said["parent"]), int(header.said["ntok"])
        checksum = bytes.fromhex(header.said["xxh3_128"]).hex()
    except (ValueError, TypeError, KeyError) as error:
        raise _Damaged("its header cannot be read") from error
    if len(parent) != 32 or not 0 < ntok < 2**31:
        raise _Damaged("its header is not one of a block")
    row = BlockRow(key, parent, root, (), is_tail, size, checksum, ntok)
    _check_said(header, row)
    return row


def _verify(fd: int, size: int, row: BlockRow) -> None:
    """Compare a whole file with its row."""
    header = _header_of(fd, size, row)
    digest = xxhash.xxh3_128()
    piece = bytearray(_PIECE)
    at = header.start
    while moved := os.preadv(fd, [piece], at):
        digest.update(memoryview(piece)[:moved])
        at += moved
    if digest.hexdigest() != row.checksum:
        raise _Damaged("its payload does not have its checksum")
