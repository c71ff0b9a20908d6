"""The books of a `ModelManager`: the state of each model, who waits for room, and who makes it.

Pure: no lock, clock, thread or model. The manager calls it under its lock, and does what it says.

    UNLOADED -> LOADING -> READY -> UNLOADING -> UNLOADED
                LOADING -> FAILED, which is UNLOADED with the reason

What holds after every call: the bytes of the models that are loading, ready or unloading, and those reserved for
waiting ones, are at most the limit, unless a model turned out larger than estimated or the limit was lowered; a
model with leases is ready; nobody waits while there is room for the first in line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from agent_memory_core.manager.errors import ModelTooLarge


class State(Enum):
    """Where a model is on its way into memory and out of it."""

    UNLOADED = auto()
    LOADING = auto()
    READY = auto()
    UNLOADING = auto()
    FAILED = auto()


class Next(Enum):
    """What a caller that wants a model is to do."""

    USE = auto()
    """It has a lease."""
    FOLLOW = auto()
    """Somebody else is loading the model, and a lease is promised to the caller."""
    LOAD = auto()
    """There is room: load the model."""
    MAKE_ROOM = auto()
    """Unload the ticket's victims, and ask again."""
    WAIT = auto()
    """Ask again when something has changed."""


@dataclass(slots=True, eq=False)
class Entry:
    """One model. Times are of the manager's clock, in seconds."""

    name: str
    priority: int = 3
    idle_limit: float | None = None
    pinned: bool = False
    need: int = 0
    """Bytes that it will take, by estimate, or took when it was loaded last."""
    state: State = State.UNLOADED
    nbytes: int = 0
    """Bytes that it takes now."""
    leases: int = 0
    promised: int = 0
    """Leases of those who wait for a load that is under way."""
    draining: object | None = None
    """For whom no new lease is given: a ticket, or whoever forces it out."""
    leaves: bool = False
    """Whether it is no longer configured and goes when it is idle."""
    last_access: float = 0.0
    loaded_at: float = 0.0
    error: BaseException | None = None
    access_count: int = 0
    load_count: int = 0
    load_seconds: float = 0.0
    evictions: int = 0


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in the line of those who need room."""

    entry: Entry
    since: float
    reserved: int = 0
    """Bytes that were freed for it."""
    victims: list[Entry] = field(default_factory=list)
    """Models that are being unloaded for it."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a caller is to do, and its place in the line, if it has one."""

    next: Next
    ticket: Ticket | None = None


