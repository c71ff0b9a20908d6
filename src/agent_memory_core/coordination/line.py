"""A line of those who wait for one thing: first come, first served, and a place in front for who interrupts."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import Self


class Line:
    """Lets one in at a time, in the order in which they came. Another thread may give a place back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Place] = deque()
        self._inside: Place | None = None

    def join(self, *, first: bool = False) -> Place:
        """A place at the end, or in front of all who wait. It is entered by ``with``."""
        place = Place(self)
        with self._lock:
            (self._waiting.appendleft if first else self._waiting.append)(place)
            self._let_in()
        return place

    def leave(self, place: Place) -> None:
        """Give a place back; once it was, this does nothing."""
        with self._lock:
            if self._inside is place:
                self._inside = None
            elif place in self._waiting:
                self._waiting.remove(place)
            self._let_in()

    def _let_in(self) -> None:
        if self._inside is None and self._waiting:
            self._inside = self._waiting.popleft()
            self._inside.is_next.set()


class Place:
    """One who waits in a line, or is inside."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.is_next = threading.Event()

    def leave(self) -> None:
        """Let the next one in."""
        self._line.leave(self)

    def __enter__(self) -> Self:
        try:
            self.is_next.wait()
        except BaseException:
            self.leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
