"""Where a session stands, as it is told to others."""

from __future__ import annotations

from dataclasses import dataclass

from agent_memory_core.coordination import turns
from agent_memory_core.coordination.books import Book
from agent_memory_core.coordination.spec import AgentRole, SessionSpec
from agent_memory_core.coordination.store import Stored


@dataclass(frozen=True, slots=True)
class AgentState:
    """An agent of a session."""

    agent_id: str
    name: str
    role: str
    lifecycle: str
    message_count: int
    """How often it has spoken."""


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """Where a session stands."""

    session_id: str
    spec: SessionSpec
    turn: int
    """How many turns there were."""
    is_active: bool
    """Whether something can still happen in it."""
    next_speaker: str | None
    """Who speaks next if nobody is named; None where it is over."""
    agents: tuple[AgentState, ...]
    question: str | None
    """What is being voted on."""
    created: float
    """Seconds since the epoch."""


def is_active(stored: Stored) -> bool:
    """Whether something can still happen in a session."""
    return not stored.closed and not turns.is_over(stored.book)


def status_of(stored: Stored) -> SessionStatus:
    """Where a session stands."""
    book, active = stored.book, is_active(stored)
    return SessionStatus(
        stored.session_id,
        book.spec,
        book.turns,
        active,
        turns.next_speaker(book) if active else None,
        tuple(_state(book, agent) for agent in book.spec.agents),
        stored.asking["question"] if stored.asking is not None else None,
        stored.created,
    )


def _state(book: Book, agent: AgentRole) -> AgentState:
    count = sum(event.sender_id == agent.agent_id for event in book.events)
    return AgentState(agent.agent_id, agent.name, agent.role, agent.lifecycle, count)
