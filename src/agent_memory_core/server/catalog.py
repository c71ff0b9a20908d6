"""The models that are served, under each of their names, as the clients' lists of models have it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI

from agent_memory_core.server.errors import MODEL_NOT_FOUND, ApiError
from agent_memory_core.server.host import Host
from agent_memory_core.server.settings import ServerSettings


class Catalog:
    """The names of the models."""

    def __init__(self, host: Host, settings: ServerSettings) -> None:
        self._host = host
        self._created = int(time.time())
        self.read(settings)

    def read(self, settings: ServerSettings) -> None:
        """Take other names for the model that is meant where none is named."""
        self._any, self._aliases = settings.any_model, settings.model_alias

    @property
    def names(self) -> dict[str, str]:
        """The model behind each name, the one that is meant where none is named first."""
        served, *others = self._host.names()
        own = (served, served.rstrip("/").rpartition("/")[2], *self._aliases)
        return dict.fromkeys(own, served) | {other: other for other in others}

    def find(self, name: str) -> str:
        """The model that a request asks for.

        Raises:
            ApiError: there is none of that name.
        """
        names = self.names
        if name not in names and name not in ("", "default") and not self._any:
            raise ApiError(
                MODEL_NOT_FOUND,
                f"The model {name!r} does not exist: this server has {', '.join(names)}. Name one of them, give the "
                "server an alias for it, or start it with --any-model.",
                param="model",
            )
        return names.get(name, self._host.served)

    def add_to(self, app: FastAPI) -> None:
        """Add the paths of models."""
        for prefix in ("/v1", ""):
            app.add_api_route(f"{prefix}/models", self.list, methods=["GET"])
            app.add_api_route(f"{prefix}/models/{{name:path}}", self.one, methods=["GET"])

    async def list(self) -> dict[str, Any]:
        """All names; one object that both SDKs can read."""
        entries = [self._entry(name, model) for name, model in self.names.items()]
        ends = {"has_more": False, "first_id": entries[0]["id"], "last_id": entries[-1]["id"]}
        return {"object": "list", "data": entries, **ends}

    async def one(self, name: str) -> dict[str, Any]:
        """One name, which may hold slashes."""
        return self._entry(name, self.find(name))

    def _entry(self, name: str, model: str) -> dict[str, Any]:
        memory = self._host.engine(model)
        context = memory.stated_context_length
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "created": self._created,
            "created_at": datetime.fromtimestamp(self._created, UTC).isoformat(),
            "owned_by": "agent-memory",
            "display_name": name,
            "lifecycle": "active",
            "loaded": memory.weights_bytes > 0,
            "capabilities": _capabilities(thinks=bool(memory.stated_reasoning)),
            "context_length": context,
            "max_input_tokens": context,
            "max_tokens": context,
        }


def _capabilities(*, thinks: bool) -> dict[str, Any]:
    """What a model can do, in the words of Anthropic's list of models."""
    yes, no, perhaps = {"supported": True}, {"supported": False}, {"supported": thinks}
    missing = ("batch", "citations", "code_execution", "context_management", "image_input", "pdf_input")
    degrees = {degree: perhaps for degree in ("low", "medium", "high", "xhigh", "max")}
    kinds = {kind: perhaps for kind in ("adaptive", "between_tools", "disabled", "enabled")}
    return {name: no for name in missing} | {
        "effort": {**perhaps, **degrees},
        "server_tools": {**no, "code_execution": no, "web_search": no},
        "structured_outputs": yes,
        "thinking": {**perhaps, "types": kinds},
    }
