"""Loads and unloads models as the books say: each caller loads what it needs in its own thread.

One lock guards the books. It is never held while a model is loaded, unloaded or run, nor while somebody is told.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from agent_memory_core import AgentMemory, BackendMissing
from agent_memory_core.manager.backends.base import Backend, Loaded
from agent_memory_core.manager.backends.mlx import MlxBackend
from agent_memory_core.manager.books import Books, Entry, Next, State, Ticket
from agent_memory_core.manager.config import ModelConfig
from agent_memory_core.manager.errors import LoadTimeout, ManagerClosed, ManagerError, ModelLoadFailed

log = logging.getLogger("agent_memory")

Tell = Callable[[str, str], None]

_RECHECK = 0.25
"""Seconds after which a waiting caller looks again, whether or not it was woken: time alone can change what it may."""

_CANCEL_PATIENCE = 30.0
"""Seconds that a forced unload waits for calls that it has withdrawn."""

_held: ContextVar[frozenset[int]] = ContextVar("agent_memory_leases", default=frozenset())
"""The slots of which this context holds leases: who has one gets another one at once, whoever waits for the model."""

_loading: ContextVar[int | None] = ContextVar("agent_memory_loading", default=None)
"""The slot that this context is loading."""


@dataclass(eq=False)
class Slot:
    """One configured model, loaded or not."""

    config: ModelConfig
    entry: Entry
    backend: Backend
    limit: int
    """Bytes of all models together when it was configured; the KV that it may take follows from that."""
    loaded: Loaded | None = None
    loading: Future[None] | None = None
    gate: threading.Semaphore | None = None
    """Lets as many calls in at once as the model takes; None: any number."""
    calls: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """The calls under way, which have a ``close``."""
    last_access: float | None = None
    """When it was used last, in seconds since the epoch."""
    holds: int = 0
    """Leases without a block, see `Pool.hold`."""

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.config.name


@dataclass(slots=True)
class _Place:
    """A caller on its way to a lease."""

    deadline: float
    ticket: Ticket | None = None


class Pool:
    """The models of a manager, and who uses them.

    Args:
        books: what is loaded and who waits.
        clock: seconds, monotonic; what idles and what is fair is measured by it.
        load_timeout: seconds that a caller waits for a model.
        tell: is told of events, by the name of the event and of the model, outside the lock.
    """

    def __init__(self, books: Books, clock: Callable[[], float], load_timeout: float, tell: Tell) -> None:
        self.books = books
        self.clock = clock
        self.load_timeout = load_timeout
        self.slots: dict[str, Slot] = {}
        self.changed = threading.Condition()
        self.closed = False
        self._tell = tell
        self._process = os.getpid()

    def check_open(self) -> None:
        """Raise why nothing can be used here any more, if that is so.

        Raises:
            ManagerClosed: it was shut down, or the process was forked.
        """
        if self._process != os.getpid():
            raise ManagerClosed("this process was forked from the one of the manager: make a new one here.")
        if self.closed:
            raise ManagerClosed("the manager was shut down: make a new one.")

    # -- leases -------------------------------------------------------------------------------------------

    def acquire(self, slot: Slot, timeout: float | None = None) -> None:
        """Take a lease of a model, and load it before, if it is not.

        Raises:
            ModelLoadFailed: it cannot be loaded; see what is derived from it.
            BackendMissing: the library that runs it is not installed.
            ManagerClosed: the manager was shut down.
        """
        self.check_open()
        with self.changed:
            # While somebody holds it without a block nobody can take its room, and that one may need it again to end.
            if (id(slot) in _held.get() or slot.holds) and self.books.lease_again(slot.entry):
                return
        place = _Place(time.monotonic() + (self.load_timeout if timeout is None else timeout))
        try:
            while not self._advance(slot, place):
                pass
        finally:
            with self.changed:
                self.books.leave_line(place.ticket)
                self.changed.notify_all()

    def acquire_at_once(self, slot: Slot) -> bool:
        """`acquire` where nothing has to be loaded or waited for; False, and nothing done, if something has."""
        self.check_open()
        entry = slot.entry
        with self.changed:
            if entry.state is not State.READY or entry.draining is not None:
                return False
            step = self.books.step(entry, None, self.clock())
            slot.last_access = time.time()
            return step.next is Next.USE

    def _advance(self, slot: Slot, place: _Place) -> bool:
        """One step on the way to a lease; return whether it is there."""
        victims: list[Entry] = []
        with self.changed:
            self.check_open()
            step = self.books.step(slot.entry, place.ticket, self.clock())
            place.ticket = step.ticket
            if step.next is Next.WAIT:
                self._wait(slot, place)
            elif step.next is Next.LOAD:
                slot.loading = Future()
            elif step.next is Next.MAKE_ROOM and step.ticket is not None:
                victims = list(step.ticket.victims)
            future = slot.loading
            slot.last_access = time.time()
        if step.next is Next.LOAD:
            self.load(slot)
        elif step.next is Next.FOLLOW and future is not None:
            self._follow(slot, future, place.deadline)
        for victim in victims:
            self.free(self.slot_of(victim), evicted=True)
        return step.next in (Next.USE, Next.LOAD, Next.FOLLOW)

    def _wait(self, slot: Slot, place: _Place) -> None:
        left = place.deadline - time.monotonic()
        if left <= 0:
            raise self._timeout(slot)
        self.changed.wait(min(left, _RECHECK))

    def _follow(self, slot: Slot, future: Future[None], deadline: float) -> None:
        """Wait for a load that another caller has begun; its lease is promised."""
        try:
            concurrent.futures.wait([future], max(0.0, deadline - time.monotonic()))
        finally:
            with self.changed:
                done = future.done()
                if not done:
                    self.books.unpromise(slot.entry)
        if not done:
            raise self._timeout(slot)
        future.result()

    def _timeout(self, slot: Slot) -> LoadTimeout:
        return LoadTimeout(
            f"the model {slot.name!r} could not be loaded in time: the memory is held by {self.books.in_the_way()}. "
            "Wait longer (load_timeout), raise max_memory_mb, or unload one of them."
        )

    def release(self, slot: Slot) -> None:
        """Give a lease back."""
        with self.changed:
            self.books.release(slot.entry, self.clock())
            self.changed.notify_all()

    def hold(self, slot: Slot, timeout: float | None = None) -> Callable[[], None]:
        """Take a lease without a block, and return what gives it back, once, in any thread. Until then every lease of
        the model is given at once.
        """
        self.acquire(slot, timeout)
        with self.changed:
            slot.holds += 1
        given_back = threading.Lock()

        def give_back() -> None:
            if given_back.acquire(blocking=False):
                with self.changed:
                    slot.holds -= 1
                self.release(slot)

        return give_back

    @contextmanager
    def leased(self, slot: Slot, timeout: float | None = None) -> Iterator[Loaded]:
        """Hold a lease for a block; what the block calls gets leases of the same model at once."""
        self.acquire(slot, timeout)
        token = _held.set(_held.get() | {id(slot)})
        try:
            assert slot.loaded is not None
            yield slot.loaded
        finally:
            _held.reset(token)
            self.release(slot)

    # -- loads and unloads --------------------------------------------------------------------------------

    def slot_of(self, entry: Entry) -> Slot:
        """The slot of an entry of the books."""
        return self.slots[entry.name]

    def is_idle(self, slot: Slot) -> bool:
        """Whether a model is not in memory, nor on its way, and nobody waits for it. To be asked under the lock."""
        waited_for = any(ticket.entry is slot.entry for ticket in self.books.line)
        return slot.entry.state in (State.UNLOADED, State.FAILED) and not waited_for

    def begin_preload(self, slot: Slot) -> bool:
        """Make `load` the caller's task for a model that nobody asked for, if that needs nobody else's room."""
        with self.changed:
            begun = self.books.preload(slot.entry)
            if begun:
                slot.loading = Future()
            return begun

    def load(self, slot: Slot, *, leased: bool = True) -> None:
        """Load a model for which the books have made room.

        Raises:
            ModelLoadFailed: it cannot be loaded.
            BackendMissing: the library that runs it is not installed.
        """
        began, token = time.perf_counter(), _loading.set(id(slot))
        try:
            loaded = slot.backend.load(slot.config, slot.limit)
        except BaseException as error:
            known = isinstance(error, (BackendMissing, ManagerError))
            failure = error if known else _failure(slot, error)
            self._loaded(slot, failure)
            self._tell("load_failed", slot.name)
            if known or not isinstance(error, Exception):
                raise
            raise failure from error
        finally:
            _loading.reset(token)
        slot.loaded = loaded
        with self.changed:
            self.books.loaded(
                slot.entry, loaded.nbytes, time.perf_counter() - began, self.clock(), leased=leased
            )
        self._loaded(slot, None)
        self._tell("loaded", slot.name)
        self.shrink(slot.name)

    def _loaded(self, slot: Slot, failure: BaseException | None) -> None:
        with self.changed:
            future, slot.loading = slot.loading, None
            assert future is not None
            if failure is None:
                future.set_result(None)
            else:
                self.books.failed(slot.entry, failure)
                future.set_exception(failure)
            self.changed.notify_all()

    def free(self, slot: Slot, *, evicted: bool) -> None:
        """Unload a model that the books have given up."""
        loaded, slot.loaded = slot.loaded, None
        try:
            if loaded is not None:
                loaded.unload()
        finally:
            with self.changed:
                self.books.unloaded(slot.entry, evicted=evicted)
                self.changed.notify_all()
        if evicted:
            self._tell("evicted", slot.name)
        self._tell("unloaded", slot.name)

    def shrink(self, cause: str) -> int:
        """Unload idle models until the limit is kept, as far as they go; return the bytes that are still over."""
        with self.changed:
            victims = self.books.over_limit(self.clock())
        for victim in victims:
            self.free(self.slot_of(victim), evicted=True)
        with self.changed:
            over = max(0, -self.books.free)
        if over:
            self._tell("over_limit", cause)
        return over

    def expire(self) -> None:
        """Unload the models that idle for too long."""
        with self.changed:
            gone = self.books.expired(self.clock())
        for entry in gone:
            self.free(self.slot_of(entry), evicted=True)

    def unload(self, slot: Slot, *, force: bool, timeout: float) -> bool:
        """Unload a model that is idle, or with ``force`` one that is in use; return whether it was unloaded.

        Args:
            force: let no new call in, wait for those under way, and then withdraw them.
            timeout: seconds to wait for them.
        """
        with self.changed:
            loading = slot.loading
        if force and loading is not None:
            concurrent.futures.wait([loading], timeout)
        with self.changed:
            if not force:
                self.changed.wait_for(lambda: not slot.entry.leases, timeout)
            if slot.entry.state is not State.READY or (slot.entry.leases and not force):
                return False
            begun = self.books.begin_unload(slot.entry)
        if not begun and not self._drain(slot, timeout):
            return False
        self.free(slot, evicted=False)
        return True

    def _drain(self, slot: Slot, timeout: float) -> bool:
        """Wait until no call is inside, and withdraw those that stay; then the model is the caller's to free."""
        entry = slot.entry
        if not self._idle(slot, timeout):
            for call in list(slot.calls):
                call.close()
            if slot.loaded is not None:
                slot.loaded.cancel()
            if not self._idle(slot, _CANCEL_PATIENCE):
                log.warning("the model %r stays loaded: somebody holds a lease of it", slot.name)
        with self.changed:
            entry.draining = None
            begun = self.books.begin_unload(entry)
            self.changed.notify_all()
        return begun

    def _idle(self, slot: Slot, timeout: float) -> bool:
        with self.changed:
            slot.entry.draining = self
            return self.changed.wait_for(lambda: not slot.entry.leases, timeout)


