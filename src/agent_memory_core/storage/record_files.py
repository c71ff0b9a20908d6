"""The files of a store: where each record lies, how it gets its bytes and its name, and how damage is put aside.

    <root>/  0700   SCHEMA   catalog.db   tmp/   quarantine/   processes/
      ns/<root hash>/identity.json   blocks/<hh>/<block hash>.safetensors
                                     and in the same way tails/ windows/ token_tails/

A file is written under a temporary name and then linked to its own, so a name never stands for a part of a file.
KV can be turned back into text, so files are private to their owner.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from agent_memory_core.blocks.block import RECORD_KINDS, BlockHash, RecordKind
from agent_memory_core.errors import StoreError, StoreFull
from agent_memory_core.storage.block_file import (
    Damaged,
    bytes_of,
    checksum_of,
    content_of,
    describe,
    open_file,
    transfer,
    verify,
    write_header,
)
from agent_memory_core.storage.folder import (
    entries,
    is_hidden,
    link,
    make_dir,
    own_dir,
    remove,
    sync,
    sync_folder,
)
from agent_memory_core.storage.presence import Presence
from agent_memory_core.storage.record import HostTensor, Record, StoredRecord
from agent_memory_core.storage.sealing import PLAIN, Cipher, Locked, Unsealed

log = logging.getLogger("agent_memory")

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
"""Errors of the system that say that the volume, or the user's share of it, is full."""

MAX_QUARANTINED = 8
"""Most damaged files that are kept to be looked at."""

