"""LlamaIndex on persistent key-value memory: a model for MLX whose sessions outlive the process."""

from importlib.metadata import version

from llama_index_agent_memory.documents import DOCUMENTS_PROMPT, InOrderOfId
from llama_index_agent_memory.llm import MLXPersistentLLM
from llama_index_agent_memory.provider import register_llm
from llama_index_agent_memory.sessions import memory_session
from llama_index_agent_memory.token_counter import CachedTokenCounter

__version__ = version("agent-memory-mlx")

__all__ = [
    "CachedTokenCounter",
    "DOCUMENTS_PROMPT",
    "InOrderOfId",
    "MLXPersistentLLM",
    "__version__",
    "memory_session",
    "register_llm",
]