def _failure(slot: Slot, error: BaseException) -> ModelLoadFailed:
    return ModelLoadFailed(f"the model {slot.name!r} cannot be loaded from {slot.config.path!r}: {error}")


class Residence:
    """Asks for a lease before each turn of an engine, whoever runs the turn."""

    def __init__(self, pool: Pool, slot: Slot) -> None:
        self.pool = pool
        self._slot = slot

    def enter(self, memory: AgentMemory) -> None:
        """Take a lease; the load itself needs none."""
        if _loading.get() != id(self._slot):
            self.pool.acquire(self._slot)

    def enter_at_once(self, memory: AgentMemory) -> bool:
        """Take a lease if the model is loaded and nobody drains it."""
        return _loading.get() == id(self._slot) or self.pool.acquire_at_once(self._slot)

    def leave(self, memory: AgentMemory) -> None:
        """Give it back."""
        if _loading.get() != id(self._slot):
            self.pool.release(self._slot)


def engine_of(slot: Slot) -> AgentMemory | None:
    """The engine of a model on MLX, loaded or not; None for the others."""
    return slot.backend.memory(slot.config, slot.limit) if isinstance(slot.backend, MlxBackend) else None


def watch(pool: Pool, slot: Slot) -> None:
    """Let every turn of a model on MLX ask the pool, also those of a framework's models."""
    if (memory := engine_of(slot)) is not None:
        memory.residency = Residence(pool, slot)


def unwatch(pool: Pool, slot: Slot) -> None:
    """Let the turns of a model on MLX ask this pool no more."""
    memory = engine_of(slot)
    if memory is not None and isinstance(memory.residency, Residence) and memory.residency.pool is pool:
        memory.residency = None
