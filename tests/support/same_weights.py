"""A model that another library runs, beside the same weights on MLX, and what both are asked."""

from __future__ import annotations

from typing import Any

from agent_memory_core.manager import ManagerConfig, ModelManager

HISTORY = [
    {"role": "user", "content": "My name is Ada."},
    {"role": "assistant", "content": "Nice to meet you, Ada."},
    {"role": "user", "content": "What is my name?"},
]
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}


def beside_mlx(model: dict[str, Any]) -> ModelManager:
    """A manager of a model and of the embedded one on MLX, which is called ``m``."""
    parameters = {"cache_dir": None, "max_tokens": 24}
    mlx = {"name": "m", "type": "mlx", "path": "tiny-chat", "parameters": parameters}
    config: dict[str, Any] = {"models": [model, mlx], "max_memory_mb": 2000}
    return ModelManager(ManagerConfig(**config))
