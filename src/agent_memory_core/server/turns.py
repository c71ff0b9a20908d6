"""Runs turns for requests: bounds how many there are, watches each, and withdraws those that nobody waits for."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from agent_memory_core import (
    AgentMemoryError,
    AsyncChatStream,
    BlocksEvicted,
    Cancelled,
    ChatRequest,
    DeadlineExceeded,
    Delta,
    FirstToken,
    SessionKey,
    TurnAdmitted,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnProgress,
    TurnQueued,
    TurnReport,
)
from agent_memory_core.server.answers import Answer, PieceReader
from agent_memory_core.server.errors import LOADING, OVERLOADED, QUEUE_FULL, ApiError, from_core
from agent_memory_core.server.host import Host
from agent_memory_core.server.keeping import Keeping
from agent_memory_core.server.keys import Keys
from agent_memory_core.server.logs import log
from agent_memory_core.server.sessions import Session
from agent_memory_core.server.settings import ServerSettings

FAILURES = 3
"""So many faults one after another within `FAILING_SECONDS` are no accident."""

FAILING_SECONDS = 60.0


class Recorder(Protocol):
    """Takes what is answered."""

    async def add(self, delta: Delta) -> None:
        """A delta was read, and is not sent yet."""
        ...

    def give_up(self) -> None:
        """The turn has ended, in whatever way."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """A request for one turn, as its dialect has read it."""

    request: ChatRequest
    model: str
    """The model's name as the client wrote it."""
    served: str
    """The model's name in the manager."""
    stream: bool
    session: Session
    key: SessionKey
    """Whose turn it is; an object of this call alone, by which the engine's events are told apart."""
    context: int
    """Most tokens of prompt and answer together."""
    ignored: tuple[str, ...] = ()
    """Tools of the request that nobody here can run, by their types."""
    keep: float | None = None
    """Seconds for which the model is to be kept after it; None leaves that to the settings."""
    usage_in_stream: bool = True
    """Whether a stream ends with the usage, in the dialect where clients choose."""
    is_older: bool = False
    """Whether the client reads a call in the form that OpenAI had before tools."""
    recorder: Recorder | None = None
    """Who keeps what is answered, beside the engine."""

    @property
    def is_kept(self) -> bool:
        """Whether what is computed is there for the session's next turn."""
        return self.key.session_id is not None and not self.key.ephemeral


class Admitted(NamedTuple):
    """The turn has its place, and it is known what need not be computed."""

    prompt_tokens: int
    cached_tokens: int


Watched = TurnQueued | TurnAdmitted | TurnProgress | FirstToken


class _Watch:
    """What the engine told of one turn. Set on the event loop."""

    def __init__(self, key: SessionKey) -> None:
        self.key = key
        self.loop = asyncio.get_running_loop()
        self.queued = asyncio.Event()
        self.admitted = asyncio.Event()
        self.prompt_tokens = self.cached_tokens = self.done_tokens = 0
        self.phase = "waiting"

    def tell(self, event: Watched) -> None:
        if isinstance(event, TurnQueued):
            self.prompt_tokens = event.prompt_tokens
            self.queued.set()
        elif isinstance(event, TurnProgress):
            self.done_tokens = event.stop
        elif isinstance(event, FirstToken):
            self.phase = "answer"
        else:
            self.phase, self.done_tokens = "prompt", event.cached_tokens
            self.cached_tokens = event.cached_tokens
            self.admitted.set()


