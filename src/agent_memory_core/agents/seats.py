"""Who is in memory, and whose turn it is: at most so many agents, and one turn of an agent at a time.

Turns of one agent wait in the order in which they came. An agent that is not in memory takes a seat; where none is
free, the agent leaves that was used longest ago, of those that have no turn under way. Leaving and coming in run
outside the lock, so that turns of other agents go on meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from agent_memory_core.agents.errors import AgentsBusy


class Sitter(Protocol):
    """What takes a seat."""

    @property
    def order(self) -> tuple[object, str]:
        """The least of all leaves first."""
        ...


S = TypeVar("S", bound=Sitter)


class Seats(Generic[S]):
    """The agents in memory.

    Args:
        most: how many there may be.
        timeout: seconds after which a wait for a turn or for room ends with `AgentsBusy`.
        leave: saves an agent that has to make room; it stays if that raises.
    """

    def __init__(self, most: int, timeout: float, leave: Callable[[S], None]) -> None:
        self._most = most
        self._timeout = timeout
        self._leave = leave
        self._changed = threading.Condition()
        self._sitting: dict[str, S] = {}
        self._moving: set[str] = set()
        """Those that are leaving or coming in; each has a seat."""
        self._queues: defaultdict[str, deque[object]] = defaultdict(deque)
        """Turns under way and waiting, by agent; the first is under way."""

    def sitting(self) -> dict[str, S]:
        """The agents in memory, by id."""
        with self._changed:
            return dict(self._sitting)

    def begin(self, agent_id: str) -> object:
        """Wait until it is one's turn, and return what `end` takes.

        Raises:
            AgentsBusy: the turns before it took too long.
        """
        ticket, until = object(), time.monotonic() + self._timeout
        with self._changed:
            queue = self._queues[agent_id]
            queue.append(ticket)
            try:
                self._wait(
                    lambda: queue[0] is ticket and agent_id not in self._moving,
                    until,
                    f"agent {agent_id!r} has turns under way",
                )
            except BaseException:
                self._end(agent_id, ticket)
                raise
        return ticket

    def end(self, agent_id: str, ticket: object) -> None:
        """The turn is over. Nothing happens the second time."""
        with self._changed:
            self._end(agent_id, ticket)

    @contextmanager
    def turn(self, agent_id: str) -> Iterator[None]:
        """A turn for the length of a block."""
        ticket = self.begin(agent_id)
        try:
            yield
        finally:
            self.end(agent_id, ticket)

    def seat(self, agent_id: str, come: Callable[[], S]) -> S:
        """The agent, in memory. To be called within its turn.

        Args:
            come: makes it, where it is not in memory; room was made before.

        Raises:
            AgentsBusy: no agent could leave.
            AgentMemoryError: what ``leave`` or ``come`` raised; no seat is taken then, and none was lost.
        """
        with self._changed:
            if (sitter := self._sitting.get(agent_id)) is not None:
                return sitter
            leaving = self._claim(agent_id)
        came = None
        try:
            if leaving is not None:
                self._leave(self._sitting[leaving])
                self._gone(leaving)
                leaving = None
            came = come()
        finally:
            with self._changed:
                self._moving -= {agent_id, leaving}
                if came is not None:
                    self._sitting[agent_id] = came
                self._changed.notify_all()
        return came

    def evict(self) -> str | None:
        """Let the agent leave that was used longest ago and has no turn under way; None if there is none.

        Raises:
            AgentMemoryError: what ``leave`` raised; the agent stays.
        """
        with self._changed:
            leaving = self._first_to_leave()
            if leaving is None:
                return None
            self._moving.add(leaving)
        try:
            self._leave(self._sitting[leaving])
            self._gone(leaving)
        finally:
            with self._changed:
                self._moving.discard(leaving)
                self._changed.notify_all()
        return leaving

    def drop(self, agent_id: str) -> None:
        """Forget an agent without saving it. To be called within its turn."""
        self._gone(agent_id)

    def _gone(self, agent_id: str) -> None:
        with self._changed:
            self._sitting.pop(agent_id, None)
            self._moving.discard(agent_id)
            self._changed.notify_all()

    def _claim(self, agent_id: str) -> str | None:
        """Take a seat for one that comes in; return who has to leave for it."""
        self._wait(
            lambda: self._has_room() or self._first_to_leave() is not None,
            time.monotonic() + self._timeout,
            f"agent {agent_id!r} finds no place: all {self._most} agents in memory have turns under way",
        )
        leaving = None if self._has_room() else self._first_to_leave()
        self._moving.add(agent_id)
        if leaving is not None:
            self._moving.add(leaving)
        return leaving

    def _has_room(self) -> bool:
        return len(self._sitting.keys() | self._moving) < self._most

    def _first_to_leave(self) -> str | None:
        idle = [name for name in self._sitting if name not in self._moving and not self._queues.get(name)]
        return min(idle, key=lambda name: self._sitting[name].order, default=None)

    def _end(self, agent_id: str, ticket: object) -> None:
        queue = self._queues.get(agent_id)
        if queue is not None and ticket in queue:
            queue.remove(ticket)
            if not queue:
                del self._queues[agent_id]
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], until: float, what: str) -> None:
        if not self._changed.wait_for(ready, max(0.0, until - time.monotonic())):
            raise AgentsBusy(
                f"{what}, and waited {self._timeout:g} s: ask fewer at once, or raise max_agents or timeout."
            )
