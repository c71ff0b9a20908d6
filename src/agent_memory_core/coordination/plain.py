"""Parts of a book as plain data that JSON can hold, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from agent_memory_core.coordination.books import Event, Exchange, Mind, Spoken


def event_data(event: Event) -> dict[str, Any]:
    """An event as plain data."""
    return asdict(event) | {"visible_to": sorted(event.visible_to)}


def event_of(data: Mapping[str, Any]) -> Event:
    """An event from plain data."""
    return Event(**{**data, "visible_to": frozenset(data["visible_to"])})


def spoken_data(once: Spoken) -> dict[str, Any]:
    """One time that an agent spoke, as plain data."""
    return asdict(once)


def spoken_of(data: Mapping[str, Any]) -> Spoken:
    """One time that an agent spoke, from plain data."""
    return Spoken(**data)


def mind_data(mind: Mind) -> dict[str, Any]:
    """What an agent brings into a session, as plain data."""
    return asdict(mind)


def mind_of(data: Mapping[str, Any]) -> Mind:
    """What an agent brings into a session, from plain data."""
    return Mind(**{**data, "exchanges": tuple(Exchange(**each) for each in data["exchanges"])})