_FOLDERS: dict[RecordKind, str] = {kind: f"{kind}s" for kind in RECORD_KINDS}
_KINDS = {folder: kind for kind, folder in _FOLDERS.items()}
_RECORD = re.compile(
    rf"([0-9a-f]{{64}})/({'|'.join(_KINDS)})/([0-9a-f]{{2}})/(\3[0-9a-f]{{62}})\.safetensors"
)
_IDENTITY = re.compile(r"([0-9a-f]{64})/identity\.json")
_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of ours in the folder, as its path describes it."""

    path: Path
    root: BlockHash
    key: BlockHash | None
    """None: the file with the identity of the root"""
    kind: RecordKind


class RecordFiles:
    """The files below one folder. They know nothing of the catalog.

    Args:
        path: the folder of the store, which exists.
        durable: whether what is written is on the drive when a method returns, so that it outlives a power cut.
        read_only: whether nothing may be written; then nothing is made that is missing.
        unopened: what checks these files without opening them.
    """

    presence: Presence
    """shows to others that this opening of the store is not over"""

    def __init__(
        self, path: Path, durable: bool, read_only: bool = False, unopened: Unsealed = PLAIN
    ) -> None:
        self.path = path
        self.unopened = unopened
        self._durable = durable
        self._tmp, self._quarantine, self._ns = path / "tmp", path / "quarantine", path / "ns"
        self.presence = Presence(path / "processes")
        if not read_only:
            self.make_folders()
            self.presence.show()

    def make_folders(self) -> None:
        """Make the folders that every store has, where they are missing.

        Raises:
            OSError: one cannot be made.
        """
        for folder in (self._tmp, self._quarantine, self._ns):
            own_dir(folder)

    # -- where they are -----------------------------------------------------------------------------------

    def path_of(self, record: StoredRecord) -> Path:
        """Where the file of a record lies, or would lie."""
        return self.place(record.root, record.key, record.kind)

    def place(self, root: BlockHash, key: BlockHash, kind: RecordKind) -> Path:
        """Where the file of a record lies, by what its row says of it."""
        name = key.hex()
        return self._ns / root.hex() / _FOLDERS[kind] / name[:2] / f"{name}.safetensors"

    def identity_of(self, root: BlockHash) -> Path:
        """Where the file with the identity of a root lies."""
        return self._ns / root.hex() / "identity.json"

    def in_part(self, part: int) -> Iterator[FoundFile]:
        """Every file of a record whose key begins with the byte ``part``; folders that are empty are deleted."""
        for folder in self._ns.glob(f"*/*/{part:02x}"):
            if folder.is_symlink() or not folder.is_dir():
                continue
            with suppress(OSError):
                folder.rmdir()
                continue
            for path in entries(folder):
                if match := _RECORD.fullmatch(path.relative_to(self._ns).as_posix()):
                    yield FoundFile(path, bytes.fromhex(match[1]), bytes.fromhex(match[4]), _KINDS[match[2]])

    def has(self, record: StoredRecord) -> bool:
        """Whether a file of the record's size lies in its place."""
        try:
            found = os.lstat(self.path_of(record))
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == record.nbytes

    def walk(self, foreign: list[Path] | None = None) -> Iterator[FoundFile]:
        """Every file of ours; the paths of others are added to ``foreign``, but not those of hidden ones."""
        for folder, subfolders, names in os.walk(self._ns):
            subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
            links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
            for name in sorted(name for name in names if not is_hidden(name)) + links:
                path = Path(folder, name)
                relative = path.relative_to(self._ns).as_posix()
                if match := _RECORD.fullmatch(relative):
                    key, kind = bytes.fromhex(match[4]), _KINDS[match[2]]
                    yield FoundFile(path, bytes.fromhex(match[1]), key, kind)
                elif match := _IDENTITY.fullmatch(relative):
                    yield FoundFile(path, bytes.fromhex(match[1]), None, "block")
                elif foreign is not None:
                    foreign.append(path)

    # -- writing ------------------------------------------------------------------------------------------

    def write_identity(self, root: BlockHash, identity: Mapping[str, str], namespace: str) -> None:
        """Write down once what a root was hashed from.

        Raises:
            StoreError: it cannot be written.
        """
        path = self.identity_of(root)
        text = json.dumps({"namespace": namespace, "identity": dict(identity)}, indent=1, sort_keys=True)
        try:
            if not path.exists():
                self._make_dirs(path.parent)
                os.replace(self._write_tmp([memoryview(text.encode())]), path)
        except OSError as error:
            kind = StoreFull if error.errno in NO_SPACE else StoreError
            raise kind(f"{path} cannot be written: {error.strerror}.") from error

    def write(self, stored: StoredRecord, record: Record[HostTensor], cipher: Cipher = PLAIN) -> StoredRecord:
        """Write a record's file and return its description with the checksum of what lies there now.

        A file that is there already and sound is kept; a damaged one is put aside, and one that ``cipher`` does not
        open is deleted.

        Raises:
            OSError: the file cannot be written.
            StoreError: the place cannot be taken.
        """
        table = ((name, tensor.dtype, tensor.shape) for name, tensor in record.tensors.items())
        plain = [bytes_of(tensor.data) for tensor in record.tensors.values()]
        sealed, views = cipher.seal_payload(content_of(stored, table), plain)
        stored = replace(stored, checksum=checksum_of(views))
        path = self.path_of(stored)
        header = write_header(stored, record.tensors, cipher, sealed)
        tmp = self._write_tmp([memoryview(header), *views])
        try:
            changed = self._make_dirs(path.parent)
            stored = self._link_or_keep(tmp, path, stored, cipher)
            for folder in changed if self._durable else ():
                sync_folder(folder, barrier=True)
            return stored
        finally:
            tmp.unlink(missing_ok=True)

    def try_to_write(self) -> None:
        """Write a file and remove it.

        Raises:
            OSError: that cannot be done.
        """
        self._write_tmp([memoryview(b"can it be written?")]).unlink()

    def flush(self) -> None:
        """Bring everything that was written to the drive, if this store is durable."""
        if self._durable:
            sync_folder(self._ns, barrier=False)

    def _link_or_keep(self, tmp: Path, path: Path, stored: StoredRecord, cipher: Cipher) -> StoredRecord:
        for _ in range(_ATTEMPTS):
            with suppress(FileExistsError):
                try:
                    link(tmp, path)
                except FileNotFoundError:
                    if not tmp.exists():
                        raise
                    # Another process deleted the folder, which was empty.
                    self._make_dirs(path.parent)
                    continue
                return stored
            try:
                with open_file(path) as (fd, size):
                    theirs = describe(fd, size, stored.root, stored.key, stored.kind, cipher)
                    kept = replace(stored, checksum=theirs.checksum)
                    verify(fd, size, kept, cipher)
                return kept
            except FileNotFoundError:
                continue
            except Locked:
                path.unlink(missing_ok=True)
            except Damaged as damage:
                self.set_aside(path, str(damage))
        raise StoreError(f"{path} cannot be replaced: is another program writing there?")

    def _write_tmp(self, views: Sequence[memoryview]) -> Path:
        path = self._tmp / f"{self.presence.name}.{uuid.uuid4().hex}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except (FileNotFoundError, NotADirectoryError):
            # Somebody deleted it while this process runs.
            self.make_folders()
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
        """Make a folder below ``ns/``; return the folders that get a new entry by a file in it."""
        for _ in range(_ATTEMPTS):
            # Another process deletes folders that are empty, also the one in which the next is being made.
            with suppress(FileNotFoundError):
                return self._made_dirs(folder)
        return self._made_dirs(folder)

    def _made_dirs(self, folder: Path) -> list[Path]:
        changed = [folder]
        if not folder.is_dir():
            below = folder.relative_to(self._ns)
            for made in (self._ns, *(self._ns / part for part in reversed(below.parents)), folder):
                if make_dir(made):
                    changed.append(made.parent)
        return changed

    # -- removing -----------------------------------------------------------------------------------------

    def delete(self, record: StoredRecord) -> None:
        """Delete the file of a record, if it is there, and the folder that it leaves empty."""
        self.delete_at(self.path_of(record))

    def delete_at(self, path: Path) -> None:
        """Delete a file of ours, if it is there, and the folder that it leaves empty."""
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        with suppress(OSError):
            path.parent.rmdir()

    def set_aside(self, path: Path, reason: str) -> None:
        """Move a damaged file to the quarantine, which keeps the newest few."""
        log.warning("%s is damaged and was set aside: %s", path, reason)
        own_dir(self._quarantine)
        with suppress(FileNotFoundError):
            os.rename(path, self._quarantine / f"{time.time_ns()}.{uuid.uuid4().hex[:8]}.{path.name}")
        for old in entries(self._quarantine)[:-MAX_QUARANTINED]:
            remove(old)

    def other_bytes(self) -> int:
        """Bytes in the folder that no record has: of the catalog and its log, of the quarantine, and the like."""
        apart = {self._tmp, self._ns, self.presence.folder}
        return sum(_size(path) for path in entries(self.path) if path not in apart)

    def quarantined(self) -> int:
        """How many files lie in the quarantine."""
        return len(entries(self._quarantine))

    def empty_quarantine(self) -> None:
        """Delete all files in the quarantine."""
        for path in entries(self._quarantine):
            remove(path)

    def temporary(self) -> int:
        """How many files are being written, or were left by a process that was killed."""
        return len(entries(self._tmp))

    def remove_leftovers(self) -> None:
        """Delete the temporary files of processes that have ended.

        The age of a file says nothing: a machine that was asleep wakes up in the middle of writing an old one.
        """
        for path in entries(self._tmp):
            if not self.presence.is_alive(path.name.rpartition(".")[0]) and not path.is_dir():
                path.unlink(missing_ok=True)
        self.presence.remove_the_dead()


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; what disappears meanwhile has none."""
    with suppress(OSError):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            return sum(_size(inner) for inner in path.iterdir())
        return found.st_size
    return 0