class Turn:
    """A turn under way. Whoever holds it must `close` it, which withdraws it unless it has ended."""

    def __init__(
        self, turns: Turns, call: Call, stream: AsyncChatStream, watch: _Watch, request_id: str
    ) -> None:
        self.call, self.request_id = call, request_id
        self._began = time.perf_counter()
        self._turns, self._stream, self._watch = turns, stream, watch
        self._next = asyncio.ensure_future(anext(stream))
        self._closed = False
        self._cause = "disconnect"

    async def accepted(self) -> None:
        """Wait until the engine has taken the turn, after which no fault of the request itself can show.

        Raises:
            AgentMemoryError: why it has not.
        """
        queued = asyncio.ensure_future(self._watch.queued.wait())
        try:
            await asyncio.wait({self._next, queued}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            queued.cancel()
        if self._next.done() and (error := self._next.exception()) is not None:
            raise error

    async def begun(self, seconds: float | None = None) -> bool:
        """Wait so long for the first piece of the answer, and say whether it came, or an error in its place."""
        await asyncio.wait({self._next}, timeout=seconds)
        return self._next.done()

    async def events(self, silence: float) -> AsyncIterator[Admitted | Delta | None]:
        """What happens to the turn up to its last delta; None for each ``silence`` seconds without anything.

        Raises:
            AgentMemoryError: why there is no more of the answer.
        """
        admission = asyncio.ensure_future(self._watch.admitted.wait())
        awaited: set[asyncio.Future[Any]] = {self._next, admission}
        try:
            while True:
                done, _ = await asyncio.wait(awaited, timeout=silence, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    yield None
                elif admission in done:
                    awaited.discard(admission)
                    yield Admitted(self._watch.prompt_tokens, self._watch.cached_tokens)
                else:
                    delta = self._next.result()
                    if self.call.recorder is not None:
                        await self.call.recorder.add(delta)
                    yield delta
                    if delta.report is not None:
                        return
                    awaited.discard(self._next)
                    self._next = asyncio.ensure_future(anext(self._stream))
                    awaited.add(self._next)
        finally:
            admission.cancel()

    async def answer(self) -> Answer:
        """Wait for the whole answer. Raises as `events` does."""
        answer, reader = Answer(), PieceReader()
        async for event in self.events(3600):
            if isinstance(event, Delta):
                answer.take(event, reader)
        return answer

    def progress(self) -> dict[str, Any]:
        """How far it is."""
        watch, key = self._watch, self.call.key
        return {
            "request_id": self.request_id,
            "model": self.call.model,
            "namespace": key.namespace,
            "session_id": key.session_id,
            "stream": self.call.stream,
            "seconds": round(time.perf_counter() - self._began, 3),
            "phase": watch.phase,
            "prompt_tokens": watch.prompt_tokens,
            "cached_tokens": watch.cached_tokens,
            "prompt_tokens_done": watch.done_tokens,
        }

    async def withdraw(self, cause: str) -> None:
        """Let its reader know that there will be no more of the answer."""
        self._cause = cause
        await self._stream.aclose()

    async def close(self) -> None:
        """Withdraw the turn if it has not ended, and free its place."""
        if self._closed:
            return
        self._closed = True
        if self.call.recorder is not None:
            self.call.recorder.give_up()
        await self._stream.aclose()
        self._next.cancel()
        # Before the task can be cancelled again, which would leave the place taken for ever.
        self._turns.ended(self)
        await asyncio.wait({self._next})
        # Looked at, because asyncio complains of what nobody looked at.
        error = None if self._next.cancelled() else self._next.exception()
        if isinstance(error, DeadlineExceeded):
            self._turns.cancelled["deadline"] += 1
        elif self.report is None and (error is None or isinstance(error, Cancelled | StopAsyncIteration)):
            self._turns.cancelled[self._cause] += 1

    @property
    def report(self) -> TurnReport | None:
        """What it did, once it has ended."""
        return self._stream.report


class Turns:
    """The turns of one server."""

    def __init__(self, host: Host, settings: ServerSettings, keys: Keys) -> None:
        self._host, self._keys = host, keys
        self.loaded = self.draining = False
        self._settings = settings
        self._watches: dict[int, _Watch] = {}
        self._running: dict[Turn, None] = {}
        self._places = 0
        self._by_namespace: Counter[str] = Counter()
        self.cancelled = Counter({"disconnect": 0, "deadline": 0, "admin": 0, "shutdown": 0})
        """Turns that were withdrawn, by what for."""
        self._seconds: deque[float] = deque([2.0], maxlen=64)
        self._idle = asyncio.Event()
        self._idle.set()
        self.keeping = Keeping()
        self._failures: deque[float] = deque(maxlen=FAILURES)
        """When the last faults were, as far as no turn has succeeded since."""
        self._was_queued = False
        """Whether a turn came since the last fault."""
        self._stop_observing = host.observe(self._observe)

    def running(self) -> list[Turn]:
        """Those that run or wait, the oldest first."""
        return list(self._running)

    def __len__(self) -> int:
        return len(self._running) + self._places

    @property
    def is_full(self) -> bool:
        """Whether further turns are told to come back later."""
        return len(self) >= self._settings.max_in_flight

    @property
    def is_failing(self) -> bool:
        """Whether all turns failed that came lately: then the next one may as well."""
        failures = list(self._failures)
        return len(failures) == FAILURES and time.monotonic() - failures[0] < FAILING_SECONDS

    async def begin(self, call: Call, request_id: str = "") -> Turn:
        """Start a turn that the engine takes.

        Raises:
            ApiError: there is no room for it, or the request cannot be answered.
        """
        self._check_room(call.key.namespace)
        watch = self._watches[id(call.key)] = _Watch(call.key)
        turn: Turn | None = None
        try:
            stream = await self._host.engine(call.served).achat(call.request, call.key, stream=True)
            turn = Turn(self, call, stream, watch, request_id)
            self._began(turn)
            await turn.accepted()
        except BaseException as error:
            if turn is None:
                self._watches.pop(id(call.key), None)
            else:
                await turn.close()
            if isinstance(error, AgentMemoryError):
                raise from_core(error) from error
            raise
        return turn

    def _check_room(self, namespace: str) -> None:
        self.check_loaded()
        most = self._keys.max_in_flight(namespace) or self._settings.max_in_flight_per_key
        full = self.is_full
        if full or self._by_namespace[namespace] >= most:
            whose = "The server has" if full else "This key has"
            raise ApiError(
                QUEUE_FULL,
                f"{whose} as many turns in flight as there may be: ask again later.",
                retry_after=statistics.median(self._seconds),
            )

    def check_loaded(self) -> None:
        """Check that the engine runs and goes on running.

        Raises:
            ApiError: it does not yet, or not much longer.
        """
        if self._host.is_changing:
            raise ApiError(LOADING, "The model is being changed: ask again soon.", retry_after=5)
        if self.draining:
            raise ApiError(OVERLOADED, "The server is shutting down: ask again soon.", retry_after=5)
        if not self.loaded:
            raise ApiError(LOADING, "The model is being loaded: ask again soon.", retry_after=5)

    def _began(self, turn: Turn) -> None:
        self._running[turn] = None
        self._by_namespace[turn.call.key.namespace] += 1
        self._idle.clear()

    def ended(self, turn: Turn) -> None:
        """Free a turn's place."""
        self._watches.pop(id(turn.call.key), None)
        self._running.pop(turn, None)
        if turn.report is not None:
            self._seconds.append(turn.report.total_seconds)
        self._by_namespace[turn.call.key.namespace] -= 1
        self.keeping.ended(turn.call.served, turn.call.keep)
        self._check_idle()

    @contextmanager
    def place(self, namespace: str) -> Iterator[None]:
        """A place among the turns for what runs some without a `Call`; a server that stops waits for it.

        Raises:
            ApiError: there is no room for it.
        """
        self._check_room(namespace)
        self._places += 1
        self._by_namespace[namespace] += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._places -= 1
            self._by_namespace[namespace] -= 1
            self._check_idle()

    def _check_idle(self) -> None:
        if not len(self):
            self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Take no more turns, wait so long for those in flight, then withdraw the rest."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d turns were withdrawn, because the server stops", len(self))
            for turn in list(self._running):
                await turn.withdraw("shutdown")

    def close(self) -> None:
        """Stop watching the memory."""
        self._stop_observing()

    def _observe(self, event: TurnEvent | BlocksEvicted) -> None:
        """Runs on the engine's thread."""
        if isinstance(event, TurnFailed):
            # One fault fails all turns in flight, and is one.
            if self._was_queued:
                self._failures.append(time.monotonic())
            self._was_queued = False
        elif isinstance(event, TurnFinished):
            self._failures.clear()
        elif isinstance(event, Watched):
            self._was_queued |= isinstance(event, TurnQueued)
            watch = self._watches.get(id(event.turn.key))
            if watch is not None and watch.key is event.turn.key and not watch.loop.is_closed():
                watch.loop.call_soon_threadsafe(watch.tell, event)
