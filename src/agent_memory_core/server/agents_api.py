"""The paths of agents by an id, see `Agents`."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from agent_memory_core import AgentMemoryError
from agent_memory_core.adapter import measurements
from agent_memory_core.server.agents import DEFAULT_PROMPT, Agents, Owner, as_messages, described, session_id
from agent_memory_core.server.answers import Answer
from agent_memory_core.server.errors import INVALID, ApiError, from_core
from agent_memory_core.server.openai_chat import SamplingBody, finish_reason, usage
from agent_memory_core.server.requests import Asked, Client
from agent_memory_core.server.serving import Server, apart
from agent_memory_core.server.sessions import Session
from agent_memory_core.server.turns import Call


class CreateBody(SamplingBody):
    """A new agent."""

    agent_id: str | None = Field(default=None, min_length=1)
    system_prompt: str = Field(default=DEFAULT_PROMPT, min_length=1)
    pinned: bool = False


class GenerateBody(SamplingBody):
    """What an agent is told or asked."""

    prompt: str = Field(min_length=1)
    response_schema: dict[str, Any] | None = None


class ForkBody(SamplingBody):
    """The id of a copy."""

    new_id: str = Field(min_length=1)


class AgentPaths:
    """The paths under /v1/agents."""

    def __init__(self, server: Server) -> None:
        self._server, self._agents = server, Agents(server.host)

    def add_to(self, app: FastAPI) -> None:
        """Add the paths."""
        for method, path, endpoint in (
            ("POST", "", self.create),
            ("GET", "", self.list_all),
            ("GET", "/list", self.list_all),
            ("GET", "/stats", self.stats),
            ("GET", "/{agent_id}", self.one),
            ("DELETE", "/{agent_id}", self.delete),
            ("POST", "/{agent_id}/generate", self.generate),
            ("POST", "/{agent_id}/fork", self.fork),
            ("POST", "/{agent_id}/prewarm", self.prewarm),
            ("GET", "/{agent_id}/messages", self.messages),
        ):
            in_schema = path != "/list"
            app.add_api_route(f"/v1/agents{path}", endpoint, methods=[method], include_in_schema=in_schema)

    async def create(self, request: Request, body: CreateBody) -> Response:
        """Make an agent."""
        owner = _owner(request, body.agent_id or uuid4().hex)
        self._server.turns.check_loaded()
        await apart(lambda: self._agents.create(owner, body.system_prompt, pinned=body.pinned))
        return JSONResponse(await apart(lambda: self._agents.info(owner)), status_code=201)

    async def list_all(self, request: Request) -> dict[str, Any]:
        """All agents of the key."""
        found = await apart(lambda: self._agents.all_of(request.state.tenant.namespace))
        return {"agents": [described(info) for info in found], "total": len(found)}

    async def stats(self, request: Request) -> dict[str, Any]:
        """How many agents there are, and how large."""
        found = await apart(lambda: self._agents.all_of(request.state.tenant.namespace))
        return {
            "total_count": len(found),
            "pinned_count": sum(info.pinned for info in found),
            "total_tokens": sum(info.tokens for info in found),
            "total_bytes": sum(info.nbytes for info in found),
        }

    async def one(self, request: Request, agent_id: str) -> dict[str, Any]:
        """One agent."""
        return await apart(lambda: self._agents.info(_owner(request, agent_id)))

    async def messages(self, request: Request, agent_id: str) -> dict[str, Any]:
        """The conversation of an agent."""
        history = await apart(lambda: self._agents.read(_owner(request, agent_id)))
        return {"agent_id": agent_id, "messages": history}

    async def generate(self, request: Request, agent_id: str, body: GenerateBody) -> Response:
        """Ask an agent, which remembers the question and its answer."""
        if body.stream:
            raise ApiError(INVALID, "stream=true is not valid here: an answer of an agent comes whole.")
        owner = _owner(request, agent_id)
        async with self._agents.turn_of(owner):
            history = await apart(lambda: self._agents.read(owner))
            history.append({"role": "user", "content": body.prompt})
            call = self._call(owner, history, body)
            answers: list[Answer] = []

            def whole(call: Call, answer: Answer) -> dict[str, Any]:
                answers.append(answer)
                return _answered(agent_id, answer)

            response = await self._server.run(request, call, whole, _no_writer)
            history.append({"role": "assistant", "content": answers[0].text()})
            await apart(lambda: self._agents.write(owner, history))
        return response

    async def fork(self, request: Request, agent_id: str, body: ForkBody) -> Response:
        """Make another agent that knows what this one knows."""
        owner = _owner(request, agent_id)
        async with self._agents.turn_of(owner):
            await apart(lambda: self._agents.fork(owner, body.new_id))
        return JSONResponse({"agent_id": body.new_id, "forked_from": agent_id}, status_code=201)

    async def prewarm(self, request: Request, agent_id: str) -> dict[str, int]:
        """Bring an agent back into memory."""
        self._server.turns.check_loaded()
        return await apart(lambda: self._agents.prewarm(_owner(request, agent_id)))

    async def delete(self, request: Request, agent_id: str, evict_only: bool = False) -> Response:
        """Delete an agent, or with ``evict_only`` only what memory holds of it."""
        owner = _owner(request, agent_id)
        async with self._agents.turn_of(owner):
            await apart(lambda: (self._agents.release if evict_only else self._agents.delete)(owner))
        return Response(status_code=204)

    def _call(self, owner: Owner, history: list[dict[str, str]], body: GenerateBody) -> Call:
        try:
            asked = Asked(
                messages=[*as_messages(history)],
                response_schema=body.response_schema,
                sampling=body.sampling(),
            )
        except AgentMemoryError as error:
            raise from_core(error) from error
        client = Client(owner[0], Session(session_id(owner), "agent"))
        return self._server.reader.call(asked, body, client, stream=False)


def _owner(request: Request, agent_id: str) -> Owner:
    return request.state.tenant.namespace, agent_id


def _answered(agent_id: str, answer: Answer) -> dict[str, Any]:
    report = answer.ended
    return {
        "agent_id": agent_id,
        "text": answer.text(),
        "tokens_generated": report.usage.completion_tokens,
        "finish_reason": finish_reason(report),
        "cache_size_tokens": report.usage.total_tokens,
        "usage": usage(report.usage),
        "agent_memory": measurements(report),
    }


def _no_writer(call: Call) -> Any:
    raise AssertionError("agents answer whole")
