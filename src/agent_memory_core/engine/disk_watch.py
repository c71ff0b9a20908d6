"""Whether turns can be saved now, for whoever decides where the next ones go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agent_memory_core.errors import OverBudget, StoreError


class DiskWatch:
    """What is wrong with the disk. Any thread may ask, and nobody waits for it; all else runs on the writer's thread.

    After a save that failed, it is tried now and then whether another one could work: where turns are sent elsewhere
    because of it, no turn would ever tell. A try proves less than a save, so the pauses between tries grow until a
    turn is saved.

    Args:
        try_to_write: writes something and removes it; raises StoreError or OSError where that cannot be done.
        later: has a job done on the writer's thread.
        patience: seconds after which a disk that does not answer is wrong, too.
    """

    FIRST, LONGEST = 5.0, 60.0
    """Seconds: the first and the longest pause before a try."""

    def __init__(
        self,
        try_to_write: Callable[[], None],
        later: Callable[[Callable[[], None]], object],
        patience: float,
    ) -> None:
        self._try_to_write, self._later, self._patience = try_to_write, later, patience
        self._error: str | None = None
        self._asked: float | None = None
        self._pause = self.FIRST
        self._timer: threading.Timer | None = None

    @property
    def trouble(self) -> str | None:
        """What is wrong; None where nothing is known to be."""
        asked = self._asked
        if asked is not None and time.monotonic() - asked >= self._patience:
            return f"the disk has not answered for {self._patience:g} seconds."
        return self._error

    @contextmanager
    def asking(self) -> Iterator[None]:
        """The disk is waited for, for the length of a block."""
        self._asked = time.monotonic()
        try:
            yield
        finally:
            self._asked = None

    def worked(self) -> None:
        """A turn was saved."""
        self._error, self._pause = None, self.FIRST

    def failed(self, error: Exception) -> None:
        """A turn was not saved. What the budget has no room for says nothing of the disk."""
        if isinstance(error, OverBudget):
            return
        self._error = str(error)
        if self._timer is None:
            self._timer = threading.Timer(self._pause, self._later, (self._try,))
            self._timer.daemon = True
            self._timer.start()
            self._pause = min(2 * self._pause, self.LONGEST)

    def close(self) -> None:
        """Try no more."""
        if (timer := self._timer) is not None:
            timer.cancel()

    def _try(self) -> None:
        self._timer = None
        if self._error is None:
            return
        try:
            with self.asking():
                self._try_to_write()
        except (StoreError, OSError) as error:
            self.failed(error)
        else:
            self._error = None
