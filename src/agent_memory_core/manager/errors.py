"""What goes wrong with a set of models, below `AgentMemoryError`.

ManagerError
├── UnknownModel          no model of that name in the configuration (also a ValueError)
├── ModelLoadFailed       a model cannot be loaded (also a ModelError, and no ValueError); its cause is kept
│   ├── ModelTooLarge     it can never fit beside what is pinned
│   └── LoadTimeout       other models were in use for too long (also a TimeoutError)
└── ManagerClosed         the manager was shut down, or its process was forked
"""

from __future__ import annotations

from agent_memory_core import AgentMemoryError, ModelError


class ManagerError(AgentMemoryError):
    """Root of what a `ModelManager` raises."""


class UnknownModel(ManagerError, ValueError):
    """No model of that name is configured."""


class ModelLoadFailed(ManagerError, ModelError):
    """A model cannot be loaded now."""


class ModelTooLarge(ModelLoadFailed):
    """A model can never fit, whatever else is unloaded; nothing was."""


class LoadTimeout(ModelLoadFailed, TimeoutError):
    """The memory that a model needs was not free in time."""


class ManagerClosed(ManagerError):
    """The manager takes no more requests."""
