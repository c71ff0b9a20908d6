"""One thread owns MLX: callers put jobs in, deltas come out through their sinks.

MLX's streams and lazy arrays belong to the thread that made them, so the engine is built, stepped and closed on
one thread of its own. The thread sleeps while nothing can be done. One queue wakes it: jobs of callers come through
it, and so does what the disk's threads have read and written.

This module imports no MLX: an AgentMemory that was never asked anything costs nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, TypeVar

from agent_memory_core.engine.sinks import CANCELLED, FORKED, GuardedSink, OutputSink
from agent_memory_core.errors import AgentMemoryError, Cancelled, EngineStopped, QueueFull
from agent_memory_core.messages import ChatRequest, SessionKey

if TYPE_CHECKING:
    from agent_memory_core.engine.engine import Engine
    from agent_memory_core.engine.results import Result, Results
    from agent_memory_core.text.chat_template import ChatTemplate

log = logging.getLogger("agent_memory")

T = TypeVar("T")

_FAULT = "the engine met a fault; the turns in flight are given up"
CLOSED = "this engine was closed: open a new AgentMemory."


class TurnHandle:
    """A turn under way, as its caller holds it."""

    def __init__(self, thread: EngineThread, sink: GuardedSink) -> None:
        self._thread = thread
        self._sink = sink
        self._withdrawn = False
        self._seq_id: int | None = None

    def cancel(self) -> None:
        """Withdraw the turn; nothing happens if it has ended. May be called from any thread.

        Its reader gets `Cancelled` at once, also while the engine is busy with something long. If the engine was
        closed, the reader gets `EngineStopped` from there.
        """
        if self._withdrawn or self._thread.closed:
            return
        self._withdrawn = True
        self._sink.withdraw(Cancelled(CANCELLED))
        self._thread.post(self._cancel)

    def submit(
        self, engine: Engine, request: ChatRequest, key: SessionKey, prewarm: bool, arrived: float
    ) -> None:
        """Queue the turn, unless it was withdrawn before the engine came to it. Runs on the engine's thread."""
        if self._withdrawn:
            self._sink.end()
            return
        try:
            self._seq_id = engine.submit(request, key, self._sink, prewarm=prewarm, arrived=arrived)
        except AgentMemoryError as error:
            self._sink.fail(error)

    def _cancel(self, engine: Engine) -> None:
        # A turn of an engine that was unloaded meanwhile has ended; its id may be another turn's by now.
        if self._seq_id is not None and not self._sink.has_ended:
            engine.cancel(self._seq_id)


