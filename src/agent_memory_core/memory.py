"""AgentMemory: what users and adapters hold.

    with AgentMemory() as memory:
        history = [{"role": "user", "content": "My name is Ada."}]
        answer = memory.chat(history, session="ada")

The caller's history is the truth and is given whole at every turn; what of it is already known is found by its
token ids and not computed again. A session id says who owns the memory on disk.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from agent_memory_core.backend import require_mlx
from agent_memory_core.closing import AsyncClosing, Closing
from agent_memory_core.config import EngineConfig
from agent_memory_core.engine.async_sessions import AsyncSessions
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
from agent_memory_core.messages import (
    ChatRequest,
    ChatResult,
    SessionKey,
    TurnReport,
    to_key,
    whole_answer,
)
from agent_memory_core.models.folder import configured_context, configured_reasoning, find_local_model
from agent_memory_core.models.profile import settings_for
from agent_memory_core.storage.block_store import BlockStore

if TYPE_CHECKING:
    from agent_memory_core.engine.engine import Engine
    from agent_memory_core.engine.results import Results
    from agent_memory_core.models.parity import ParityResult

Owner = SessionKey | str | None

T = TypeVar("T")


class AgentMemory(AsyncSessions, Closing, AsyncClosing):
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
        self._thread = EngineThread(self._build, self.config.max_waiting)
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
            QueueFull: as many turns wait as ``max_waiting`` allows.
            DeadlineExceeded: the request's timeout is over.
            EngineStopped: the engine was closed.
        """
        asked = self._request(request, sampling)
        key, sink = to_key(session), QueueSink(asked.timeout)
        self._look(key)
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
        await self._look_apart(key)
        handle = self._thread.submit(asked, key, sink, ended=await enter_apart(self.residency, self))
        answer = AsyncChatStream(sink, handle)
        return answer if stream else whole_answer([delta async for delta in answer])

    def prewarm(self, request: Conversation, session: Owner = None) -> TurnReport:
        """Evaluate a prompt's messages and tools without answering, so that a turn that begins with them is warm."""
        asked, key, sink = self._request(request, {}), to_key(session), QueueSink()
        self._look(key)
        handle = self._thread.submit(asked, key, sink, ended=enter(self.residency, self), prewarm=True)
        return whole_answer(list(ChatStream(sink, handle))).report

    async def aprewarm(self, request: Conversation, session: Owner = None) -> TurnReport:
        """`prewarm` for coroutines: nothing blocks the event loop and no thread waits."""
        asked, key, sink = self._request(request, {}), to_key(session), AsyncQueueSink()
        await self._look_apart(key)
        handle = self._thread.submit(
            asked, key, sink, ended=await enter_apart(self.residency, self), prewarm=True
        )
        return whole_answer([delta async for delta in AsyncChatStream(sink, handle)]).report

    # -- the engine ---------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Counters of the engine, of memory and of the store; only the store's while no model is loaded.

        Does not wait for the engine, however long its work takes.
        """
        self._thread.check_open()
        stats = self._thread.look(lambda engine: engine.stats()) or Stats(model=self.config.model)
        stats = dataclasses.replace(stats, step_seconds=self.step_seconds)
        store = self._open_store()
        return stats if store is None else dataclasses.replace(stats, store=StoreStats(**store.stats()))

    @property
    def step_seconds(self) -> float:
        """How long the engine's round in progress has taken; 0 while it waits for something to do. Waits for nobody."""
        return self._thread.step_seconds

    @property
    def save_error(self) -> str | None:
        """Why turns cannot be saved now: the disk is full, cannot be written, or does not answer. None where they can.

        Turns are answered all the same. It waits for nobody; while it says something, it is tried now and then whether
        they could be saved again.
        """
        return self._thread.look(lambda engine: engine.disk.trouble)

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

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included. Loads the model.

        Raises:
            InvalidRequest: the model has no such token.
        """
        with staying(self.residency, self):
            return self._thread.ask(lambda template: template.tokenizer.decode(token_ids))

    def render(self, request: Conversation) -> str:
        """The prompt that the model's chat template makes of a conversation. Loads the model."""
        asked = self._request(request, {})
        with staying(self.residency, self):
            return self._thread.ask(lambda template: template.readable(asked))

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

    # -- for coroutines: the same on another thread, so that the event loop goes on -----------------------

    async def astats(self) -> Stats:
        """`stats` for coroutines."""
        return await asyncio.to_thread(self.stats)

    async def acount_tokens(self, request: Conversation) -> int:
        """`count_tokens` for coroutines."""
        return await asyncio.to_thread(self.count_tokens, request)

    async def aencode(self, text: str) -> list[int]:
        """`encode` for coroutines."""
        return await asyncio.to_thread(self.encode, text)

    async def adecode(self, token_ids: Sequence[int]) -> str:
        """`decode` for coroutines."""
        return await asyncio.to_thread(self.decode, token_ids)

    async def arender(self, request: Conversation) -> str:
        """`render` for coroutines."""
        return await asyncio.to_thread(self.render, request)

    async def averify(self, blocks: int = 8) -> ParityResult:
        """`verify` for coroutines."""
        return await asyncio.to_thread(self.verify, blocks)

    async def aforget_verified(self) -> ParityResult | None:
        """`forget_verified` for coroutines."""
        return await asyncio.to_thread(self.forget_verified)

    async def aload(self) -> None:
        """`load` for coroutines."""
        await asyncio.to_thread(self.load)

    async def aunload(self, timeout: float | None = None, *, cancel: bool = False) -> bool:
        """`unload` for coroutines."""
        return await asyncio.to_thread(self.unload, timeout, cancel=cancel)

    async def aclose(self) -> None:
        """`close` for coroutines."""
        await asyncio.to_thread(self.close)

    def _call(self, function: Callable[[Engine], T]) -> T:
        """Ask the engine something for which the model is loaded."""
        with staying(self.residency, self):
            return self._thread.call(function).result()

    def _build(self, results: Results) -> Engine:
        # The folders first: one that cannot be used is known before gigabytes are loaded.
        store = self._open_store()
        find_local_model(self.config.model)
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
