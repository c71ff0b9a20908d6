"""Where things lie in a bucket, and how they are sealed there.

    v1/<plain or sealed>/<namespace>/heads/<sha256 of the session id>      see `head`
                                     blocks/<hh>/<key and checksum>        one record, see `portable.packed`
                                     agents/<sha256 of the agent id>       what was said to an agent, see `texts`
                                     key                                   where sealed: the namespace's key

Every namespace is a prefix, so a bucket's own rules can grant, count and expire it by itself; it is percent-encoded.
The name of a record's object holds the checksum of its bytes. So an object never changes, two machines whose numbers
differ in the last bit do not write over each other, and a head says exactly which bytes it means.

An encrypted store seals all that it uploads with a key of the bucket's namespace. That key is made by who comes first
and lies in the bucket, sealed with the master key: every machine that has the master key opens it, and once it is
deleted nobody opens anything of the namespace. What is plain and what is sealed lie apart and are never mixed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import quote, unquote

from agent_memory_core.errors import StoreError
from agent_memory_core.storage.cold.head import HeadRecord
from agent_memory_core.storage.cold.objects import Buffer, ColdFailure, Objects
from agent_memory_core.storage.sealing import KEY_BYTES, Locked, NameCipher, seal, unseal

_VERSION = "v1"


class Names(Protocol):
    """The paths of one namespace, and what seals its objects."""

    prefix: str
    """where all of it lies, with a slash at the end"""

    def seal(self, path: str, parts: Sequence[Buffer]) -> Sequence[Buffer]:
        """What to write at a path."""
        ...

    def open(self, path: str, data: memoryview) -> memoryview:
        """The inverse of `seal`.

        Raises:
            Locked: it is not what was sealed for that path.
        """
        ...

    def block(self, record: HeadRecord) -> str:
        """Where a record lies."""
        ...


def head_path(names: Names, session_id: str) -> str:
    """Where the head of a session lies."""
    return text_path(names, "heads", session_id)


def text_path(names: Names, kind: str, name: str) -> str:
    """Where a text of some kind lies."""
    return f"{names.prefix}{kind}/{hashlib.sha256(name.encode()).hexdigest()}"


def heads_prefix(names: Names) -> str:
    """Below which all heads of a namespace lie."""
    return f"{names.prefix}heads/"


def blocks_prefix(names: Names) -> str:
    """Below which all records of a namespace lie."""
    return f"{names.prefix}blocks/"


class PlainNames:
    """A namespace that is not sealed."""

    def __init__(self, namespace: str) -> None:
        self.prefix = f"{_VERSION}/plain/{_encoded(namespace)}/"

    def seal(self, path: str, parts: Sequence[Buffer]) -> Sequence[Buffer]:
        """The same bytes."""
        return parts

    def open(self, path: str, data: memoryview) -> memoryview:
        """The same bytes."""
        return data

    def block(self, record: HeadRecord) -> str:
        """Key and checksum in hex."""
        name = record.key.hex() + record.checksum
        return f"{self.prefix}blocks/{name[:2]}/{name}"


class SealedNames:
    """A namespace that is sealed with AES-256-GCM, its records' names with AES.

    Args:
        namespace: its name.
        key: of the namespace.
    """

    def __init__(self, namespace: str, key: bytes) -> None:
        self.prefix = f"{_VERSION}/sealed/{_encoded(namespace)}/"
        self._key = key
        self._names = NameCipher(key)

    def seal(self, path: str, parts: Sequence[Buffer]) -> Sequence[Buffer]:
        """Nonce, content and tag; the path is authenticated with it."""
        return [seal(self._key, path.encode(), b"".join(parts))]

    def open(self, path: str, data: memoryview) -> memoryview:
        """What was sealed for that path."""
        return memoryview(unseal(self._key, path.encode(), bytes(data)))

    def block(self, record: HeadRecord) -> str:
        """Key and checksum, hidden: who knows either could try which tokens they are of."""
        name = self._names.hide(record.key + bytes.fromhex(record.checksum)).hex()
        return f"{self.prefix}blocks/{name[:2]}/{name}"


class Namespaces:
    """The namespaces of one bucket.

    Args:
        objects: the bucket.
        master: the master key; None where nothing is sealed.
    """

    def __init__(self, objects: Objects, master: bytes | None) -> None:
        self._objects = objects
        self._master = master
        self._known: dict[str, Names] = {}

    async def of(self, namespace: str) -> Names:
        """The names of one, for whoever is about to write there: a key is made where there is none.

        Raises:
            StoreError: another master key has sealed it.
            ColdFailure: its key cannot be read.
        """
        found = await self.find(namespace)
        if found is None:
            assert self._master is not None
            path = self._key_path(namespace)
            await self._objects.put_new(path, [seal(self._master, path.encode(), os.urandom(KEY_BYTES))])
            # Somebody else may have been the first.
            found = await self.find(namespace)
        if found is None:
            raise ColdFailure(f"the key of namespace {namespace!r} is being deleted.")
        return found

    async def find(self, namespace: str) -> Names | None:
        """The names of one, for whoever reads; None where nothing can be, because there is no key.

        Raises:
            StoreError, ColdFailure: as `of` does.
        """
        if namespace not in self._known:
            if self._master is None:
                self._known[namespace] = PlainNames(namespace)
            elif (key := await self._key(namespace, self._master)) is not None:
                self._known[namespace] = SealedNames(namespace, key)
        return self._known.get(namespace)

    def forgotten(self, namespace: str) -> str:
        """Where all of a namespace lies that is about to be deleted; its key is another one from now on."""
        self._known.pop(namespace, None)
        return self._prefix(namespace)

    def _prefix(self, namespace: str) -> str:
        return f"{_VERSION}/{'plain' if self._master is None else 'sealed'}/{_encoded(namespace)}/"

    async def listed(self) -> list[str]:
        """All that there are, of those that are sealed as this store is."""
        prefix = f"{_VERSION}/{'plain' if self._master is None else 'sealed'}/"
        return sorted(unquote(name) for name in await self._objects.folders(prefix))

    def _key_path(self, namespace: str) -> str:
        return f"{self._prefix(namespace)}key"

    async def _key(self, namespace: str, master: bytes) -> bytes | None:
        path = self._key_path(namespace)
        found = await self._objects.get(path)
        if found is None:
            return None
        try:
            return unseal(master, path.encode(), bytes(found.data))
        except Locked:
            raise StoreError(
                f"namespace {namespace!r} of the object store is sealed with another master key: give this machine "
                f"the same one, or another cold_url."
            ) from None


def _encoded(namespace: str) -> str:
    # Neither "." nor ".." may be a part of a path.
    return quote(namespace, safe="").replace(".", "%2E")
