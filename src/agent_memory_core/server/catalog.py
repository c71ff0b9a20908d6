"""The model that is served, under each of its names, as the clients' lists of models have it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI

from agent_memory_core.server.errors import MODEL_NOT_FOUND, ApiError
from agent_memory_core.server.host import Host
from agent_memory_core.server.settings import ServerSettings


class Catalog:
    """The names of the model."""

    def __init__(self, host: Host, settings: ServerSettings) -> None:
        self._host = host
        self._created = int(time.time())
        self.read(settings)

    def read(self, settings: ServerSettings) -> None:
        """Take other names for the model."""
        name = self._host.memory.model_name
        self._any = settings.any_model
        self.names = tuple(dict.fromkeys([name, name.rstrip("/").rpartition("/")[2], *settings.model_alias]))

    def check(self, name: str) -> None:
        """Check that a request asks for the model that is here.

        Raises:
            ApiError: it asks for another one.
        """
        if name not in (*self.names, "", "default") and not self._any:
            known = ", ".join(self.names)
            raise ApiError(
                MODEL_NOT_FOUND,
                f"The model {name!r} does not exist: this server has {known}. Name that one, give the server an alias "
                "for it, or start it with --any-model.",
                param="model",
            )

    def add_to(self, app: FastAPI) -> None:
        """Add the paths of models."""
        for prefix in ("/v1", ""):
            app.add_api_route(f"{prefix}/models", self.list, methods=["GET"])
            app.add_api_route(f"{prefix}/models/{{name:path}}", self.one, methods=["GET"])

    async def list(self) -> dict[str, Any]:
        """All names; one object that both SDKs can read."""
        entries = [self._entry(name) for name in self.names]
        ends = {"has_more": False, "first_id": self.names[0], "last_id": self.names[-1]}
        return {"object": "list", "data": entries, **ends}

    async def one(self, name: str) -> dict[str, Any]:
        """One name, which may hold slashes."""
        self.check(name)
        return self._entry(name)

    def _entry(self, name: str) -> dict[str, Any]:
        context = self._host.memory.stated_context_length
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "created": self._created,
            "created_at": datetime.fromtimestamp(self._created, UTC).isoformat(),
            "owned_by": "agent-memory",
            "display_name": name,
            "context_length": context,
            "max_input_tokens": context,
            "max_tokens": context,
        }
