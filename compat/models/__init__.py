"""The package `models`, as code that was written for it imports it. All of it is `agent_memory_core.manager`."""

from agent_memory_core.manager import (
    ManagedModel,
    ManagerConfig,
    ModelConfig,
    ModelManager,
    ModelStats,
    get_model_manager,
    initialize_model_manager,
)

__all__ = [
    "ManagedModel",
    "ManagerConfig",
    "ModelConfig",
    "ModelManager",
    "ModelStats",
    "get_model_manager",
    "initialize_model_manager",
]
