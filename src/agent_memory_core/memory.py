"""AgentMemory: what users and adapters hold.

    with AgentMemory() as memory:
        history = [{"role": "user", "content": "My name is Ada."}]
        answer = memory.chat(history, session="ada")

The caller's history is the truth and is given whole at every turn; what of it is already known is found by its
token ids and not computed again. A session id says who owns the memory on disk.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from agent_memory_core.backend import require_mlx
from agent_memory_core.config import EngineConfig
from agent_memory_core.engine.events import Observer, Observers
from agent_memory_core.engine.expiry import Expiry
from agent_memory_core.engine.requests import Conversation, to_request
from agent_memory_core.engine.residency import Residency, enter, enter_apart, staying
from agent_memory_core.engine.session_control import (
    MemorySessionControl,
    SessionControl,
    StoredSessionControl,
)
from agent_memory_core.engine.sinks import AsyncQueueSink, QueueSink
from agent_memory_core.engine.stats import Stats, StoreStats
from agent_memory_core.engine.streams import AsyncChatStream, ChatStream
from agent_memory_core.engine.thread import EngineThread
from agent_memory_core.errors import InvalidRequest, StoreError
from agent_memory_core.messages import (
    BranchInfo,
    ChatRequest,
    ChatResult,
    SessionInfo,
    SessionKey,
    Transcript,
    TurnReport,
    to_key,
    validate_namespace,
    validate_session_id,
    whole_answer,
)
from agent_memory_core.models.folder import configured_context, configured_reasoning
from agent_memory_core.models.profile import settings_for
from agent_memory_core.storage.audit import CheckReport
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.chat_history import ChatHistory
from agent_memory_core.storage.sealing import PLAIN, Cipher

if TYPE_CHECKING:
    from agent_memory_core.engine.engine import Engine
    from agent_memory_core.engine.results import Results
    from agent_memory_core.models.parity import ParityResult

Owner = SessionKey | str | None

T = TypeVar("T")


class AgentMemory:
    """A model whose sessions outlive the call, the process and the machine's restarts.

    Settings are those of `EngineConfig`; what is not given comes from ``AGENT_MEMORY_*`` variables, the model's
    profile, then defaults. Nothing is loaded before the first turn.

    Raises:
        InvalidSetting: a setting is unknown or outside its range.
    """

    _shared: dict[EngineConfig, AgentMemory] = {}  # noqa: RUF012
    _shared_lock = threading.Lock()

    def __init__(self, config: EngineConfig | None = None, **settings: Any) -> None:
        self.config = settings_for(settings) if config is None else config.replace(**settings)
        self._lock = threading.Lock()
        self._store: BlockStore | None = None
        self._expiry: Expiry[AgentMemory] | None = None
        self._observers = Observers()
        self.residency: Residency | None = None
        """Who is asked before each turn whether the model may be loaded, see `Residency`; None: it may always be."""
        self._thread = EngineThread(self._build)
        self._sessions: SessionControl = MemorySessionControl(self._thread)
        if self.config.cache_dir is not None:
            self._sessions = StoredSessionControl(self._thread, self._opened_store)
        _memories.add(self)

    @classmethod
    def shared(cls, **settings: Any) -> AgentMemory:
        """The one instance of this process for these settings: one engine per model and store."""
        config = settings_for(settings)
        with cls._shared_lock:
            memory = cls._shared.get(config)
            if memory is None or memory.closed:
                before, memory = memory, cls(config)
                memory.residency = before.residency if before is not None else None
                cls._shared[config] = memory
            return memory

    # -- turns --------------------------------------------------------------------------------------------

    @overload
    def chat(
        self, request: Conversation, session: Owner = None, *, stream: Literal[False] = False, **sampling: Any
    ) -> ChatResult: ...
    @overload
    def chat(
        self, request: Conversation, session: Owner = None, *, stream: Literal[True], **sampling: Any
    ) -> ChatStream: ...

    def chat(
        self, request: Conversation, session: Owner = None, *, stream: bool = False, **sampling: Any
    ) -> ChatResult | ChatStream:
        """Run one turn. ``sampling`` are fields of `SamplingParams`, for a request that does not carry its own.

        Raises:
            InvalidRequest: the messages, the session id or a sampling value cannot be used.
            PromptTooLong: the prompt can never fit.
            ModelError: the model cannot be loaded.
            StoreError: the cache directory cannot be used, or cannot take the turn.
            DeadlineExceeded: the request's timeout is over.
            EngineStopped: the engine was closed.
        """
        asked = self._request(request, sampling)
        key, sink = to_key(session), QueueSink(asked.timeout)
        handle = self._thread.submit(asked, key, sink, ended=enter(self.residency, self))
        answer = ChatStream(sink, handle)
        return answer if stream else whole_answer(list(answer))

    @overload
    async def achat(
        self, request: Conversation, session: Owner = None, *, stream: Literal[False] = False, **sampling: Any
    ) -> ChatResult: ...
    @overload
    async def achat(
        self, request: Conversation, session: Owner = None, *, stream: Literal[True], **sampling: Any
    ) -> AsyncChatStream: ...

    async def achat(
        self, request: Conversation, session: Owner = None, *, stream: bool = False, **sampling: Any
    ) -> ChatResult | AsyncChatStream:
        """`chat` for coroutines: nothing blocks the event loop and no thread waits."""
        asked = self._request(request, sampling)
        key, sink = to_key(session), AsyncQueueSink(asked.timeout)
        handle = self._thread.submit(asked, key, sink, ended=await enter_apart(self.residency, self))
        answer = AsyncChatStream(sink, handle)
        return answer if stream else whole_answer([delta async for delta in answer])

    def prewarm(self, request: Conversation, session: Owner = None) -> TurnReport:
        """Evaluate a prompt's messages and tools without answering, so that a turn that begins with them is warm."""
        asked, key, sink = self._request(request, {}), to_key(session), QueueSink()
        handle = self._thread.submit(asked, key, sink, ended=enter(self.residency, self), prewarm=True)
        return whole_answer(list(ChatStream(sink, handle))).report

    async def aprewarm(self, request: Conversation, session: Owner = None) -> TurnReport:
        """`prewarm` for coroutines: nothing blocks the event loop and no thread waits."""
        asked, key, sink = self._request(request, {}), to_key(session), AsyncQueueSink()
        handle = self._thread.submit(
            asked, key, sink, ended=await enter_apart(self.residency, self), prewarm=True
        )
        return whole_answer([delta async for delta in AsyncChatStream(sink, handle)]).report

    # -- sessions -----------------------------------------------------------------------------------------

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
        store = self._open_store()
        if store is None:
            raise StoreError("there is no store to check: this memory has no cache_dir.")
        return store.check(fix)

    # -- the engine ---------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Counters of the engine, of memory and of the store; only the store's while no model is loaded.

        Does not wait for the engine, however long its work takes.
        """
        self._thread.check_open()
        stats = self._thread.look(lambda engine: engine.stats()) or Stats(model=self.config.model)
        stats = dataclasses.replace(stats, step_seconds=self._thread.step_seconds)
        store = self._open_store()
        return stats if store is None else dataclasses.replace(stats, store=StoreStats(**store.stats()))

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell ``observer`` of everything that happens to turns, see `engine.events`; call the result to stop that.

        It is called on the engine's thread and must not block. What it raises is logged and harms no turn.
        """
        return self._observers.add(observer)

    def count_tokens(self, request: Conversation) -> int:
        """How many prompt tokens a request comes to. Loads the model."""
        asked = self._request(request, {})
        with staying(self.residency, self):
            return len(self._thread.ask(lambda template: template.encode(asked).token_ids))

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Loads the model."""
        with staying(self.residency, self):
            return self._thread.ask(lambda template: template.tokenizer.tokenize(text))

    @property
    def model_name(self) -> str:
        """The model as it was asked for."""
        return str(self.config.model)

    @property
    def stated_context_length(self) -> int | None:
        """`context_length` without loading anything; None where the model is not on this machine yet."""
        stated = configured_context(self.config.model, self.config.context_length)
        return min(stated, self.config.context_length or stated) if stated is not None else None

    @property
    def stated_reasoning(self) -> bool | None:
        """Whether the model thinks before it answers, by what its files say; None where they are not here yet."""
        return configured_reasoning(self.config.model)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together. Loads the model where nothing else can tell."""
        stated = self.stated_context_length
        if stated is not None:
            return stated
        return self._call(lambda engine: engine.limits.context_length)

    def verify(self, blocks: int = 8) -> ParityResult:
        """Compare the model's logits: in a batch and alone, resumed at ``blocks`` block boundaries and uninterrupted.

        Loads the model. The result is recorded in the store and counts from the next start.
        """
        return self._call(lambda engine: engine.parity.verify(engine.config.block_tokens, blocks))

    def forget_verified(self) -> ParityResult | None:
        """Drop what is recorded about batching and resuming this model; return it, None if there was nothing.

        Loads the model. From the next start on the model is treated as one that was never compared.

        Raises:
            StoreError: the store cannot be written.
        """
        return self._call(lambda engine: engine.parity.forget())

    def load(self) -> None:
        """Load the model now rather than at the first turn."""
        self._call(lambda engine: None)

    def unload(self, timeout: float | None = None, *, cancel: bool = False) -> bool:
        """Free the model once no turn is in flight, and say whether that was done. The next turn loads it again.

        What was queued is written first. Sessions on disk stay warm; without a ``cache_dir`` they are lost.

        Args:
            timeout: seconds to wait for the turns in flight; None waits as long as they take, 0 frees an idle model.
            cancel: withdraw the turns that are in flight by then, whose readers get `Cancelled`, and free it.
        """
        return self._thread.unload(timeout, cancel=cancel)

    @property
    def in_flight(self) -> int:
        """How many turns, and questions to the tokenizer, have not ended."""
        return self._thread.in_flight

    @property
    def weights_bytes(self) -> int:
        """What the model's weights take of the device's memory; 0 while it is not loaded."""
        return self._thread.weights_bytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or the model could not be loaded."""
        return self._thread.closed

    def close(self) -> None:
        """End turns in flight, write what is queued, free the model."""
        with self._lock:
            expiry, self._expiry = self._expiry, None
        if expiry is not None:
            expiry.stop()
        self._thread.close()
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, function: Callable[[Engine], T]) -> T:
        """Ask the engine something for which the model is loaded."""
        with staying(self.residency, self):
            return self._thread.call(function).result()

    def _build(self, results: Results) -> Engine:
        # The store first: a directory that cannot be used is known before gigabytes are loaded.
        store = self._open_store()
        require_mlx()
        # Imported here because it imports MLX, mlx-lm and transformers, which takes two seconds: listing sessions or
        # printing help must not wait for what only a loaded model needs.
        from agent_memory_core.engine.building import build_engine

        engine = build_engine(self.config, store, results, self._observers)
        self._expire_sessions()
        return engine

    def _expire_sessions(self) -> None:
        """Begin to delete old sessions, if that is wanted."""
        days = self.config.session_ttl_days
        if days is None or self.config.cache_dir is None:
            return
        age = timedelta(days=days)
        with self._lock:
            self._expiry = self._expiry or Expiry(
                self, lambda memory: None if memory.closed else len(memory.prune(age))
            )

    def _open_store(self) -> BlockStore | None:
        config = self.config
        with self._lock:
            if self._store is None and config.cache_dir is not None:
                self._store = BlockStore.of_config(config.cache_dir, config)
            return self._store

    def _opened_store(self) -> BlockStore:
        store = self._open_store()
        assert store is not None, "only called where there is a cache_dir"
        return store

    def _request(self, request: Conversation, sampling: Mapping[str, Any]) -> ChatRequest:
        return to_request(self.config.model, request, sampling)


_memories: weakref.WeakSet[AgentMemory] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """A lock may be held by a thread that the child does not have, and the parent's files are not the child's."""
    AgentMemory._shared_lock = threading.Lock()
    for memory in list(_memories):
        memory._lock = threading.Lock()
        memory._store = None


os.register_at_fork(after_in_child=_after_fork_in_child)
