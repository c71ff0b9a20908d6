"""What callers can be told of, and who is."""

from __future__ import annotations

import logging
from collections.abc import Callable

from agent_memory_core import InvalidSetting
from agent_memory_core.manager.parameters import near

log = logging.getLogger("agent_memory")

EVENTS: tuple[str, ...] = ("loaded", "evicted", "unloaded", "load_failed", "fallback", "over_limit")
"""What a callback can be registered for. "evicted" is an unload of the manager's own accord."""


class Callbacks:
    """Those who want to be told."""

    def __init__(self) -> None:
        self._by_event: dict[str, list[Callable[[str], object]]] = {event: [] for event in EVENTS}

    def register(self, event: str, callback: Callable[[str], object]) -> Callable[[], None]:
        """See `ModelManager.register_callback`."""
        if event not in EVENTS:
            raise InvalidSetting(f"event={event!r} is not valid: {near(event, EVENTS)}")
        callbacks = self._by_event[event]
        callbacks.append(callback)

        def unregister() -> None:
            if callback in callbacks:
                callbacks.remove(callback)

        return unregister

    def tell(self, event: str, name: str) -> None:
        """Call all who are registered."""
        for callback in list(self._by_event[event]):
            try:
                callback(name)
            except Exception:
                # Somebody else's code: the model is loaded or unloaded all the same.
                log.exception("a callback for %r failed", event)
