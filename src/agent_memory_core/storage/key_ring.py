"""The keys of a store: one for each namespace, made at its first use, sealed by the master key in a file of its own.

    keys/store.json                          the key of the names of all records, which also proves the master key
    keys/<sha256 of the namespace>.json      the key of a namespace

A key's file is written under a temporary name, brought to the drive and linked to its own, so there is never a part of
one. Deleting it forgets its namespace: nothing that the key has sealed can be opened again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from agent_memory_core.blocks.block import BlockHash
from agent_memory_core.config import Encryption
from agent_memory_core.errors import StoreError, StoreUnreadable
from agent_memory_core.storage.folder import (
    FORMAT,
    SEALED_FORMAT,
    link,
    own_dir,
    put_aside,
    read_small,
    sync,
    sync_folder,
)
from agent_memory_core.storage.master_key import read_master_key, source_name
from agent_memory_core.storage.sealing import (
    KEY_BYTES,
    PLAIN,
    SEALED,
    Cipher,
    Locked,
    NameCipher,
    NamespaceCipher,
    Unsealed,
    seal,
    unseal,
)

_ATTEMPTS = 3


class Keys(Protocol):
    """What one store is sealed with, or left open with."""

    version: int
    """version of such a store"""
    unopened: Unsealed
    """what checks files without opening them"""

    def unlock(self, is_new: bool) -> None:
        """Prove, before anything is done in the store, that what it holds can be opened.

        Raises:
            StoreUnreadable: it cannot; nothing was changed.
        """
        ...

    def work_as(self, process: str) -> None:
        """Name temporary files after this opening of the store, so that nobody takes them for leftovers."""
        ...

    def of(self, namespace: str) -> Cipher:
        """What seals and opens the content of a namespace."""
        ...

    def hide(self, name: BlockHash) -> BlockHash:
        """The name of a record, or of what it follows, as the store has it."""
        ...

    def show(self, name: BlockHash) -> BlockHash:
        """The inverse of `hide`."""
        ...

    def forget(self, namespace: str) -> None:
        """Delete the key of a namespace, if there is one.

        Raises:
            OSError: it cannot be deleted.
        """
        ...


class NoKeys:
    """A store that is not encrypted."""

    version = FORMAT
    unopened = PLAIN

    def unlock(self, is_new: bool) -> None:
        """Nothing is locked."""

    def work_as(self, process: str) -> None:
        """Nothing is written."""

    def of(self, namespace: str) -> Cipher:
        """Leaves all as it is."""
        return PLAIN

    def hide(self, name: BlockHash) -> BlockHash:
        """The same name."""
        return name

    def show(self, name: BlockHash) -> BlockHash:
        """The same name."""
        return name

    def forget(self, namespace: str) -> None:
        """There is no key."""


class KeyRing:
    """The keys of one encrypted store. Any thread may call it.

    Args:
        path: the folder of the store.
        encryption: where the master key comes from.

    Raises:
        InvalidSetting: there is no master key, or it has not its form.
    """

    version = SEALED_FORMAT
    unopened = SEALED

    def __init__(self, path: Path, encryption: Encryption) -> None:
        self._path = path
        self._folder = path / "keys"
        self._source = source_name(encryption)
        self._master = read_master_key(encryption)
        self._lock = threading.RLock()
        self._process = "opening"
        self._known: dict[Path, tuple[tuple[int, ...], bytes]] = {}

    def unlock(self, is_new: bool) -> None:
        """Open the store's own key, which proves the master key; make it for a new store."""
        path, said = self._folder / "store.json", "store"
        try:
            if is_new and not path.exists():
                self._make(path, said)
            self._names = NameCipher(self._read(path, said))
        except FileNotFoundError as error:
            raise StoreUnreadable(
                f"{path} is missing, without which nothing of the store can be opened: bring keys/ back, or set "
                f"another cache_dir."
            ) from error
        except OSError as error:
            raise StoreUnreadable(
                f"{path} cannot be used: {error.strerror}. Set another cache_dir."
            ) from error
        except Locked:
            raise StoreUnreadable(
                f"{self._source} is not the key that {self._path} is encrypted with: give it the right one, or set "
                f"another cache_dir. Nothing was changed."
            ) from None

    def work_as(self, process: str) -> None:
        """Temporary files have this name from now on; those before were made while nobody else opens the store."""
        self._process = process

    def of(self, namespace: str) -> Cipher:
        """Seals with the namespace's key, which is made when something is sealed first."""
        return NamespaceCipher(namespace, partial(self._key, namespace))

    def hide(self, name: BlockHash) -> BlockHash:
        """A sealed name, of 32 bytes, too."""
        return self._names.hide(name)

    def show(self, name: BlockHash) -> BlockHash:
        """The name that was sealed."""
        return self._names.show(name)

    def forget(self, namespace: str) -> None:
        """Delete the file with the namespace's key, and those that were put aside."""
        path = self._file(namespace)
        with self._lock:
            self._known.pop(path, None)
            for file in (path, *self._folder.glob(f".{path.name}.*")):
                file.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                sync_folder(self._folder, barrier=False)

    def _file(self, namespace: str) -> Path:
        return self._folder / f"{hashlib.sha256(namespace.encode()).hexdigest()}.json"

    def _key(self, namespace: str, make: bool) -> bytes | None:
        """A namespace's key. Where it cannot be opened it is None, or with ``make`` a new one."""
        path, said = self._file(namespace), f"namespace {namespace}"
        with self._lock:
            if not make or not namespace:
                try:
                    return self._read(path, said)
                except (FileNotFoundError, NotADirectoryError, Locked):
                    return None
            with _as_store_error(path):
                return self._read_or_make(path, said)

    def _read_or_make(self, path: Path, said: str) -> bytes:
        for _ in range(_ATTEMPTS):
            try:
                return self._read(path, said)
            except FileNotFoundError:
                self._make(path, said)
            except Locked:
                put_aside(path)
        raise StoreError(f"{path} cannot be made: is another program writing there?")

    def _read(self, path: Path, said: str) -> bytes:
        """A key from its file, which another process may have deleted or made anew.

        Raises:
            OSError: it cannot be read.
            Locked: the master key has not sealed it as this.
        """
        found = os.lstat(path)
        identity = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
        known = self._known.get(path)
        if known is None or known[0] != identity:
            known = self._known[path] = identity, self._opened(read_small(path), said)
        return known[1]

    def _opened(self, text: str, said: str) -> bytes:
        try:
            key = unseal(self._master, _about(said), bytes.fromhex(json.loads(text)["key"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise Locked("it is no file of a key") from error
        assert len(key) == KEY_BYTES
        return key

    def _make(self, path: Path, said: str) -> None:
        """Write a new key, unless somebody else does so first."""
        tmp = self._path / "tmp" / f"{self._process}.{uuid.uuid4().hex}"
        for folder in (tmp.parent, self._folder):
            own_dir(folder)
        sealed = seal(self._master, _about(said), os.urandom(KEY_BYTES))
        text = json.dumps({"version": 1, "of": said, "key": sealed.hex()})
        try:
            _write(tmp, text.encode())
            with suppress(FileExistsError):
                link(tmp, path)
            # What is sealed by a key must not outlive it, whatever the store's durability is.
            sync_folder(self._folder, barrier=False)
        finally:
            tmp.unlink(missing_ok=True)


def keys_for(path: Path, encryption: Encryption) -> Keys:
    """The keys of the store in a folder, as the setting says.

    Raises:
        InvalidSetting: see `KeyRing`.
    """
    return NoKeys() if encryption == "off" else KeyRing(path, encryption)


def _about(said: str) -> bytes:
    return f"agent-memory key 1\n{said}".encode()


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb", buffering=0) as file:
        file.write(content)
        sync(fd, barrier=False)


@contextmanager
def _as_store_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"the key in {path} cannot be used: {error.strerror}.") from error
