"""Agents that outlive their process: a system prompt, a history and what the model made of them, by an id."""

from agent_memory_core.agents.contexts import AgentContext, AgentInfo, AgentState, SavedAgent
from agent_memory_core.agents.errors import AgentExists, AgentNotFound, AgentNotSaved, AgentsBusy
from agent_memory_core.agents.manager import PersistentAgentManager
from agent_memory_core.agents.templates import AgentTemplate
from agent_memory_core.agents.turns import AgentStream, AgentTurn, AsyncAgentStream

__all__ = [
    "AgentContext",
    "AgentExists",
    "AgentInfo",
    "AgentNotFound",
    "AgentNotSaved",
    "AgentState",
    "AgentStream",
    "AgentTemplate",
    "AgentTurn",
    "AgentsBusy",
    "AsyncAgentStream",
    "PersistentAgentManager",
    "SavedAgent",
]
