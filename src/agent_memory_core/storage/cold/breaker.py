"""A circuit breaker: what keeps failing is not asked again for a while, so that nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

FAILURES = 3
"""Failures in a row that open it."""

FIRST, LONGEST = 5.0, 60.0
"""Seconds that it stays open: at first, and at most after it opened again and again."""


class Breaker:
    """Counts failures in a row. It is open for a time after too many; then one try decides.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._pause = FIRST
        self._until = 0.0
        self.why = ""
        """why the last one failed"""

    @property
    def wait(self) -> float:
        """Seconds until something may be tried; 0 while it is closed."""
        return max(0.0, self._until - self._clock())

    def worked(self) -> None:
        """Something has worked."""
        self._failures, self._pause, self._until = 0, FIRST, 0.0

    def failed(self, why: str = "") -> None:
        """Something has failed."""
        self._failures += 1
        self.why = why
        if self._failures >= FAILURES:
            self._until = self._clock() + self._pause
            self._pause = min(2 * self._pause, LONGEST)
