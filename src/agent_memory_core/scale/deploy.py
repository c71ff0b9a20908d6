"""Giving a configuration to a running Ray, by the REST interface of its dashboard."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from agent_memory_core import AgentMemoryError, InvalidSetting
from agent_memory_core.scale.config import NAME

DASHBOARD = "http://127.0.0.1:8265"
"""Where Ray's dashboard listens by default."""

_PATH = "/api/serve/applications/"
_TIMEOUT = 30.0
_PAUSE = 0.5


class NotDeployed(AgentMemoryError):
    """Ray has not started the application."""


def deploy(config: Mapping[str, Any], dashboard: str = DASHBOARD, timeout: float = 600.0) -> None:
    """Put a configuration into effect, and wait until the application runs as it says.

    Raises:
        InvalidSetting: there is no dashboard of Ray at that address, or it refuses the configuration.
        NotDeployed: a replica does not start, or not in time.
    """
    _ask(dashboard, "PUT", json.dumps(config).encode())
    deadline = time.monotonic() + timeout
    while (found := status(dashboard))["status"] != "RUNNING":
        if found["status"] == "DEPLOY_FAILED":
            raise NotDeployed(f"the application does not start: {found['message']}")
        if time.monotonic() > deadline:
            raise NotDeployed(f"the application has not started in {timeout:g} seconds: {found['message']}")
        time.sleep(_PAUSE)


def status(dashboard: str = DASHBOARD) -> dict[str, Any]:
    """What Ray says of the application: its ``status``, a ``message``, and the state of its ``replicas`` by node.

    Raises:
        InvalidSetting: there is no dashboard of Ray at that address.
    """
    found = json.loads(_ask(dashboard, "GET"))["applications"].get(NAME)
    if found is None:
        return {"status": "NOT_STARTED", "message": "", "replicas": {}}
    replicas = [
        replica for deployment in found.get("deployments", {}).values() for replica in deployment["replicas"]
    ]
    return {
        "status": found["status"],
        "message": found["message"],
        "replicas": {
            replica.get("node_id") or replica["replica_id"]: replica["state"] for replica in replicas
        },
    }


def _ask(dashboard: str, method: str, data: bytes | None = None) -> bytes:
    try:
        request = urllib.request.Request(
            dashboard.rstrip("/") + _PATH, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()[-500:]
        raise InvalidSetting(f"Ray refuses the configuration: {said}") from error
    except (OSError, ValueError) as error:
        raise InvalidSetting(
            f"dashboard={dashboard!r} does not answer: {error}. Start Ray with: ray start --head "
            f"""--resources='{{"mlx": 1}}'"""
        ) from error
