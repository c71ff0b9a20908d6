"""The configuration file of the application, as Ray Serve reads it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent_memory_core import EngineConfig, InvalidSetting

NAME = "agent-memory"
"""The application."""

DEPLOYMENT = "node"
"""Its one deployment."""

RESOURCE = "mlx"
"""What a machine that runs a replica says it has, in ``ray start --resources='{"mlx": 1}'``."""

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


POINTS = 400
"""Points of each node on the ring. With Ray's 100 the fullest of many nodes has 40 percent more than its share of the
sessions, and each change of the nodes sorts all points anew."""


class Arguments(BaseModel):
    """What the configuration file gives to every replica."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of `EngineConfig`. In ``cache_dir`` ``{node}`` stands for the id of the node.",
    )
    server: dict[str, Any] = Field(default_factory=dict, description="Fields of `ServerSettings`.")
    drain: float = Field(
        default=120.0, gt=0, description="Seconds that a replica gets to end its turns and to upload."
    )
    max_ongoing: int = Field(default=64, ge=1, description="Most requests of a replica at a time.")
    cpus: float = Field(default=0.0, ge=0, description="CPUs that Ray counts for a replica.")
    resource: str = Field(
        default=RESOURCE, min_length=1, description="The resource that a replica takes one of."
    )


def serve_config(
    nodes: int, *, host: str = "127.0.0.1", port: int = 8000, everywhere: bool = True, **arguments: Any
) -> dict[str, Any]:
    """The configuration of a cluster: the same again with other ``nodes`` changes their number and restarts nobody.

    Args:
        nodes: machines that run a replica.
        host: the address that every machine listens on.
        port: the port.
        everywhere: whether every machine listens, or only the head, behind which the others are then.
        arguments: fields of `Arguments`.

    Raises:
        InvalidSetting: a value cannot be used, or there is no cold tier.
    """
    if nodes < 1:
        raise InvalidSetting(f"nodes={nodes!r} is not valid: a whole number of at least 1.")
    try:
        given = Arguments(**arguments)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise InvalidSetting(f"{name}={first['input']!r} is not valid: {first['msg']}.") from None
    config = EngineConfig(**given.engine)
    if config.cold_url is None or config.cache_dir is None:
        raise InvalidSetting(
            "several machines share nothing but the cold tier: give the engine a cold_url, such as s3://bucket/folder, "
            "and a cache_dir."
        )
    return {
        "proxy_location": "EveryNode" if everywhere else "HeadOnly",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": "agent_memory_core.scale._app:build",
                "args": given.model_dump(),
                "deployments": [{"name": DEPLOYMENT, "num_replicas": nodes}],
            }
        ],
    }
