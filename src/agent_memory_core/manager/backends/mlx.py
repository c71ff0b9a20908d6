"""Models on MLX: an `AgentMemory`, which others reach too, by the same settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agent_memory_core import AgentMemory, ChatStream, Delta, weights_on_disk
from agent_memory_core.manager.backends.base import Asked
from agent_memory_core.manager.config import MIB, ModelConfig

MOST_KV = 8 * 1024
"""MiB for the KV of one model where its configuration says nothing."""


def settings_of(config: ModelConfig, limit: int) -> dict[str, Any]:
    """The settings of a model's engine. The memory for its KV is always named: it is a part of what the model takes.

    Whoever gives these settings to `AgentMemory.shared` reaches the managed engine.
    """
    settings = {"memory_budget_mb": _kv_mb(config, limit), **config.native, "model": config.path}
    if config.context_length is not None:
        settings["context_length"] = config.context_length
    return settings


def _kv_mb(config: ModelConfig, limit: int) -> int:
    stated: int | None = config.native.get("memory_budget_mb")
    return stated if stated is not None else max(1, min(MOST_KV, limit // 4 // MIB))


class LoadedMlx:
    """An engine in memory."""

    def __init__(self, memory: AgentMemory, kv_bytes: int) -> None:
        self.native = memory
        self.tokenizer = memory
        self.nbytes = memory.weights_bytes + kv_bytes

    def chat(self, asked: Asked) -> Iterator[Delta]:
        """Run a turn; the engine runs several at once."""
        stream: ChatStream = self.native.chat(asked.request, asked.session, stream=True)
        return stream

    def cancel(self) -> None:
        """Withdraw all turns, also those of a framework's models."""
        self.native.unload(0, cancel=True)

    def unload(self) -> None:
        """Write what is queued and free the model."""
        self.native.unload()


class MlxBackend:
    """Loads models on MLX."""

    def estimate(self, config: ModelConfig, limit: int) -> int:
        """The weights on disk and the memory for KV; a hub id whose files are not here counts without its weights."""
        if config.memory_mb is not None:
            return config.memory_mb * MIB
        return (weights_on_disk(config.path) or 0) + _kv_mb(config, limit) * MIB

    def memory(self, config: ModelConfig, limit: int) -> AgentMemory:
        """The engine of a model, loaded or not."""
        return AgentMemory.shared(**settings_of(config, limit))

    def load(self, config: ModelConfig, limit: int) -> LoadedMlx:
        """Load the weights."""
        memory = self.memory(config, limit)
        memory.load()
        return LoadedMlx(memory, _kv_mb(config, limit) * MIB)


class GivenMlx(MlxBackend):
    """Runs an engine that somebody else has made, and closes."""

    def __init__(self, memory: AgentMemory) -> None:
        self._memory = memory

    def memory(self, config: ModelConfig, limit: int) -> AgentMemory:
        """That engine."""
        return self._memory


def config_of(memory: AgentMemory) -> ModelConfig:
    """The configuration of an engine that is there already; it stays in memory until its room is needed."""
    config = memory.config
    stated = {"memory_budget_mb": config.memory_budget_mb, "cache_dir": config.cache_dir}
    return ModelConfig(
        name=memory.model_name,
        type="mlx",
        path=memory.model_name,
        context_length=config.context_length,
        parameters={name: value for name, value in stated.items() if value is not None},
        max_idle_time=None,
    )
