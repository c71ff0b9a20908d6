"""The paths of agents by an id, which stand on `PersistentAgentManager`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from agent_memory_core import AgentMemoryError
from agent_memory_core.agents import PersistentAgentManager
from agent_memory_core.server.agents import Agents, Recorder, described
from agent_memory_core.server.agents_writer import AgentWriter, whole
from agent_memory_core.server.deadlines import within
from agent_memory_core.server.errors import NOT_FOUND, UNSUPPORTED, ApiError, from_core
from agent_memory_core.server.openai_chat import SamplingBody
from agent_memory_core.server.serving import Server, apart
from agent_memory_core.server.sessions import Session
from agent_memory_core.server.turns import Call

T = TypeVar("T")

DEFAULT_PROMPT = "You are a helpful assistant."

_LEAST_SECONDS = 0.001
"""What is left at least of a turn's time: none at all would be no valid time."""

_FILE = "application/octet-stream"


class CreateBody(SamplingBody):
    """A new agent."""

    agent_id: str | None = Field(default=None, min_length=1)
    agent_type: str | None = Field(default=None, min_length=1)
    """What it is; without a system prompt, the name of a template."""
    system_prompt: str | None = Field(default=None, min_length=1)
    metadata: dict[str, str] = Field(default_factory=dict)
    pinned: bool = False
    tools: Any = None
    ttl: Any = None

    def check(self) -> None:
        """Refuse what an agent does not have.

        Raises:
            ApiError: the request asks for it.
        """
        if self.tools:
            raise ApiError(UNSUPPORTED, "tools: an agent of the server has none.", param="tools")
        if self.ttl is not None:
            message = (
                "ttl: the setting session_ttl_days says how long sessions stay, and pinned ones stay longer."
            )
            raise ApiError(UNSUPPORTED, message, param="ttl")

    def prompt(self) -> str | None:
        """Its system prompt; None is that of its type."""
        return DEFAULT_PROMPT if self.system_prompt is self.agent_type is None else self.system_prompt


class GenerateBody(SamplingBody):
    """What an agent is told or asked."""

    prompt: str = Field(min_length=1)
    response_schema: dict[str, Any] | None = None


class ForkBody(SamplingBody):
    """The id of a copy."""

    new_id: str = Field(min_length=1)
    at: Any = None


class ChangeBody(BaseModel):
    """What of an agent is changed."""

    model_config = ConfigDict(extra="forbid")

    pinned: bool


