"""`ChatMLXPersistent` for LangChain. All of it is `langchain_agent_memory`, of the distribution `agent-memory-mlx`."""

from langchain_agent_memory import (
    ChatMLXPersistent,
    Reuse,
    ReuseHandler,
    SessionKey,
    __version__,
    register_provider,
)

__all__ = ["ChatMLXPersistent", "Reuse", "ReuseHandler", "SessionKey", "__version__", "register_provider"]
