"""What whoever runs the server may see and do: models, requests, caches. See `Gate` for who that is."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from agent_memory_core import AgentMemoryError, SessionKey, list_profiles
from agent_memory_core.server.errors import INVALID, NOT_FOUND, ApiError, from_core
from agent_memory_core.server.openai_chat import ChatBody
from agent_memory_core.server.process import peak_bytes
from agent_memory_core.server.serving import Server, apart


class Strict(BaseModel):
    """A request whose unknown fields are refused: a misspelled one must not delete more than was meant."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())


class SwapBody(Strict):
    """Which model to serve."""

    model: str = Field(min_length=1, validation_alias=AliasChoices("model_id", "model"))
    timeout_seconds: float = Field(default=30, ge=0, le=300)
    """How long turns in flight get to end."""


class OffloadBody(Strict):
    """Which model to free, the one that is served where none is named, and how long to wait for its turns."""

    model: str = Field(default="", validation_alias=AliasChoices("model_id", "model"))
    timeout_seconds: float = Field(default=30, ge=0, le=300)


class SeedBody(Strict):
    """The seed of answers whose requests give none; None samples differently each time."""

    seed: int | None = Field(default=None, ge=0)


class CachesBody(Strict):
    """What is dropped: from memory, or for good."""

    scope: str = Field(default="memory", pattern="^(memory|all)$")
    namespace: str = "default"
    session_id: str | None = None
    """One session; None is every session of the namespace."""
    confirm: bool = False


class PinBody(Strict):
    """A session that is kept whatever the disk budget, or no longer."""

    namespace: str = "default"
    session_id: str
    pinned: bool = True


class ForkBody(Strict):
    """A session, and the id of a new one that knows the same."""

    namespace: str = "default"
    session_id: str
    new_session_id: str


