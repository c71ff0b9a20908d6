"""What can be done with sessions besides running turns: list, release, fork, pin, forget.

With a disk the catalog answers, on the caller's thread. The caller waits there until turns that have ended are
written, and the engine goes on meanwhile; only what is in memory is changed on the engine's thread, between two steps.
Without a disk everything is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from agent_memory_core.engine.thread import EngineThread
from agent_memory_core.errors import SessionNotFound
from agent_memory_core.messages import BranchInfo, SessionInfo
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.chat_history import ChatHistory

Owner = tuple[str, str]
"""Namespace and session id."""


class SessionControl(Protocol):
    """What can be done with sessions. Any thread may call it."""

    def list(self, namespace: str | None) -> list[SessionInfo]:
        """The sessions of a namespace, or of all."""
        ...

    def branches(self, owner: Owner) -> Sequence[BranchInfo]:
        """The branches of a session on disk, oldest first.

        Raises:
            SessionNotFound: there is no such session on disk.
        """
        ...

    def release(self, owner: Owner) -> int:
        """Drop from memory what is on disk and only this session needs; return how many bytes that freed."""
        ...

    def fork(self, owner: Owner, new_session_id: str) -> None:
        """Begin a new session with everything another one knows.

        Raises:
            SessionNotFound: there is no such session.
            InvalidRequest: the new id is taken.
        """
        ...

    def pin(self, owner: Owner, *, pinned: bool) -> None:
        """Keep a session on disk whatever the budget, or no longer.

        Raises:
            SessionNotFound: there is no such session on disk.
        """
        ...

    def forget(self, owner: Owner) -> bool:
        """Delete a session, and say whether there was one."""
        ...

    def forget_rest(self, namespace: str) -> None:
        """Delete what is left of a namespace whose sessions are forgotten, and the key that it was sealed with."""
        ...

    def history(self, owner: Owner) -> ChatHistory | None:
        """The text of a session, kept for whom no application keeps it; None where nothing is kept."""
        ...


class StoredSessionControl:
    """Sessions on disk, whether or not an engine is running."""

    def __init__(self, thread: EngineThread, open_store: Callable[[], BlockStore]) -> None:
        self._thread = thread
        self._open_store = open_store

    def list(self, namespace: str | None) -> list[SessionInfo]:
        """The sessions of a namespace, or of all; the most recently used first."""
        self._thread.flush()
        return self._open_store().catalog.branches.sessions(namespace)

    def branches(self, owner: Owner) -> Sequence[BranchInfo]:
        """The branches of a session, oldest first."""
        rows = self._open_store().catalog.branches.of_session(*owner)
        if not rows:
            raise SessionNotFound(f"there is no session {owner[1]!r} in namespace {owner[0]!r}.")
        return [
            BranchInfo(row.branch_id, row.tokens, row.prompt_tokens, row.lane, row.created, row.last_use)
            for row in rows
        ]

    def release(self, owner: Owner) -> int:
        """Drop from memory what is on disk and only this session needs; return how many bytes that freed."""
        if not self._thread.started:
            return 0
        self._thread.flush()
        return self._thread.call(lambda engine: engine.release(owner)).result()

    def fork(self, owner: Owner, new_session_id: str) -> None:
        """Begin a new session with everything another one knows; nothing is copied."""
        self._thread.flush()
        store = self._open_store()
        with store.catalog.transaction():
            store.mirror.committing(owner[0], new_session_id)
            store.catalog.branches.fork(*owner, new_session_id)
        store.mirror.committed(owner[0], new_session_id)

    def pin(self, owner: Owner, *, pinned: bool) -> None:
        """Keep a session on disk whatever the budget, or no longer."""
        self._thread.flush()
        self._open_store().catalog.branches.pin(*owner, pinned)

    def forget(self, owner: Owner) -> bool:
        """Delete a session from memory and disk, and say whether there was one."""
        in_memory = self._forget_in_memory(owner)
        self._thread.flush()
        store = self._open_store()
        on_disk = store.forget(*owner)
        # What the command line keeps of it in plain text.
        ChatHistory(store.path, *owner).delete()
        # A turn that came meanwhile found the session still on disk: it must not bring it back.
        return self._forget_in_memory(owner) or in_memory or on_disk

    def forget_rest(self, namespace: str) -> None:
        """Delete records that no session reached any more, and the key of the namespace."""
        store = self._open_store()
        store.mirror.forgetting_namespace(namespace)
        store.forget_namespace(namespace)

    def history(self, owner: Owner) -> ChatHistory:
        """The text of a session, sealed as the store is."""
        return self._open_store().history(*owner)

    def _forget_in_memory(self, owner: Owner) -> bool:
        if not self._thread.started:
            return False
        return self._thread.call(lambda engine: engine.forget(owner)).result()


class MemorySessionControl:
    """Sessions that live as long as the engine."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread

    def list(self, namespace: str | None) -> list[SessionInfo]:
        """The sessions of a namespace, or of all."""
        if not self._thread.started:
            return []
        return self._thread.call(lambda engine: engine.sessions.infos(namespace, engine.loaded.name)).result()

    def branches(self, owner: Owner) -> Sequence[BranchInfo]:
        """Refused: there is no disk to look at."""
        raise _not_on_disk(owner)

    def release(self, owner: Owner) -> int:
        """Nothing: what is dropped here would be gone."""
        return 0

    def fork(self, owner: Owner, new_session_id: str) -> None:
        """Begin a new session with everything another one knows; nothing is copied."""
        if not self._thread.started:
            raise _not_on_disk(owner)
        self._thread.call(
            lambda engine: engine.sessions.fork(engine.intake.root(owner[0]), owner, new_session_id)
        ).result()

    def pin(self, owner: Owner, *, pinned: bool) -> None:
        """Refused: there is no disk to keep it on."""
        raise _not_on_disk(owner)

    def forget(self, owner: Owner) -> bool:
        """Delete a session from memory, and say whether there was one."""
        if not self._thread.started:
            return False
        return self._thread.call(lambda engine: engine.forget(owner)).result()

    def forget_rest(self, namespace: str) -> None:
        """Nothing is left."""

    def history(self, owner: Owner) -> None:
        """Nothing is kept."""


def _not_on_disk(owner: Owner) -> SessionNotFound:
    return SessionNotFound(f"session {owner[1]!r} is not on disk: this memory has no cache_dir.")
