"""Agents that talk, vote and remember, on the memory of `agent_memory_core`."""

from agent_memory_core.coordination.books import Event
from agent_memory_core.coordination.errors import AgentBusy, InvalidTurn
from agent_memory_core.coordination.spec import AgentRole, Said, SessionSpec
from agent_memory_core.coordination.tallies import Ballot, Decision

__all__ = ["AgentBusy", "AgentRole", "Ballot", "Decision", "Event", "InvalidTurn", "Said", "SessionSpec"]
