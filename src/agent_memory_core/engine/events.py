"""What happens to turns, told to whoever wants to know: metrics, progress bars, pages, tests.

Observers are called on the engine's thread, between two pieces of work, so they must not block: whoever has
something slow to do puts the event into a queue of its own. An observer that raises is logged and harms nobody.
The events of one turn come in this order; a turn that was refused has none:

    TurnQueued    TurnAdmitted    TurnProgress ...    FirstToken    TurnFinished    TurnSaved
                  any of these may be followed by TurnCancelled or TurnFailed instead, which ends the turn
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent_memory_core.messages import HitTier, SessionKey, TurnReport

log = logging.getLogger("agent_memory")


@dataclass(frozen=True, slots=True)
class TurnInfo:
    """Which turn it is."""

    turn_id: int
    """Unique in one engine; it grows with every turn."""
    key: SessionKey
    """Whose turn it is: the object that the caller gave, where it gave one, by which it knows its own turn."""
    background: bool
    """Whether it is background work, for which nobody waits."""


@dataclass(frozen=True, slots=True)
class TurnEvent:
    """Something that happened to a turn."""

    turn: TurnInfo


@dataclass(frozen=True, slots=True)
class TurnQueued(TurnEvent):
    """The prompt was read and waits for its place."""

    prompt_tokens: int
    max_tokens: int
    """Most tokens of its answer; 0 for a prewarm."""


@dataclass(frozen=True, slots=True)
class TurnAdmitted(TurnEvent):
    """What is stored of the prompt is in its live cache.

    It comes a second time for a turn that waited for its first chunk while others stored more of its prompt.
    """

    cached_tokens: int
    """Prompt tokens that need not be computed."""
    tier: HitTier
    """Where they came from."""


@dataclass(frozen=True, slots=True)
class TurnProgress(TurnEvent):
    """Prompt tokens [start, stop) were computed, in one forward pass."""

    start: int
    stop: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class FirstToken(TurnEvent):
    """The prompt is computed and the first token of the answer sampled."""

    token_id: int
    logits: Any = field(compare=False, repr=False)
    """The array [1, vocabulary] that the token was sampled from; to be read during the call only."""


@dataclass(frozen=True, slots=True)
class TurnFinished(TurnEvent):
    """The answer is complete. If the turn has a session on disk, its commit follows, then its reader's last delta."""

    report: TurnReport
    """What it did; ``persisted`` is False, since the commit is still to come."""


@dataclass(frozen=True, slots=True)
class TurnSaved(TurnEvent):
    """The turn's commit was carried out, or failed: ``report.persisted`` tells."""

    report: TurnReport


@dataclass(frozen=True, slots=True)
class TurnCancelled(TurnEvent):
    """The turn was withdrawn, at whatever stage. Its ``report.finish_reason`` is "cancelled"."""

    report: TurnReport


@dataclass(frozen=True, slots=True)
class TurnFailed(TurnEvent):
    """The turn was given up because the engine met a fault or was closed."""

    error: Exception


@dataclass(frozen=True, slots=True)
class BlocksEvicted:
    """Blocks were dropped from memory to make room; those of sessions on disk can still be loaded from there."""

    blocks: int
    """How many since the last such event."""


Event = TurnEvent | BlocksEvicted
Observer = Callable[[Event], None]


class Observers:
    """Everybody who wants to be told. Adding and removing may be done from any thread."""

    def __init__(self) -> None:
        self._observers: tuple[Observer, ...] = ()

    def add(self, observer: Observer) -> Callable[[], None]:
        """Tell ``observer`` of every event from now on; call what is returned to stop that."""
        # A new tuple each time: whoever is walking through the old one is not disturbed.
        entry: Observer = lambda event: observer(event)  # noqa: E731
        self._observers = (*self._observers, entry)

        def remove() -> None:
            self._observers = tuple(other for other in self._observers if other is not entry)

        return remove

    def tell(self, event: Event) -> None:
        """Hand an event to every observer."""
        for observer in self._observers:
            try:
                observer(event)
            except Exception:
                # Somebody else's code: whatever it does, the turn goes on.
                log.exception("an observer failed on %s", type(event).__name__)