class EngineThread:
    """Starts an engine on first use and runs it until `unload` or `close`.

    Args:
        build: makes the engine, which puts what its disk has done into the given queue; called on the engine's thread.
        max_waiting: most turns that wait for their place.
    """

    def __init__(self, build: Callable[[Results], Engine], max_waiting: int) -> None:
        self._build, self._max_waiting = build, max_waiting
        self._inbox: _Inbox = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._before: threading.Thread | None = None
        self._in_flight = 0
        self._queued: set[TurnHandle] = set()
        self._step_began = 0.0
        self._reason: AgentMemoryError = EngineStopped(CLOSED)
        self._closed = _forked_after_start
        if self._closed:
            self._reason = EngineStopped(FORKED)
        _open.add(self)

    @property
    def started(self) -> bool:
        """Whether the engine was asked for, and not unloaded since."""
        return self._thread is not None

    @property
    def in_flight(self) -> int:
        """How many turns, and questions to the chat template, have not ended."""
        return self._in_flight

    @property
    def weights_bytes(self) -> int:
        """What the model's weights take of the device's memory; 0 while it is not loaded."""
        engine = self._engine
        return engine.weights_bytes if engine is not None else 0

    @property
    def closed(self) -> bool:
        """Whether it takes no more turns."""
        return self._closed

    def check_open(self) -> None:
        """Raise why nothing runs here any more, if that is so.

        Raises:
            EngineStopped: the engine was closed, or the process was forked.
            AgentMemoryError: why the engine could not be built.
        """
        if self._closed:
            raise self._reason

    def submit(
        self,
        request: ChatRequest,
        key: SessionKey,
        sink: OutputSink,
        *,
        prewarm: bool = False,
        ended: Callable[[], None] = lambda: None,
    ) -> TurnHandle:
        """Queue a turn. What is wrong with it reaches the sink.

        Args:
            ended: called once when the turn has ended, whatever its end, on the engine's thread as a rule. It must
                neither block nor raise.

        Raises:
            EngineStopped: the engine was closed; ``ended`` is called all the same.
            QueueFull: too many turns wait; so is it then.
        """

        def end() -> None:
            ended()
            self._queued.discard(handle)
            self._end_one()

        def begin(engine: Engine) -> None:
            self._queued.discard(handle)
            handle.submit(engine, request, key, prewarm, arrived)

        guarded = GuardedSink(sink, end)
        handle, arrived = TurnHandle(self, guarded), time.perf_counter()
        self._begin_one()
        try:
            self._queue(handle)
            self._put(_Job(begin, guarded.fail))
        except AgentMemoryError:
            guarded.end()
            raise
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

    def look(self, at: Callable[[Engine], T]) -> T | None:
        """What ``at`` sees of the engine, on the caller's thread and at once; None while there is no engine.

        Only for numbers: the engine goes on meanwhile.
        """
        engine = self._engine
        return at(engine) if engine is not None else None

    @property
    def step_seconds(self) -> float:
        """How long the round in progress has taken; 0 while the engine waits for something to do."""
        began = self._step_began
        return time.monotonic() - began if began else 0.0

    def ask(self, question: Callable[[ChatTemplate], T]) -> T:
        """Ask the chat template something, without waiting for the turns in flight; the engine is built first.

        Raises:
            EngineStopped: the engine was closed.
            AgentMemoryError: it cannot be built, or what the template raises.
        """
        self._begin_one()
        try:
            engine = self._engine or self.call(lambda engine: engine).result()
            return engine.preparer.ask(question).result()
        finally:
            self._end_one()

    def post(self, job: Callable[[Engine], None]) -> None:
        """Like `call`, with nobody waiting; ignored once the engine is closed."""
        if self._thread is not None and not self._closed:
            self._inbox.put(_Job(job, lambda error: None))

    def flush(self) -> None:
        """Wait, on the caller's thread, until every turn that has ended is on disk; the engine goes on meanwhile."""
        engine, before = self._engine, self._before
        if engine is not None:
            engine.disk.flush()
        elif before is not None:
            before.join()

    def unload(self, timeout: float | None = None, *, cancel: bool = False) -> bool:
        """End the engine once nothing is in flight; the next turn starts another one. Say whether it was ended.

        Args:
            timeout: seconds to wait for what is in flight; None waits as long as it takes.
            cancel: withdraw what is in flight then, instead of leaving the engine as it is.
        """
        with self._lock:
            if not self._lock.wait_for(lambda: not self._in_flight, timeout) and not cancel:
                return False
            inbox = self._inbox
            if self._thread is not None:
                self._before, self._thread = self._thread, None
                self._inbox, self._engine = queue.SimpleQueue(), None
                inbox.put(None)
            before = self._before
        if before is not None:
            before.join()
        return True

    def close(self) -> None:
        """Stop taking turns, end those in flight with `EngineStopped`, write what is queued, end the thread."""
        with self._lock:
            self._closed = True
        if self._thread is not None:
            self._inbox.put(None)
        # Also where it was closed already: the thread of one that could not be built may be on its way out.
        for thread in (self._before, self._thread):
            if thread is not None and thread is not threading.current_thread():
                thread.join()

    def after_fork(self, *, refuse: bool) -> None:
        """In a forked child: no thread but the caller's lives on, and any lock may be held by one that does not.

        Args:
            refuse: whether MLX had run before the fork, so that nothing can run here; otherwise an engine that was
                never started can still be started.
        """
        self._lock = threading.Condition()
        self._inbox = queue.SimpleQueue()
        self._thread = self._before = self._engine = None
        self._in_flight = 0
        self._queued = set()
        if refuse:
            self._closed, self._reason = True, EngineStopped(FORKED)

    def _put(self, job: _Job) -> None:
        with self._lock:
            self.check_open()
            if self._thread is None:
                _note_start()
                run = partial(self._run, self._inbox, self._before)
                self._thread = threading.Thread(target=run, name="agent-memory-engine", daemon=True)
                self._thread.start()
            self._inbox.put(job)

    def _begin_one(self) -> None:
        with self._lock:
            self._in_flight += 1

    def _queue(self, handle: TurnHandle) -> None:
        with self._lock:
            waiting = len(self._queued) + (self._engine.waiting if self._engine is not None else 0)
            if waiting < self._max_waiting:
                self._queued.add(handle)
                return
        raise QueueFull(
            f"{waiting} turns wait already and max_waiting is {self._max_waiting}: ask again when some have ended, or "
            "raise max_waiting."
        )

    def _end_one(self) -> None:
        with self._lock:
            self._in_flight -= 1
            self._lock.notify_all()

    def _run(self, inbox: _Inbox, before: threading.Thread | None) -> None:
        if before is not None:
            # Two engines of one memory would take twice the room, and write to one store.
            before.join()
        try:
            self._build_and_serve(inbox)
        finally:
            # Also where the engine could not be built: parts of a model may have been loaded.
            if _mlx_is_loaded():
                from agent_memory_core.engine.workers import free_mlx, leave_mlx

                free_mlx()
                leave_mlx()

    def _build_and_serve(self, inbox: _Inbox) -> None:
        engine = self._built(inbox)
        if engine is None:
            return
        try:
            self._serve(engine, inbox)
        finally:
            self._end(engine, inbox)

    def _built(self, inbox: _Inbox) -> Engine | None:
        try:
            engine = self._build(inbox)
        except AgentMemoryError as error:
            self._refuse(error, inbox)
            return None
        except Exception as error:
            log.exception("the engine could not be built")
            self._refuse(EngineStopped(f"the engine could not be built: {error!r}"), inbox)
            return None
        finally:
            if _mlx_is_loaded():
                _close_before_mlx()
        with self._lock:
            if inbox is self._inbox:
                self._engine = engine
        return engine

    def _serve(self, engine: Engine, inbox: _Inbox) -> None:
        more = False
        while self._take_messages(engine, inbox, wait=not more):
            try:
                self._step_began = time.monotonic()
                more = engine.step()
            except Exception as error:
                # The outermost loop: one fault must not end the thread and leave every caller waiting.
                log.exception(_FAULT)
                self._give_up(engine, error)
                more = False
            finally:
                self._step_began = 0.0

    def _take_messages(self, engine: Engine, inbox: _Inbox, *, wait: bool) -> bool:
        """Do what was asked and take what was done meanwhile; False means stop."""
        while True:
            try:
                message = inbox.get(block=wait)
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, _Job):
                message.try_on(engine)
            else:
                self._take_result(engine, message)
            wait = False

    def _take_result(self, engine: Engine, result: Result) -> None:
        try:
            engine.take(result)
        except Exception as error:
            # As in `_serve`.
            log.exception(_FAULT)
            self._give_up(engine, error)

    def _give_up(self, engine: Engine, error: Exception) -> None:
        engine.fail_all(EngineStopped(f"the engine met a fault and gave this turn up: {error!r}"))

    def _end(self, engine: Engine, inbox: _Inbox) -> None:
        unloads = inbox is not self._inbox
        if unloads:
            engine.cancel_all()
        else:
            engine.fail_all(EngineStopped("the engine was closed while this turn was in flight."))
        engine.close(keep_store=unloads)
        # What the disk's threads did last is in the queue now, and readers wait for it.
        if unloads:
            self._empty(inbox, EngineStopped(CLOSED), engine)
        else:
            self._refuse(EngineStopped(CLOSED), inbox, engine)
            self._engine = None

    def _refuse(self, error: AgentMemoryError, inbox: _Inbox, engine: Engine | None = None) -> None:
        """Give every queued job, and from now on every caller, the reason why nothing runs here."""
        with self._lock:
            self._closed, self._reason = True, error
        self._empty(inbox, error, engine)

    def _empty(self, inbox: _Inbox, error: AgentMemoryError, engine: Engine | None) -> None:
        while True:
            try:
                message = inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, _Job):
                message.refuse(error)
            elif message is not None and engine is not None:
                self._take_result(engine, message)


