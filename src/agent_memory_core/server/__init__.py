"""An HTTP server for the dialects of OpenAI and Anthropic (extra ``server``)."""

from agent_memory_core.server.app import create_app
from agent_memory_core.server.run import serve
from agent_memory_core.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "serve"]
