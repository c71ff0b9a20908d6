"""What a store tells of its turns to whoever keeps copies of them elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from agent_memory_core.config import EngineConfig

if TYPE_CHECKING:
    from agent_memory_core.storage.block_store import BlockStore


class StoreMirror(Protocol):
    """Told of what changes in a store."""

    def committing(self, namespace: str, session_id: str) -> None:
        """A session is about to change: part of the transaction that changes it."""
        ...

    def committed(self, namespace: str, session_id: str) -> None:
        """A session has changed. It must not block."""
        ...

    def forgetting(self, namespace: str, session_id: str) -> None:
        """A session is about to be forgotten."""
        ...

    def forgetting_namespace(self, namespace: str) -> None:
        """A namespace whose sessions are forgotten is about to be forgotten as a whole."""
        ...

    def must_look(self, namespace: str, session_id: str) -> bool:
        """Whether `look` would do anything. It must not block."""
        ...

    def look(self, namespace: str, session_id: str) -> None:
        """Before a turn of a session: bring what is kept of it elsewhere into the store, if it is newer."""
        ...

    def acknowledge(self, namespace: str, session_id: str, done: Callable[[str], None]) -> None:
        """Call ``done`` once when a committed turn is as safe as it is to be, with what is wrong or an empty text."""
        ...

    def close(self) -> None:
        """Nothing changes any more."""
        ...


class NoMirror:
    """Nothing is kept elsewhere: a turn on this disk is as safe as it is to be."""

    def committing(self, namespace: str, session_id: str) -> None:
        """Nothing is noted."""

    def committed(self, namespace: str, session_id: str) -> None:
        """Nobody is told."""

    def forgetting(self, namespace: str, session_id: str) -> None:
        """Nobody is told."""

    def forgetting_namespace(self, namespace: str) -> None:
        """Nobody is told."""

    def must_look(self, namespace: str, session_id: str) -> bool:
        """There is nowhere to look."""
        return False

    def look(self, namespace: str, session_id: str) -> None:
        """Nothing is found."""

    def acknowledge(self, namespace: str, session_id: str, done: Callable[[str], None]) -> None:
        """At once."""
        done("")

    def close(self) -> None:
        """Nothing is open."""


def mirrored(store: BlockStore, config: EngineConfig) -> BlockStore:
    """The store, with a cold tier where the settings name one.

    Raises:
        InvalidSetting: ``cold_url`` cannot be used.
    """
    if config.cold_url is not None and not store.read_only:
        # An optional extra brings what this imports.
        from agent_memory_core.storage.cold.tier import ColdTier

        store.mirror = ColdTier.of_config(store, config)
    return store
