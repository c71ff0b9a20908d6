"""The manager of the process, for agents that only know their own names."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agent_memory_core import AgentMemoryError, ChatResult, Conversation
from agent_memory_core.manager.handle import ManagedModel, ManagedStream
from agent_memory_core.manager.manager import ModelManager

CONFIG_VARIABLE = "AGENT_MEMORY_MANAGER_CONFIG"
"""Names the configuration of the manager of the process."""

DEFAULT_CONFIG = Path("src/models/config.json")
"""Read from the working directory where the variable is not set, if it is there."""

_default: ModelManager | None = None
_making = threading.Lock()


def initialize_model_manager(config_path: str | os.PathLike[str] | None = None) -> ModelManager:
    """Make the manager of the process, and shut the one before down.

    Raises:
        InvalidSetting: the configuration cannot be used; then the one before stays.
    """
    global _default
    with _making:
        manager = ModelManager(config_path)
        before, _default = _default, manager
    if before is not None:
        before.shutdown()
    return manager


def get_model_manager() -> ModelManager:
    """The manager of the process; made at the first call, from `CONFIG_VARIABLE`, else `DEFAULT_CONFIG`, else empty.

    Raises:
        InvalidSetting: the configuration cannot be used.
    """
    global _default
    with _making:
        if _default is None or _default.closed:
            named = os.environ.get(CONFIG_VARIABLE)
            found = DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None
            _default = ModelManager(named or found)
        return _default


def get_agent_model(agent_name: str) -> ManagedModel:
    """The model of an agent, loaded.

    Raises:
        UnknownModel: there is no model at all.
        ModelLoadFailed: it cannot be loaded.
    """
    return get_model_manager().get_model_for_agent(agent_name)


class ModelManagerAdapter:
    """An agent's access to its model: it asks the manager every time, and so keeps nothing in memory."""

    def __init__(self, agent_name: str, manager: ModelManager | None = None) -> None:
        self.agent_name = agent_name
        self._manager = manager

    @property
    def manager(self) -> ModelManager:
        """The manager that it asks."""
        return self._manager if self._manager is not None else get_model_manager()

    @property
    def model(self) -> ManagedModel:
        """The agent's model, loaded."""
        return self.manager.get_model_for_agent(self.agent_name)

    def generate(self, prompt: Any = None, **params: Any) -> Any:
        """`ManagedModel.generate` of the agent's model."""
        return self.model.generate(prompt, **params)

    def chat(self, messages: Conversation, **options: Any) -> ChatResult:
        """`ManagedModel.chat` of the agent's model."""
        return self.model.chat(messages, **options)

    def stream(self, messages: Conversation, **options: Any) -> ManagedStream:
        """`ManagedModel.stream` of the agent's model."""
        return self.model.stream(messages, **options)

    def get_memory_usage(self) -> dict[str, Any]:
        """`ModelManager.get_memory_usage`."""
        return self.manager.get_memory_usage()

    def unload(self, force: bool = False) -> bool:
        """Unload the agent's model; return whether it was unloaded."""
        return self.manager.unload_model(self.manager.model_name_for_agent(self.agent_name), force)


def create_model_adapter(agent_name: str) -> ModelManagerAdapter:
    """The access of an agent to its model; nothing is loaded yet."""
    return ModelManagerAdapter(agent_name)


def preload_agent_models(agent_names: Iterable[str]) -> dict[str, bool]:
    """Load the models of agents; return for each agent whether that was possible."""
    done = {}
    for name in agent_names:
        try:
            get_agent_model(name)
            done[name] = True
        except AgentMemoryError:
            done[name] = False
    return done
