"""What became of a model so far."""

from __future__ import annotations

from dataclasses import dataclass

from agent_memory_core.manager.books import State
from agent_memory_core.manager.config import MIB
from agent_memory_core.manager.pool import Slot


@dataclass(frozen=True, slots=True)
class ModelStats:
    """What became of one model so far."""

    access_count: int
    """Leases that were taken, by calls and by `get_model`."""
    memory_usage_mb: float
    """MiB that it takes now, with its KV."""
    state: str
    """unloaded, loading, ready, unloading or failed."""
    leases: int
    """Uses under way."""
    load_count: int
    """How often it was loaded."""
    load_seconds: float
    """How long its last load took."""
    evictions: int
    """How often it made room, or idled too long."""
    idle_seconds: float
    """Since its last use; 0 while it is in use or not loaded."""
    last_access: float | None
    """Seconds since the epoch; None if it was never used."""
    last_error: str
    """Why its last load failed; empty if it did not."""


def stats_of(slot: Slot, now: float) -> ModelStats:
    """The counters of a model, at a time of the manager's clock."""
    entry = slot.entry
    idles = entry.state is State.READY and not entry.leases
    return ModelStats(
        access_count=entry.access_count,
        memory_usage_mb=round(entry.nbytes / MIB, 1),
        state=entry.state.name.lower(),
        leases=entry.leases,
        load_count=entry.load_count,
        load_seconds=entry.load_seconds,
        evictions=entry.evictions,
        idle_seconds=now - entry.last_access if idles else 0.0,
        last_access=slot.last_access,
        last_error=str(entry.error) if entry.error is not None else "",
    )
