"""What callers read of an agent: its context, its line in a list, and what saving it came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from agent_memory_core import TurnReport

AgentState = Literal["prefilled", "active", "evicted", "loaded"]
"""Where an agent is in its life.

"prefilled": its system prompt was read and nothing said yet. "active": it has answered. "evicted": it was saved and
left memory. "loaded": it came back from disk and has not answered since.
"""


@dataclass
class AgentContext:
    """An agent in memory. The manager keeps it up to date; what is written to it changes nothing of the agent."""

    agent_id: str
    agent_type: str
    system_prompt: str = field(repr=False)
    created: datetime
    last_access: datetime
    """When its last turn ended, or when it was loaded. The agent used longest ago is the first to leave memory."""
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    template: str | None = None
    """The template that its system prompt was made from."""
    conversation_history: list[dict[str, str]] = field(default_factory=list, repr=False)
    """Role and content of every message but the system prompt, oldest first."""
    cache_tokens: int = 0
    """Tokens of its conversation whose keys and values are kept."""
    state: AgentState = "loaded"
    persisted: bool = True
    """Whether all of it is on disk."""
    last_report: TurnReport | None = None
    """What its last turn, or reading its system prompt, did; None while it has done nothing in this process."""


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """One line of the list of agents, in memory or on disk."""

    agent_id: str
    agent_type: str
    model: str
    """The model that answered last."""
    messages: int
    """How many messages its history has, the system prompt not counted."""
    created: datetime
    last_access: datetime
    in_memory: bool


@dataclass(frozen=True, slots=True)
class SavedAgent:
    """What saving an agent came to."""

    agent_id: str
    tokens: int
    """Tokens of its conversation that are on disk."""
    nbytes: int
    """Bytes that they take there, those that others share included."""
    persisted: bool
    seconds: float