class Admin:
    """The paths under /admin and /debug."""

    def __init__(self, server: Server) -> None:
        self._server, self._host, self._turns = server, server.host, server.turns

    def add_to(self, app: FastAPI) -> None:
        """Add the paths. None of them is in the public description."""
        for method, path, endpoint in (
            ("POST", "/admin/swap", self.swap),
            ("POST", "/admin/models/swap", self.swap),
            ("GET", "/admin/models", self.models),
            ("GET", "/admin/models/current", self.current),
            ("GET", "/admin/models/available", self.available),
            ("POST", "/admin/models/offload", self.offload),
            ("POST", "/admin/models/load", self.load),
            ("GET", "/admin/requests", self.requests),
            ("DELETE", "/admin/requests/{request_id}", self.cancel),
            ("GET", "/admin/caches", self.caches),
            ("DELETE", "/admin/caches", self.drop),
            ("POST", "/admin/caches/pin", self.pin),
            ("POST", "/admin/caches/fork", self.fork),
            ("GET", "/admin/turns", self.recent),
            ("POST", "/admin/seed", self.seed),
            ("POST", "/admin/prewarm", self.prewarm),
            ("GET", "/admin/stats", self.stats),
            ("POST", "/admin/drain", self.drain),
            ("DELETE", "/admin/drain", self.resume),
            ("POST", "/admin/reload", self.reload),
            ("GET", "/debug/memory", self.memory),
        ):
            app.add_api_route(path, endpoint, methods=[method], include_in_schema=False)

    async def swap(self, body: SwapBody) -> dict[str, Any]:
        """Serve another model."""
        old = self._host.served
        await self._host.swap(body.model, body.timeout_seconds)
        new = self._host.served
        message = f"{new} is served."
        return {"status": "success", "old_model_id": old, "new_model_id": new, "message": message}

    async def models(self) -> dict[str, Any]:
        """What became of each model that requests can name, and the MiB that they take and may take."""
        manager = self._host.manager
        usage = await asyncio.to_thread(manager.get_memory_usage)
        stats = {name: asdict(of_one) for name, of_one in manager.get_model_stats().items()}
        return {"served": self._host.served, "models": stats, "memory": usage}

    async def current(self) -> dict[str, Any]:
        """The model that is served where requests name none."""
        memory = self._host.memory
        return {
            "model_id": self._host.served,
            "loaded": memory.weights_bytes > 0,
            "weights_bytes": memory.weights_bytes,
            "context_length": memory.stated_context_length,
            "load_seconds": round(self._host.load_seconds, 3),
        }

    async def available(self) -> dict[str, Any]:
        """The models that have a profile; any other folder or hub id can be swapped to as well."""
        profiles, _ = await asyncio.to_thread(list_profiles)
        return {"models": sorted({profile.model_id for profile in profiles} | {*self._host.names()})}

    async def offload(self, body: OffloadBody | None = None) -> JSONResponse:
        """Free a model; the next turn loads it again."""
        asked = body or OffloadBody()
        done = await self._host.offload(asked.timeout_seconds, self._server.catalog.find(asked.model))
        return JSONResponse({"status": "offloaded" if done else "busy"}, status_code=200 if done else 409)

    async def load(self) -> dict[str, Any]:
        """Load the model now."""
        try:
            await self._host.load()
        except AgentMemoryError as error:
            raise from_core(error) from error
        return await self.current()

    async def requests(self) -> dict[str, Any]:
        """The turns that run or wait, the oldest first."""
        return {"requests": [turn.progress() for turn in self._turns.running()]}

    async def cancel(self, request_id: str) -> dict[str, Any]:
        """Withdraw a request. What it computed is kept."""
        for turn in self._turns.running():
            if turn.request_id == request_id:
                await turn.withdraw("admin")
                return {"status": "cancelled", "request_id": request_id}
        raise ApiError(NOT_FOUND, f"No request {request_id!r} is in flight.")

    async def caches(self, namespace: str | None = None) -> dict[str, Any]:
        """The sessions on disk, each with its last turn since the server began."""
        sessions = await asyncio.to_thread(self._host.memory.sessions, namespace)
        last = self._server.recent.last
        return {"sessions": [asdict(s) | {"last_turn": last((s.namespace, s.session_id))} for s in sessions]}

    async def recent(self) -> dict[str, Any]:
        """The turns that ended last, the oldest first."""
        return {"turns": self._server.recent.all()}

    async def pin(self, body: PinBody) -> dict[str, Any]:
        """Keep a session on disk whatever the budget, or no longer."""
        memory = self._host.memory
        await apart(lambda: memory.pin(body.session_id, body.namespace, pinned=body.pinned))
        return {"status": "success", "pinned": body.pinned}

    async def fork(self, body: ForkBody) -> dict[str, Any]:
        """Make a session that knows what another one knows."""
        memory = self._host.memory
        await apart(lambda: memory.fork(body.session_id, body.new_session_id, body.namespace))
        return {"status": "success", "session_id": body.new_session_id}

    async def drop(self, body: CachesBody) -> dict[str, Any]:
        """Drop sessions from memory, or delete them."""
        if not body.confirm:
            raise ApiError(INVALID, "Nothing was dropped: send confirm=true.", param="confirm")
        if body.scope == "all":
            await self._server.records.forget(body.namespace, body.session_id)
        return await apart(lambda: self._drop(body))

    def _drop(self, body: CachesBody) -> dict[str, Any]:
        memory, namespace = self._host.memory, body.namespace
        if body.scope == "all" and body.session_id is None:
            return {"sessions": memory.forget_namespace(namespace)}
        ids = [body.session_id] if body.session_id else [s.session_id for s in memory.sessions(namespace)]
        if body.scope == "all":
            return {"sessions": sum(memory.forget(name, namespace) for name in ids)}
        return {"sessions": len(ids), "bytes": sum(memory.release(name, namespace) for name in ids)}

    async def seed(self, body: SeedBody) -> dict[str, Any]:
        """Set the seed."""
        self._server.reader.seed = body.seed
        return {"status": "success", "seed": body.seed}

    async def prewarm(self, body: ChatBody, namespace: str = "default") -> dict[str, Any]:
        """Compute the prompt of a chat completion, so that a later one that begins with it starts at once."""
        try:
            served = self._server.catalog.find(body.model)
            request = self._server.reader.request(body.asked(), served)
            session = getattr(body, "session_id", None)
            report = await self._host.engine(served).aprewarm(
                request, SessionKey(session, namespace=namespace)
            )
        except AgentMemoryError as error:
            raise from_core(error) from error
        return {"prompt_tokens": report.usage.prompt_tokens, "cached_tokens": report.usage.cache_read}

    async def stats(self) -> dict[str, Any]:
        """What the memory counts. It does not wait for the engine."""
        return asdict(await asyncio.to_thread(self._host.memory.stats))

    async def drain(self) -> dict[str, Any]:
        """Take no more turns; the ready check says so."""
        self._turns.draining = True
        return {"status": "draining", "in_flight": len(self._turns)}

    async def resume(self) -> dict[str, Any]:
        """Take turns again."""
        self._turns.draining = False
        return {"status": "ok"}

    async def reload(self) -> dict[str, Any]:
        """Read the settings again."""
        return {"status": "success" if self._server.reload() else "failed"}

    async def memory(self) -> dict[str, Any]:
        """Where the memory of the process is, in bytes."""
        stats = await asyncio.to_thread(self._host.memory.stats)
        return {
            "model": self._host.memory.model_name,
            "weights_bytes": self._host.memory.weights_bytes,
            "process_peak_bytes": peak_bytes(),
            **asdict(stats.memory),
        }
