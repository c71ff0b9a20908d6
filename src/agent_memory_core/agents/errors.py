"""What agents add to the errors of the package. What else can go wrong is an error of the memory below."""

from __future__ import annotations

from agent_memory_core import AgentMemoryError, InvalidRequest, SessionNotFound, StoreError


class AgentNotFound(SessionNotFound, ValueError):
    """No agent of that id was created in that namespace."""


class AgentExists(InvalidRequest):
    """There is an agent of that id already."""


class AgentsBusy(AgentMemoryError, TimeoutError):
    """An agent, or every agent that could make room, had turns under way for longer than the timeout."""


class AgentNotSaved(StoreError):
    """An agent cannot be written to disk, so it stays in memory and makes no room."""
