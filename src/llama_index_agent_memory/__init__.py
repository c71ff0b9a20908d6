"""LlamaIndex on persistent key-value memory: a model for MLX whose sessions outlive the process."""

from importlib.metadata import version

from llama_index_agent_memory.llm import MLXPersistentLLM
from llama_index_agent_memory.sessions import memory_session

__version__ = version("agent-memory-mlx")

__all__ = ["MLXPersistentLLM", "__version__", "memory_session"]