class Books:
    """All models of a manager.

    Args:
        limit: most bytes of all models together.
        fair_after: seconds after which the first in line makes a busy model refuse new leases.
        min_loaded_time: seconds that a model stays before it makes room.
        strict_priority: whether only those make room that are at most as important as who needs it.
    """

    def __init__(
        self, limit: int, *, fair_after: float = 10, min_loaded_time: float = 0, strict_priority: bool = False
    ) -> None:
        self.limit = limit
        self.fair_after = fair_after
        self.min_loaded_time = min_loaded_time
        self.strict_priority = strict_priority
        self.entries: dict[str, Entry] = {}
        self.line: list[Ticket] = []

    # -- sums ---------------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes of the models that are loading, ready or unloading."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def reserved(self) -> int:
        """Bytes that were freed for waiting ones."""
        return sum(ticket.reserved for ticket in self.line)

    @property
    def free(self) -> int:
        """Bytes for whoever comes; less than 0 where more is used than the limit allows."""
        return self.limit - self.used - self.reserved

    # -- asking -------------------------------------------------------------------------------------------

    def step(self, entry: Entry, ticket: Ticket | None, now: float) -> Step:
        """What a caller that wants ``entry`` does next.

        Raises:
            ModelTooLarge: it can never fit beside what is pinned.
        """
        if entry.state is State.READY and entry.draining is None:
            self.leave_line(ticket)
            self._lease(entry, now)
            return Step(Next.USE)
        if entry.state is State.LOADING:
            self.leave_line(ticket)
            entry.promised += 1
            return Step(Next.FOLLOW)
        if ticket is None:
            ticket = Ticket(entry, now)
            self.line.append(ticket)
        if entry.state in (State.READY, State.UNLOADING):
            return Step(Next.WAIT, ticket)
        self._refuse_what_never_fits(entry, ticket)
        return self._room(ticket, now)

    def _room(self, ticket: Ticket, now: float) -> Step:
        if self._may_take(ticket, now):
            self.leave_line(ticket)
            self._load(ticket.entry)
            return Step(Next.LOAD)
        if ticket is not self._first() or ticket.victims:
            return Step(Next.WAIT, ticket)
        lacking = ticket.entry.need - ticket.reserved - self.free
        victims = self.victims(lacking, now, ticket.entry.priority)
        if not victims:
            if now - ticket.since >= self.fair_after:
                self._drain(ticket, lacking)
            return Step(Next.WAIT, ticket)
        freed = sum(victim.nbytes for victim in victims)
        ticket.reserved += max(0, min(self.free, ticket.entry.need - ticket.reserved - freed))
        ticket.victims = victims
        for victim in victims:
            victim.state, victim.draining = State.UNLOADING, None
        return Step(Next.MAKE_ROOM, ticket)

    def _may_take(self, ticket: Ticket, now: float) -> bool:
        if ticket.entry.need > ticket.reserved + self.free:
            return False
        if ticket is self._first() or ticket.entry.need == 0:
            return True
        head = self._first()
        if now - head.since >= self.fair_after or head.victims:
            return False
        before = self.line[: self.line.index(ticket)]
        return all(self._is_stuck(other, now) for other in before)

    def _is_stuck(self, ticket: Ticket, now: float) -> bool:
        """Whether a ticket could not use the room that is free now, nor make more."""
        entry = ticket.entry
        if entry.state in (State.READY, State.UNLOADING):
            return True
        if entry.need <= ticket.reserved + self.free:
            return False
        lacking = entry.need - ticket.reserved - self.free
        return ticket is not self._first() or not self.victims(lacking, now, entry.priority)

    def _first(self) -> Ticket:
        """The first in line whose model is not on its way out, for which nobody can make room."""
        for ticket in self.line:
            if ticket.entry.state not in (State.READY, State.UNLOADING):
                return ticket
        return self.line[0]

    def _refuse_what_never_fits(self, entry: Entry, ticket: Ticket) -> None:
        pinned = [e for e in self.entries.values() if e.pinned and e.state is State.READY and e is not entry]
        if entry.need <= self.limit - sum(e.nbytes for e in pinned):
            return
        self.leave_line(ticket)
        kept = (
            f", of which {_names(pinned)} {_mib(sum(e.nbytes for e in pinned))} are pinned" if pinned else ""
        )
        raise ModelTooLarge(
            f"the model {entry.name!r} needs {_mib(entry.need)}, and all models together may take {_mib(self.limit)}"
            f"{kept}: raise max_memory_mb, or use a smaller model or a smaller memory_budget_mb."
        )

    def leave_line(self, ticket: Ticket | None) -> None:
        """Give up a place in the line, with what was reserved for it and who was drained for it."""
        if ticket is None or ticket not in self.line:
            return
        self.line.remove(ticket)
        for entry in self.entries.values():
            if entry.draining is ticket:
                entry.draining = None

    def unpromise(self, entry: Entry) -> None:
        """A caller no longer waits for the load that is under way."""
        assert entry.promised > 0
        entry.promised -= 1

    # -- leases -------------------------------------------------------------------------------------------

    def _lease(self, entry: Entry, now: float) -> None:
        entry.leases += 1
        entry.access_count += 1
        entry.last_access = now

    def lease_again(self, entry: Entry) -> bool:
        """Another lease for who has one already, whatever the model waits for; False if it is not ready."""
        if entry.state is not State.READY or not entry.leases:
            return False
        entry.leases += 1
        return True

    def release(self, entry: Entry, now: float) -> None:
        """Give a lease back."""
        assert entry.leases > 0, f"{entry.name} was released more often than leased"
        entry.leases -= 1
        entry.last_access = now

    # -- loads --------------------------------------------------------------------------------------------

    def _load(self, entry: Entry) -> None:
        entry.state, entry.nbytes, entry.error = State.LOADING, entry.need, None

    def preload(self, entry: Entry) -> bool:
        """Begin to load a model that nobody asked for, if that needs nobody else's room; say whether."""
        if entry.state is not State.UNLOADED or self.line or entry.need > self.free:
            return False
        self._load(entry)
        return True

    def loaded(self, entry: Entry, nbytes: int, seconds: float, now: float, *, leased: bool = True) -> None:
        """A load has ended well; its caller and those who followed it have leases."""
        assert entry.state is State.LOADING
        entry.state, entry.nbytes, entry.need = State.READY, nbytes, nbytes
        entry.leases, entry.promised = entry.promised + leased, 0
        entry.access_count += entry.leases
        entry.load_count += 1
        entry.load_seconds = seconds
        entry.loaded_at = entry.last_access = now

    def failed(self, entry: Entry, error: BaseException) -> None:
        """A load has failed; nobody has a lease."""
        assert entry.state is State.LOADING
        entry.state, entry.nbytes, entry.error, entry.promised = State.FAILED, 0, error, 0

    # -- unloads ------------------------------------------------------------------------------------------

    def begin_unload(self, entry: Entry) -> bool:
        """Begin to unload a model that is idle; say whether it is."""
        if entry.state is not State.READY or entry.leases:
            return False
        entry.state, entry.draining = State.UNLOADING, None
        return True

    def unloaded(self, entry: Entry, *, evicted: bool) -> None:
        """A model has left; what it took goes to the ticket for which it left."""
        assert entry.state is State.UNLOADING
        freed, entry.state, entry.nbytes = entry.nbytes, State.UNLOADED, 0
        entry.evictions += evicted
        for ticket in self.line:
            if entry in ticket.victims:
                ticket.victims.remove(entry)
                ticket.reserved += max(0, min(freed, ticket.entry.need - ticket.reserved, self.free))

    def expired(self, now: float) -> list[Entry]:
        """Begin to unload the models that nobody used for longer than they may idle, and those no longer configured."""
        gone = [e for e in self._candidates(now) if self._is_idle_too_long(e, now) or e.leaves]
        return [entry for entry in gone if self.begin_unload(entry)]

    def over_limit(self, now: float) -> list[Entry]:
        """Begin to unload idle models until the limit is kept, as far as they go."""
        over = -self.free
        victims = self.victims(over, now, None) or (list(self._candidates(now)) if over > 0 else [])
        return [entry for entry in victims if self.begin_unload(entry)]

    def next_expiry(self) -> float | None:
        """When the next model will have idled too long; None if none will."""
        times = [
            e.last_access + e.idle_limit
            for e in self.entries.values()
            if e.state is State.READY
            and not e.leases
            and not e.pinned
            and e.idle_limit is not None
            and e.nbytes
        ]
        return min(times, default=None)

    # -- victims ------------------------------------------------------------------------------------------

    def victims(self, lacking: int, now: float, priority: int | None) -> list[Entry]:
        """The least important idle models whose bytes together are at least ``lacking``; none if they are not enough.

        First those that idle too long, then by priority, the longest unused, the largest, by name. Whoever is not
        needed after all, from the most important on, stays.

        Args:
            priority: of who needs the room; None if that does not matter.
        """
        taken: list[Entry] = []
        for entry in sorted(self._candidates(now), key=lambda entry: self._order(entry, now)):
            if sum(e.nbytes for e in taken) >= lacking:
                break
            if priority is None or not self.strict_priority or entry.priority >= priority:
                taken.append(entry)
        if lacking <= 0 or sum(e.nbytes for e in taken) < lacking:
            return []
        for entry in reversed(taken.copy()):
            if sum(e.nbytes for e in taken) - entry.nbytes >= lacking:
                taken.remove(entry)
        return taken

    def _candidates(self, now: float) -> list[Entry]:
        return [e for e in self.entries.values() if not e.leases and self._may_leave(e, now)]

    def _may_leave(self, entry: Entry, now: float) -> bool:
        return (
            entry.state is State.READY
            and not entry.pinned
            and entry.nbytes > 0
            and now - entry.loaded_at >= self.min_loaded_time
        )

    def _is_idle_too_long(self, entry: Entry, now: float) -> bool:
        return entry.idle_limit is not None and now - entry.last_access > entry.idle_limit

    def _order(self, entry: Entry, now: float) -> tuple[bool, int, float, int, str]:
        idle = self._is_idle_too_long(entry, now) and not entry.leases
        return (not idle, -entry.priority, entry.last_access, -entry.nbytes, entry.name)

    def _drain(self, ticket: Ticket, lacking: int) -> None:
        """Let busy models give no new leases, so that they become idle: the least important ones, as many as needed."""
        if any(entry.draining is ticket for entry in self.entries.values()):
            return
        able = [e for e in self.entries.values() if self._may_leave_for(e, ticket)]
        for entry in sorted(able, key=lambda entry: self._order(entry, ticket.since)):
            if lacking <= 0:
                return
            entry.draining = ticket
            lacking -= entry.nbytes

    def _may_leave_for(self, entry: Entry, ticket: Ticket) -> bool:
        # How long it has been loaded does not count here: it was longer than the ticket waits, or will be.
        important = self.strict_priority and entry.priority < ticket.entry.priority
        return (
            entry.state is State.READY
            and not entry.pinned
            and entry.nbytes > 0
            and entry.draining is None
            and not important
        )

    def in_the_way(self) -> str:
        """Who holds the memory, for an error."""
        held = [f"{e.name} {_mib(e.nbytes)} ({_why(e)})" for e in self.entries.values() if e.nbytes]
        return ", ".join(held) or "nothing"


def _why(entry: Entry) -> str:
    if entry.pinned:
        return "pinned"
    return f"{entry.leases} in use" if entry.leases else entry.state.name.lower()


def _names(entries: Iterable[Entry]) -> str:
    return ", ".join(entry.name for entry in entries)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.4g} MiB"
