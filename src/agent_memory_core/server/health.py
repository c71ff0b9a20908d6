"""Whether the server lives and takes turns. Answered without the engine, which may be busy."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from agent_memory_core import AgentMemoryError
from agent_memory_core.server.host import Host
from agent_memory_core.server.turns import Turns

LINKS = {
    "description": "/openapi.json",
    "health": "/health",
    "metrics": "/metrics",
    "models": "/v1/models",
    "page": "/ui",
}
"""Where to look next."""

STALLED = 60
"""Seconds of one step of the engine after which it is taken to be stuck; a step is made for a quarter of one."""


class Health:
    """What the health paths say."""

    def __init__(self, host: Host, turns: Turns) -> None:
        self._host, self._turns = host, turns
        self.failure: AgentMemoryError | None = None
        """Why the model could not be loaded."""

    def add_to(self, app: FastAPI) -> None:
        """Add the paths."""
        app.add_api_route("/", self.about, methods=["GET"])
        app.add_api_route("/", self.about, methods=["HEAD"], include_in_schema=False)
        app.add_api_route("/health", self.ready, methods=["GET"])
        app.add_api_route("/health/ready", self.ready, methods=["GET"])
        # Claude Code tells here what it did, and asks again where nobody takes it.
        app.add_api_route("/api/event_logging/batch", self.noted, methods=["POST"], include_in_schema=False)
        app.add_api_route("/health/live", self.live, methods=["GET"])
        app.add_api_route("/health/startup", self.startup, methods=["GET"])

    async def about(self) -> dict[str, Any]:
        """What this is."""
        try:
            release = version("agent-memory-mlx")
        except PackageNotFoundError:
            release = ""
        return {"name": "agent-memory", "version": release, "model": self._host.served, "links": LINKS}

    async def noted(self) -> Response:
        """Nothing is done with it."""
        return Response(status_code=204)

    async def live(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    async def startup(self) -> JSONResponse:
        """The model was loaded once; with status 503 before. It stays so, whatever comes after."""
        is_started = self._turns.loaded
        return JSONResponse({"status": "started" if is_started else "starting"}, 200 if is_started else 503)

    async def ready(self) -> JSONResponse:
        """Turns are taken; else why not, with status 503."""
        reason = self.reason()
        if not reason:
            return JSONResponse({"status": "ok"})
        # Clients of llama.cpp look for its sentence.
        message = "Loading model" if reason == "loading" else reason
        error = {"code": 503, "message": message, "type": "unavailable_error"}
        body = {"status": "unavailable", "reason": reason, "error": error}
        return JSONResponse(body, status_code=503)

    def reason(self) -> str:
        """Why no turns are taken; empty where they are."""
        if self.failure is not None:
            return f"the model could not be loaded: {self.failure}"
        if self._host.memory.closed:
            return "stopped"
        if self._turns.draining:
            return "draining"
        if self._host.is_changing:
            return "swapping"
        if not self._turns.loaded:
            return "loading"
        if self._turns.is_failing:
            return "turns_fail"
        if any(self._host.engine(name).save_error for name in self._host.names()):
            return "store_unwritable"
        if self._turns.is_full:
            return "queue_full"
        # What it takes is read without the engine, and without its store, which may wait for a disk.
        is_stalled = len(self._turns) > 0 and self._host.memory.step_seconds > STALLED
        return "engine_stalled" if is_stalled else ""
