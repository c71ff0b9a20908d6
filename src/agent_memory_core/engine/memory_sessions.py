"""What an `AgentMemory` can be told of its sessions, besides running their turns."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

from agent_memory_core.config import EngineConfig
from agent_memory_core.engine.session_control import SessionControl
from agent_memory_core.engine.thread import EngineThread
from agent_memory_core.errors import InvalidRequest, StoreError
from agent_memory_core.messages import (
    BranchInfo,
    SessionInfo,
    SessionKey,
    Transcript,
    validate_namespace,
    validate_session_id,
)
from agent_memory_core.storage.audit import CheckReport
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.chat_history import ChatHistory
from agent_memory_core.storage.mirror import NoMirror
from agent_memory_core.storage.portable import export_session, import_session
from agent_memory_core.storage.sealing import PLAIN, Cipher

if TYPE_CHECKING:
    from agent_memory_core.engine.engine import Engine
    from agent_memory_core.storage.cold.tier import ColdTier

T = TypeVar("T")


class MemorySessions(ABC):
    """The sessions of an `AgentMemory`, which sets what is declared here."""

    config: EngineConfig
    _lock: threading.Lock
    _store: BlockStore | None
    _thread: EngineThread
    _sessions: SessionControl

    def sessions(
        self, namespace: str | None = None, *, limit: int | None = None, offset: int = 0
    ) -> list[SessionInfo]:
        """The sessions of a namespace, or of every namespace; the most recently used first.

        Args:
            namespace: whose sessions; None is every namespace.
            limit: how many at most; None is all.
            offset: how many of the first ones to leave out.

        Waits for turns that are being written, but not for the engine, which goes on meanwhile.
        """
        self._thread.check_open()
        if offset < 0 or (limit is not None and limit < 0):
            raise InvalidRequest(f"limit={limit!r} and offset={offset!r} are not valid: numbers from 0 on.")
        return self._sessions.list(namespace)[offset : None if limit is None else offset + limit]

    def branches(self, session_id: str, namespace: str = "default") -> list[BranchInfo]:
        """The branches of a session on disk, oldest first.

        Raises:
            SessionNotFound: there is no such session on disk.
        """
        self._thread.check_open()
        return list(self._sessions.branches((namespace, session_id)))

    def transcript(
        self, session_id: str, namespace: str = "default", branch_id: int | None = None
    ) -> Transcript:
        """The messages of a session, read back from its tokens: its history, for whom it was lost. Loads the model.

        Args:
            session_id: the session.
            namespace: whose session it is.
            branch_id: one of `branches`; None is the branch that was used last.

        Raises:
            SessionNotFound: there is no such session, or none that this model has read.
        """
        self._thread.check_open()
        if self.config.cache_dir is not None:
            self._thread.flush()
            latest = max(self.branches(session_id, namespace), key=lambda branch: branch.last_use)
            branch_id = latest.branch_id if branch_id is None else branch_id
        owner = (namespace, session_id)
        return self._call(lambda engine: engine.transcript(owner, branch_id))

    def fork(self, session_id: str, new_session_id: str, namespace: str = "default") -> None:
        """Begin a new session with everything another one knows; nothing is copied.

        Raises:
            SessionNotFound: there is no such session.
            InvalidRequest: an id cannot be used, or the new one is taken.
        """
        validate_session_id(session_id)
        validate_session_id(new_session_id)
        validate_namespace(namespace)
        self._thread.check_open()
        self._look(SessionKey(session_id, namespace=namespace))
        self._sessions.fork((namespace, session_id), new_session_id)

    def pin(self, session_id: str, namespace: str = "default", *, pinned: bool = True) -> None:
        """Keep a session on disk whatever the budget, or no longer.

        Raises:
            SessionNotFound: there is no such session on disk.
        """
        self._thread.check_open()
        self._sessions.pin((namespace, session_id), pinned=pinned)

    def flush(self) -> None:
        """Wait until every turn that has ended is on disk, if there is one."""
        self._thread.check_open()
        self._thread.flush()

    def release(self, session_id: str, namespace: str = "default") -> int:
        """Drop from memory what is on disk and no other session needs; return how many bytes that freed.

        The next turn of the session reads it back. Turns in flight lose nothing.
        """
        self._thread.check_open()
        return self._sessions.release((namespace, session_id))

    def forget(self, session_id: str, namespace: str = "default") -> bool:
        """Delete a session from memory and disk at once; what others share stays. Say whether there was one.

        A turn of it that is in flight meanwhile is not saved.
        """
        self._thread.check_open()
        return self._sessions.forget((namespace, session_id))

    def forget_namespace(self, namespace: str) -> int:
        """Delete all sessions of a namespace, pinned ones too, and its key; return how many sessions there were."""
        validate_namespace(namespace)
        count = sum(self.forget(info.session_id, namespace) for info in self.sessions(namespace))
        self._sessions.forget_rest(namespace)
        return count

    def history(self, session_id: str, namespace: str = "default") -> ChatHistory | None:
        """The text of a session, for whom no application keeps it; None where there is no cache directory."""
        return self._sessions.history((namespace, session_id))

    def cipher(self, namespace: str = "default") -> Cipher:
        """What seals texts that belong to a namespace, as its store is sealed; as they are where nothing is."""
        store = self._open_store()
        return PLAIN if store is None else store.keys.of(namespace)

    def export_session(self, session_id: str, file: BinaryIO, namespace: str = "default") -> int:
        """Write a session to a stream that another machine can import; return how many records it has.

        Nothing in it is encrypted.

        Raises:
            SessionNotFound: there is no such session on disk.
        """
        self._thread.check_open()
        self._look(SessionKey(session_id, namespace=namespace))
        self._thread.flush()
        return export_session(self._required_store(), namespace, session_id, file)

    def export_prompt_cache(
        self,
        session_id: str,
        path: str | Path,
        namespace: str = "default",
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Write what was computed of a session as a prompt cache of mlx-lm; return its tokens. Loads the model.

        Args:
            session_id: the session.
            path: a file that ends in .safetensors.
            namespace: whose session it is.
            metadata: words for the file's header, besides ``model`` and ``token_ids``.

        Raises:
            SessionNotFound: there is no such session, or none that this model has read.
            InvalidRequest: the path has another ending.
            StoreError: what is stored is gone, or the file cannot be written.
        """
        file = Path(path)
        if file.suffix != ".safetensors":
            raise InvalidRequest(f"path={str(path)!r} is not valid: a prompt cache ends in .safetensors.")
        # Imported here because it imports MLX and mlx-lm.
        from agent_memory_core.engine import prompt_cache

        self._thread.check_open()
        self._thread.flush()
        wanted = self._call(lambda engine: prompt_cache.find(engine, (namespace, session_id)))
        if self.config.cache_dir is not None:
            prompt_cache.read(self._opened_store(), wanted)
        return self._call(lambda engine: prompt_cache.write(engine, wanted, file, metadata or {}))

    def import_session(self, session_id: str, file: BinaryIO, namespace: str = "default") -> int:
        """Add to a session what `export_session` wrote; return the tokens of its longest branch.

        A model with the same weights goes on from there. To every other one it is as if nothing was imported. What is
        read is believed: import only what you exported.

        Raises:
            InvalidRequest: it is damaged or cut, or an id cannot be used.
            StoreError: there is no store, or it cannot take it.
        """
        validate_session_id(session_id)
        validate_namespace(namespace)
        self._thread.check_open()
        return import_session(self._required_store(), namespace, session_id, file)

    def prune(
        self, older_than: float | timedelta, namespace: str | None = None, *, dry_run: bool = False
    ) -> list[SessionInfo]:
        """Delete the sessions that nobody has used for a time, and return them; with ``dry_run`` only return them.

        Pinned sessions stay, and those of which a turn is in flight.

        Args:
            older_than: seconds, or a `datetime.timedelta`, since the last use.
            namespace: whose sessions; None is every namespace.

        Raises:
            InvalidRequest: ``older_than`` is negative.
        """
        seconds = older_than.total_seconds() if isinstance(older_than, timedelta) else older_than
        if not seconds >= 0:
            raise InvalidRequest(f"older_than={older_than!r} is not valid: seconds or a timedelta from 0 on.")
        latest, in_use = time.time() - seconds, self._in_use()
        old = [
            info
            for info in self.sessions(namespace)
            if info.last_use < latest and not info.pinned and (info.namespace, info.session_id) not in in_use
        ]
        return old if dry_run else [info for info in old if self.forget(info.session_id, info.namespace)]

    def _in_use(self) -> set[tuple[str, str]]:
        if not self._thread.started:
            return set()
        return self._thread.call(lambda engine: engine.sessions_in_use()).result()

    def check(self, *, fix: bool = False) -> CheckReport:
        """Compare every file of the store with the catalog and its checksum; with ``fix``, repair what can be.

        Nothing sound is deleted, however much is stored. Reads every file, so it takes as long as that takes.

        Raises:
            StoreError: there is no cache directory, or it cannot be used.
        """
        self._thread.check_open()
        return self._required_store().check(fix)

    @property
    def cold(self) -> ColdTier:
        """The cold tier of the store: what is uploaded, and what can be done with it by hand.

        Raises:
            StoreError: there is none, because ``cold_url`` or ``cache_dir`` is not set, or nothing may be written.
        """
        self._thread.check_open()
        mirror = self._required_store().mirror
        if isinstance(mirror, NoMirror):
            raise StoreError("there is no cold tier: set cold_url, for example to s3://bucket/folder.")
        return cast("ColdTier", mirror)

    def _look(self, key: SessionKey) -> None:
        """Fetch what the cold tier has of a session and the store has not."""
        if key.session_id is None or self.config.cold_url is None:
            return
        store = self._open_store()
        if store is not None and store.mirror.must_look(key.namespace, key.session_id):
            self._thread.flush()
            store.mirror.look(key.namespace, key.session_id)

    async def _look_apart(self, key: SessionKey) -> None:
        """`_look` on another thread, for coroutines: the event loop goes on."""
        if key.session_id is None or self.config.cold_url is None:
            return
        if self._store is None or self._store.mirror.must_look(key.namespace, key.session_id):
            await asyncio.to_thread(self._look, key)

    @abstractmethod
    def _call(self, function: Callable[[Engine], T]) -> T:
        """Ask the engine something for which the model is loaded."""

    def _open_store(self) -> BlockStore | None:
        config = self.config
        with self._lock:
            if self._store is None and config.cache_dir is not None:
                self._store = BlockStore.of_config(config.cache_dir, config)
            return self._store

    def _required_store(self) -> BlockStore:
        store = self._open_store()
        if store is None:
            raise StoreError("there is no store: this memory has no cache_dir.")
        return store

    def _opened_store(self) -> BlockStore:
        store = self._open_store()
        assert store is not None, "only called where there is a cache_dir"
        return store
