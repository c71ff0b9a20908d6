"""Chat models of a `ModelManager`: they hold no weights, and ask the manager at every call."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from langchain_core.language_models import BaseChatModel
from pydantic import Field

from agent_memory_core import AgentMemory, BackendMissing
from langchain_agent_memory.chat_models import ChatMLXPersistent


class ManagedChatModel(ChatMLXPersistent):
    """A managed model of the type gguf or huggingface. Sessions mean nothing to it: it reads every prompt whole."""

    managed: Any = Field(exclude=True, repr=False)
    """The `ManagedModel`."""

    @property
    def _llm_type(self) -> str:
        return f"managed-{self.managed.type}"

    def _memory(self, model: str | None = None) -> AgentMemory:
        memory: AgentMemory = self.managed.as_memory
        return memory


def chat_model(managed: Any, settings: Mapping[str, Any]) -> BaseChatModel:
    """The chat model of a `ManagedModel`: on MLX a `ChatMLXPersistent` of the managed engine.

    Args:
        managed: the model.
        settings: the fields of the chat model.

    Raises:
        BackendMissing: it is at an endpoint, and langchain-openai is not installed.
    """
    if managed.type == "mlx":
        return ChatMLXPersistent(**settings)
    if managed.type == "openai":
        try:
            made = importlib.import_module("langchain_openai").ChatOpenAI
        except ImportError as error:
            raise BackendMissing(
                f"a LangChain model of an endpoint: pip install langchain-openai ({error})."
            ) from error
        endpoint: BaseChatModel = made(**{k: v for k, v in settings.items() if k not in _OURS})
        return endpoint
    return ManagedChatModel(managed=managed, model=managed.name, **settings)


_OURS = frozenset({"top_k", "min_p", "repetition_penalty"})
"""Sampling values that LangChain's class for endpoints does not know."""
