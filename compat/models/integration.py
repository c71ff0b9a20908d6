"""The module `models.integration`, as code that was written for it imports it."""

from agent_memory_core.manager import (
    ModelManagerAdapter,
    create_model_adapter,
    get_agent_model,
    get_llm_for_memos,
    get_model_manager,
    preload_agent_models,
)

__all__ = [
    "ModelManagerAdapter",
    "create_model_adapter",
    "get_agent_model",
    "get_llm_for_memos",
    "get_model_manager",
    "preload_agent_models",
]
