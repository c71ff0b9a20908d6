"""One thread owns MLX: callers put jobs in, deltas come out through their sinks.

MLX's streams and lazy arrays belong to the thread that made them, so the engine is built, stepped and closed on
one thread of its own. The thread sleeps while nothing can be done; a job, or blocks that finished loading,
wake it.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from agent_memory_core.engine.engine import Engine
from agent_memory_core.engine.turn import OutputSink
from agent_memory_core.errors import AgentMemoryError, Cancelled, EngineStopped
from agent_memory_core.messages import ChatRequest, Delta, SessionKey

log = logging.getLogger("agent_memory")

T = TypeVar("T")


class TurnHandle:
    """A turn under way, as its caller holds it."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self.seq_id: int | None = None

    def cancel(self) -> None:
        """Withdraw the turn; nothing happens if it has ended. May be called from any thread."""
        self._thread.post(self._cancel)

    def _cancel(self, engine: Engine) -> None:
        if self.seq_id is not None:
            engine.cancel(self.seq_id)


class EngineThread:
    """Starts an engine on first use and runs it until `close`."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._build = build
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._reason: AgentMemoryError = EngineStopped("this engine was closed: open a new AgentMemory.")
        self._closed = False
        _open.add(self)

    @property
    def started(self) -> bool:
        """Whether the engine was ever asked for."""
        return self._thread is not None

    @property
    def closed(self) -> bool:
        """Whether it takes no more turns."""
        return self._closed

    def submit(
        self, request: ChatRequest, key: SessionKey, sink: OutputSink, *, prewarm: bool = False
    ) -> TurnHandle:
        """Queue a turn. What is wrong with it reaches the sink.

        Raises:
            EngineStopped: the engine was closed.
        """
        handle, arrived = TurnHandle(self), time.perf_counter()

        def job(engine: Engine) -> None:
            try:
                handle.seq_id = engine.submit(request, key, sink, prewarm=prewarm, arrived=arrived)
            except AgentMemoryError as error:
                sink.fail(error)

        self._put(_Job(job, sink.fail))
        return handle

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Run a function on the engine's thread between two steps.

        Raises:
            EngineStopped: the engine was closed.
        """
        future: Future[T] = Future()

        def job(engine: Engine) -> None:
            try:
                result = function(engine)
            except AgentMemoryError as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._put(_Job(job, future.set_exception))
        return future

    def post(self, job: Callable[[Engine], None]) -> None:
        """Like `call`, with nobody waiting; ignored once the engine is closed."""
        if self._thread is not None and not self._closed:
            self._inbox.put(_Job(job, lambda error: None))

    def close(self) -> None:
        """Stop taking turns, end those in flight with `EngineStopped`, write what is queued, end the thread."""
        with self._lock:
            already, self._closed = self._closed, True
        if already or self._thread is None:
            return
        self._inbox.put(None)
        self._thread.join()

    def _put(self, job: _Job) -> None:
        with self._lock:
            if self._closed:
                raise self._reason
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="agent-memory-engine", daemon=True)
                self._thread.start()
            self._inbox.put(job)

    def _run(self) -> None:
        try:
            engine = self._build()
        except AgentMemoryError as error:
            self._refuse(error)
            return
        except Exception as error:
            log.exception("the engine could not be built")
            self._refuse(EngineStopped(f"the engine could not be built: {error!r}"))
            return
        engine.on_load = lambda: self._inbox.put(_Job(lambda _: None, lambda error: None))
        try:
            self._serve(engine)
        finally:
            self._end(engine)

    def _serve(self, engine: Engine) -> None:
        more = False
        while self._take_jobs(engine, wait=not more):
            try:
                more = engine.step()
            except Exception as error:
                # The outermost loop: one fault must not end the thread and leave every caller waiting.
                log.exception("the engine met a fault; the turns in flight are given up")
                engine.fail_all(EngineStopped(f"the engine met a fault and gave this turn up: {error!r}"))
                more = False

    def _take_jobs(self, engine: Engine, *, wait: bool) -> bool:
        """Run queued jobs; False means stop."""
        while True:
            try:
                job = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if job is None:
                return False
            try:
                job.run(engine)
            except Exception as error:
                # As above; a job's fault is its own, the turns in flight go on.
                log.exception("the engine met a fault in a request")
                job.refuse(EngineStopped(f"the engine met a fault in this request: {error!r}"))
            wait = False

    def _end(self, engine: Engine) -> None:
        engine.fail_all(EngineStopped("the engine was closed while this turn was in flight."))
        engine.close()
        del engine
        # A thread that ran MLX and simply ends aborts the process at exit.
        mx.synchronize()
        mx.clear_streams()
        self._refuse(EngineStopped("this engine was closed: open a new AgentMemory."))

    def _refuse(self, error: AgentMemoryError) -> None:
        """Give every queued job, and from now on every caller, the reason why nothing runs here."""
        with self._lock:
            self._closed, self._reason = True, error
        while True:
            try:
                job = self._inbox.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job.refuse(error)


@dataclass(frozen=True, slots=True)
class _Job:
    """Work for the engine's thread, and whom to tell if it cannot be done."""

    run: Callable[[Engine], None]
    refuse: Callable[[AgentMemoryError], None]


class QueueSink:
    """Deltas for a caller that blocks."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()

    def deliver(self, delta: Delta) -> None:
        """Hand out a piece of the answer."""
        self._queue.put(delta)

    def fail(self, error: Exception) -> None:
        """Hand out why there is no answer."""
        self._queue.put(error)

    def get(self) -> Delta:
        """Wait for the next piece; raises what `fail` was given."""
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


class AsyncQueueSink:
    """Deltas for a coroutine: no thread waits, the engine wakes the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    def deliver(self, delta: Delta) -> None:
        """Hand out a piece of the answer."""
        self._put(delta)

    def fail(self, error: Exception) -> None:
        """Hand out why there is no answer."""
        self._put(error)

    async def get(self) -> Delta:
        """Wait for the next piece; raises what `fail` was given."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _put(self, item: Delta | Exception) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


_open: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Daemon threads still run at this point; one that is inside MLX when the interpreter goes aborts it.
    for thread in list(_open):
        thread.close()


__all__ = ["AsyncQueueSink", "Cancelled", "EngineThread", "TurnHandle", "QueueSink"]