class AgentPaths:
    """The paths under /v1/agents. The query parameter ``model`` says on which of several models the agent is."""

    def __init__(self, server: Server) -> None:
        self._server, self._agents = server, Agents(server.host, server.settings)
        self.close = self._agents.close

    def add_to(self, app: FastAPI) -> None:
        """Add the paths."""
        for method, path, endpoint in (
            ("POST", "", self.create),
            ("GET", "", self.list_all),
            ("GET", "/list", self.list_all),
            ("GET", "/stats", self.stats),
            ("POST", "/import", self.import_one),
            ("GET", "/{agent_id}", self.one),
            ("PATCH", "/{agent_id}", self.change),
            ("DELETE", "/{agent_id}", self.delete),
            ("POST", "/{agent_id}/generate", self.generate),
            ("POST", "/{agent_id}/fork", self.fork),
            ("POST", "/{agent_id}/prewarm", self.prewarm),
            ("GET", "/{agent_id}/messages", self.messages),
            ("DELETE", "/{agent_id}/messages", self.clear),
            ("GET", "/{agent_id}/export", self.export),
        ):
            in_schema = path != "/list"
            app.add_api_route(f"/v1/agents{path}", endpoint, methods=[method], include_in_schema=in_schema)

    async def create(self, request: Request, body: CreateBody) -> Response:
        """Make an agent."""
        body.check()
        agent_id, type_ = body.agent_id or uuid4().hex, body.agent_type or "assistant"
        self._server.turns.check_loaded()

        def make(agents: PersistentAgentManager) -> dict[str, Any]:
            agents.create_agent(agent_id, type_, body.prompt(), metadata=body.metadata, exist_ok=False)
            if body.pinned:
                agents.memory.flush()
                agents.memory.pin(agent_id, agents.namespace)
            return _one(agents, agent_id)

        return JSONResponse(await self._with(request, make, body.model), status_code=201)

    async def list_all(self, request: Request) -> dict[str, Any]:
        """All agents of the key."""
        found = await self._with(request, described)
        return {"agents": found, "total": len(found)}

    async def stats(self, request: Request) -> dict[str, Any]:
        """How many agents there are, and how large."""
        found = await self._with(request, described)
        return {
            "total_count": len(found),
            "in_memory_count": sum(agent["in_memory"] for agent in found),
            "pinned_count": sum(agent["pinned"] for agent in found),
            "total_tokens": sum(agent["cache_size_tokens"] for agent in found),
            "total_bytes": sum(agent["file_size_bytes"] for agent in found),
        }

    async def one(self, request: Request, agent_id: str) -> dict[str, Any]:
        """One agent."""
        return await self._with(request, lambda agents: _one(agents, agent_id))

    async def change(self, request: Request, agent_id: str, body: ChangeBody) -> dict[str, Any]:
        """Keep an agent on disk whatever the budget, or no longer."""

        def pin(agents: PersistentAgentManager) -> dict[str, Any]:
            _one(agents, agent_id)
            agents.memory.flush()
            agents.memory.pin(agent_id, agents.namespace, pinned=body.pinned)
            return _one(agents, agent_id)

        return await self._with(request, pin)

    async def messages(self, request: Request, agent_id: str) -> dict[str, Any]:
        """The conversation of an agent."""

        def read(agents: PersistentAgentManager) -> list[dict[str, str]]:
            agent = agents.load_agent(agent_id)
            return [{"role": "system", "content": agent.system_prompt}, *agent.conversation_history]

        return {"agent_id": agent_id, "messages": await self._with(request, read)}

    async def clear(self, request: Request, agent_id: str) -> Response:
        """Let an agent forget what was said; who it is stays."""
        await self._with(request, lambda agents: agents.clear_history(agent_id))
        return Response(status_code=204)

    async def generate(self, request: Request, agent_id: str, body: GenerateBody) -> Response:
        """Ask an agent, which remembers the question and its answer."""
        self._server.turns.check_loaded()
        served = self._server.catalog.find(body.model or request.query_params.get("model", ""))
        agents = await apart(lambda: self._agents.of(request.state.tenant.namespace, served))
        limit = self._server.time_limit(request, stream=bool(body.stream))
        call = await self._call(agents, agent_id, body, served, limit)
        try:
            return await self._server.run(request, call, whole, AgentWriter)
        except BaseException:
            # A turn that has begun lets the agent's next one in when it ends. This one may not have begun.
            assert call.recorder is not None
            call.recorder.give_up()
            raise

    async def fork(self, request: Request, agent_id: str, body: ForkBody) -> Response:
        """Make another agent that knows what this one knows."""
        if body.at is not None:
            raise ApiError(UNSUPPORTED, "at: an agent is copied as it is now.", param="at")
        await self._with(request, lambda agents: agents.fork_agent(agent_id, body.new_id), body.model)
        return JSONResponse({"agent_id": body.new_id, "forked_from": agent_id}, status_code=201)

    async def prewarm(self, request: Request, agent_id: str) -> dict[str, int]:
        """Bring an agent back into memory."""
        self._server.turns.check_loaded()
        report = await self._with(request, lambda agents: agents.prewarm_agent(agent_id))
        return {"prompt_tokens": report.usage.prompt_tokens, "cached_tokens": report.usage.cache_read}

    async def export(self, request: Request, agent_id: str) -> Response:
        """An agent as a file, for another machine."""

        def write(agents: PersistentAgentManager) -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                return agents.export_agent(agent_id, Path(folder) / "agent").read_bytes()

        return Response(await self._with(request, write), media_type=_FILE)

    async def import_one(self, request: Request, new_id: str | None = None) -> Response:
        """Make an agent from such a file."""
        content = await request.body()

        def read(agents: PersistentAgentManager) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "agent"
                file.write_bytes(content)
                return _one(agents, agents.import_agent(file, new_id).agent_id)

        self._server.turns.check_loaded()
        return JSONResponse(await self._with(request, read), status_code=201)

    async def delete(self, request: Request, agent_id: str, evict_only: bool = False) -> Response:
        """Delete an agent, or with ``evict_only`` only what memory holds of it."""

        def leave(agents: PersistentAgentManager) -> None:
            if evict_only:
                agents.evict_agent(agent_id)
            elif not agents.delete_agent(agent_id):
                raise _missing(agent_id)

        await self._with(request, leave)
        return Response(status_code=204)

    async def _with(
        self, request: Request, work: Callable[[PersistentAgentManager], T], model: str = ""
    ) -> T:
        """What the agents of the key answer, on the model that the request names."""
        served = self._server.catalog.find(model or request.query_params.get("model", ""))
        namespace = request.state.tenant.namespace
        return await apart(lambda: work(self._agents.of(namespace, served)))

    async def _call(
        self,
        agents: PersistentAgentManager,
        agent_id: str,
        body: GenerateBody,
        served: str,
        limit: float | None,
    ) -> Call:
        """An agent's turn, once those before it have ended, with what is left of its time."""
        began = time.monotonic()
        try:
            sampling = body.sampling()
            if self._server.reader.seed is not None:
                sampling.setdefault("seed", self._server.reader.seed)
            asked = agents.abegin_turn(
                agent_id, body.prompt, response_schema=body.response_schema, **sampling
            )
            turn = await within(limit, asked)
        except AgentMemoryError as error:
            raise from_core(error) from error
        left = None if limit is None else max(_LEAST_SECONDS, limit - (time.monotonic() - began))
        return Call(
            replace(turn.request, timeout=left),
            body.model,
            served,
            bool(body.stream),
            Session(agent_id, "agent"),
            turn.key,
            self._server.host.context_of(served),
            recorder=Recorder(turn),
        )


def _one(agents: PersistentAgentManager, agent_id: str) -> dict[str, Any]:
    for found in described(agents, agent_id):
        return found
    raise _missing(agent_id)


def _missing(agent_id: str) -> ApiError:
    return ApiError(NOT_FOUND, f"There is no agent {agent_id!r}: create it first.")
