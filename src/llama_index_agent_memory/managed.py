"""Models of a `ModelManager` for LlamaIndex: they hold no weights, and ask the manager at every call."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from llama_index.core.llms.llm import LLM
from pydantic import Field

from agent_memory_core import AgentMemory, BackendMissing
from llama_index_agent_memory.llm import MLXPersistentLLM


class ManagedLLM(MLXPersistentLLM):
    """A managed model of the type gguf or huggingface. Sessions mean nothing to it: it reads every prompt whole."""

    managed: Any = Field(exclude=True, repr=False)
    """The `ManagedModel`."""

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex knows this class."""
        return "ManagedLLM"

    def _context_window(self) -> int:
        return self._memory().context_length

    def _memory(self, model: str | None = None) -> AgentMemory:
        memory: AgentMemory = self.managed.as_memory
        return memory


def chat_model(managed: Any, settings: Mapping[str, Any]) -> LLM:
    """The model of a `ManagedModel`: on MLX an `MLXPersistentLLM` of the managed engine.

    Args:
        managed: the model.
        settings: the fields of the model.

    Raises:
        BackendMissing: it is at an endpoint, and llama-index-llms-openai-like is not installed.
    """
    if managed.type == "mlx":
        return MLXPersistentLLM(**settings)
    if managed.type == "openai":
        try:
            made = importlib.import_module("llama_index.llms.openai_like").OpenAILike
        except ImportError as error:
            raise BackendMissing(
                f"a LlamaIndex model of an endpoint: pip install llama-index-llms-openai-like ({error})."
            ) from error
        named = {_NAMES.get(name, name): value for name, value in settings.items() if name in _KNOWN}
        window = managed.config.context_length
        endpoint: LLM = made(is_chat_model=True, **named, **({"context_window": window} if window else {}))
        return endpoint
    return ManagedLLM(managed=managed, model=managed.name, **settings)


_NAMES = {"base_url": "api_base"}
_KNOWN = frozenset(
    {"model", "base_url", "api_key", "timeout", "max_retries", "default_headers", "temperature", "max_tokens"}
)
"""Settings that LlamaIndex's class for endpoints knows by these or by other names."""