@dataclass(frozen=True, slots=True)
class _Job:
    """Work for the engine's thread, and whom to tell if it cannot be done."""

    run: Callable[[Engine], None]
    refuse: Callable[[AgentMemoryError], None]

    def try_on(self, engine: Engine) -> None:
        """Do it. A fault in it is its own; the turns in flight go on."""
        try:
            self.run(engine)
        except Exception as error:
            # Part of the thread's outermost loop.
            log.exception("the engine met a fault in a request")
            self.refuse(EngineStopped(f"the engine met a fault in this request: {error!r}"))


_Inbox = queue.SimpleQueue["_Job | Result | None"]

_open: weakref.WeakSet[EngineThread] = weakref.WeakSet()
_started = False
"""Whether any engine was started in this process, so that MLX's own threads run."""
_forked_after_start = False
"""Whether this process was forked from one in which an engine had been started."""


def _note_start() -> None:
    global _started
    _started = True


@atexit.register
def _close_all() -> None:
    # Daemon threads still run at this point; one that is inside MLX when the interpreter goes aborts it.
    for thread in list(_open):
        thread.close()


def _mlx_is_loaded() -> bool:
    return sys.modules.get("mlx.core") is not None


@cache
def _close_before_mlx() -> None:
    """Close the engines before MLX cleans up at exit, although MLX was imported, and registered its own, later."""
    atexit.register(_close_all)


def _after_fork_in_child() -> None:
    global _forked_after_start
    _forked_after_start = _started
    for thread in list(_open):
        thread.after_fork(refuse=_started)


os.register_at_fork(after_in_child=_after_fork_in_child)
