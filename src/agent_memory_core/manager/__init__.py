"""Several models in one memory: who is loaded, who makes room for whom, and who waits.

from agent_memory_core.manager import ModelManager

with ModelManager("config.json") as manager:
    print(manager.get_model("small").generate("My name is Ada."))
"""

from agent_memory_core.manager.config import ManagerConfig, ModelConfig
from agent_memory_core.manager.errors import (
    LoadTimeout,
    ManagerClosed,
    ManagerError,
    ModelLoadFailed,
    ModelTooLarge,
    UnknownModel,
)
from agent_memory_core.manager.handle import ManagedModel, ManagedStream
from agent_memory_core.manager.integration import (
    ModelManagerAdapter,
    create_model_adapter,
    get_agent_model,
    get_model_manager,
    initialize_model_manager,
    preload_agent_models,
)
from agent_memory_core.manager.manager import ModelManager
from agent_memory_core.manager.memos import get_llm_for_memos
from agent_memory_core.manager.stats import ModelStats

__all__ = [
    "LoadTimeout",
    "ManagedModel",
    "ManagedStream",
    "ManagerClosed",
    "ManagerConfig",
    "ManagerError",
    "ModelConfig",
    "ModelLoadFailed",
    "ModelManager",
    "ModelManagerAdapter",
    "ModelStats",
    "ModelTooLarge",
    "UnknownModel",
    "create_model_adapter",
    "get_agent_model",
    "get_llm_for_memos",
    "get_model_manager",
    "initialize_model_manager",
    "preload_agent_models",
]
