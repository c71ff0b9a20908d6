"""LangChain on persistent key-value memory: a chat model for MLX whose sessions outlive the process."""

from importlib.metadata import version

from agent_memory_core import SessionKey
from langchain_agent_memory.callbacks import Reuse, ReuseHandler
from langchain_agent_memory.chat_models import ChatMLXPersistent
from langchain_agent_memory.provider import register_provider

__version__ = version("agent-memory-mlx")

__all__ = ["ChatMLXPersistent", "Reuse", "ReuseHandler", "SessionKey", "__version__", "register_provider"]
