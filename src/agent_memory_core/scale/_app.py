"""The application that Ray Serve runs: on each node one replica, which is the whole server with one memory.

Requests are routed by Ray's consistent hashing over the header ``x-session-id``, so a session stays on one node, and
only the sessions of a node that is lost, or is added, move. That is a hint: what holds when it fails is the head of the
session in the cold tier, which every replica shares. Ray reads this module by the name in its configuration file.
"""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from agent_memory_core import AgentMemory
from agent_memory_core.scale.asgi import Named
from agent_memory_core.scale.config import DEPLOYMENT, POINTS, ROUTER, Arguments
from agent_memory_core.scale.ending import end
from agent_memory_core.server import ServerSettings, create_app


@serve.ingress()
class Node:
    """A replica.

    Args:
        arguments: what the configuration file gives it.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = Arguments(**arguments)
        self._node = str(ray.get_runtime_context().get_node_id())
        engine = dict(self._arguments.engine)
        if "cache_dir" in engine:
            engine["cache_dir"] = engine["cache_dir"].replace("{node}", self._node)
        self._memory = AgentMemory(**engine)
        self._memory.load()

    def __serve_build_asgi_app__(self) -> Any:
        app = create_app(self._memory, ServerSettings(**self._arguments.server))
        self._server = app.state.server
        return Named(app, self._node)

    def __del__(self) -> None:
        # Ray calls this when no request is left, and waits for both as long as `graceful_shutdown_timeout_s` says.
        end(self._server, self._arguments.drain)


def build(arguments: dict[str, Any]) -> Application:
    """The application of a configuration file, see `config.serve_config`."""
    given = Arguments(**arguments)
    deployment = serve.deployment(
        Node,
        name=DEPLOYMENT,
        max_ongoing_requests=given.max_ongoing,
        max_replicas_per_node=1,
        graceful_shutdown_timeout_s=given.drain,
        ray_actor_options={"num_cpus": given.cpus, "resources": {given.resource: 1}},
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,
            # Another node would answer too, but cold: it is better to wait for the one that knows the session.
            request_router_kwargs={"num_fallback_replicas": 0, "num_virtual_nodes": POINTS},
        ),
    )
    return deployment.bind(arguments)
