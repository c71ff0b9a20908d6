"""`MLXPersistentLLM` for LlamaIndex; all of it is `llama_index_agent_memory`, of `agent-memory-mlx`."""

from llama_index_agent_memory import (
    CachedTokenCounter,
    InOrderOfId,
    MLXPersistentLLM,
    __version__,
    memory_session,
    register_llm,
)

__all__ = [
    "CachedTokenCounter",
    "InOrderOfId",
    "MLXPersistentLLM",
    "__version__",
    "memory_session",
    "register_llm",
]
