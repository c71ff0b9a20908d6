"""Texts that belong to a namespace besides its sessions, such as what was said to an agent: small, and replaced whole.

    v1/<plain or sealed>/<namespace>/<kind>/<sha256 of the name>

They are sealed as heads are, and like heads replaced by compare-and-swap. A sweep leaves them alone; they go with their
namespace.
"""

from __future__ import annotations

from agent_memory_core.storage.cold.names import Namespaces, text_path
from agent_memory_core.storage.cold.objects import ColdFailure, Objects
from agent_memory_core.storage.sealing import Locked


class Texts:
    """The texts of one bucket. Its methods run on one event loop.

    Args:
        objects: the bucket.
        namespaces: of it.
    """

    def __init__(self, objects: Objects, namespaces: Namespaces) -> None:
        self._objects = objects
        self._namespaces = namespaces

    async def read(self, namespace: str, kind: str, name: str) -> tuple[bytes, str] | None:
        """A text and its e_tag; None if there is none.

        Raises:
            ColdFailure: it cannot be read now, or was not sealed for that name.
        """
        names = await self._namespaces.find(namespace)
        if names is None:
            return None
        path = text_path(names, kind, name)
        found = await self._objects.get(path)
        if found is None:
            return None
        try:
            return bytes(names.open(path, found.data)), found.e_tag
        except Locked as error:
            raise ColdFailure(f"{path} in the object store cannot be opened: {error}.") from error

    async def write(self, namespace: str, kind: str, name: str, text: bytes, e_tag: str | None) -> bool:
        """Write a text, if the one that is there has that e_tag still, or with None if there is none; say whether.

        Raises:
            ColdFailure: it cannot be written now.
        """
        names = await self._namespaces.of(namespace)
        path = text_path(names, kind, name)
        return await self._objects.swap(path, b"".join(names.seal(path, [text])), e_tag) is not None
