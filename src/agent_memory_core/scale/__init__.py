"""One server on many machines: an application of Ray Serve (extra ``scale``)."""

from agent_memory_core.scale.config import serve_config
from agent_memory_core.scale.deploy import deploy, status

__all__ = ["deploy", "serve_config", "status"]
