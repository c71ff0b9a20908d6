"""What coordination raises beside the errors of the package."""

from agent_memory_core import AgentMemoryError, InvalidRequest


class InvalidTurn(InvalidRequest):
    """A session cannot do that now: it is over, it is another's turn, or whoever is named takes no part."""


class AgentBusy(AgentMemoryError):
    """A permanent agent is in a session that is still active."""
