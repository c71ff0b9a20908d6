"""Sessions that nobody used for a time are deleted, as ``session_ttl_days`` says, while an engine runs."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from agent_memory_core.errors import AgentMemoryError

logger = logging.getLogger("agent_memory")

INTERVAL = 3600.0
"""Seconds between two looks at the sessions."""


Owner = TypeVar("Owner")


class Expiry(Generic[Owner]):
    """Calls something at once, and then again and again, on a thread of its own until it is stopped.

    Args:
        owner: whose sessions these are; the thread does not keep it alive, and ends after it.
        delete: deletes what is too old and returns how much that was; None says that nothing is left to look after.
        interval: seconds between two calls.
    """

    def __init__(
        self, owner: Owner, delete: Callable[[Owner], int | None], interval: float = INTERVAL
    ) -> None:
        self._owner = weakref.ref(owner)
        self._delete = delete
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agent-memory-expiry", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a deletion that it is in the middle of is finished."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _once(self) -> int | None:
        owner = self._owner()
        return None if owner is None else self._delete(owner)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if (count := self._once()) is None:
                    return
                if count:
                    logger.info("%d sessions had outlived session_ttl_days and were deleted", count)
            except AgentMemoryError as error:
                logger.warning("old sessions could not be deleted: %s", error)
            self._stopped.wait(self._interval)
