"""The paths of sessions in which agents talk, see `CoordinationService`. A key reaches the sessions of its own only."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from agent_memory_core import SessionKey, Usage
from agent_memory_core.coordination import CoordinationService, Event, SessionStatus, Step, TurnComplete
from agent_memory_core.server.coordination import (
    Talks,
    decision_body,
    message_body,
    messages_body,
    status_body,
    step_event,
)
from agent_memory_core.server.coordination_stream import StepStream, asked
from agent_memory_core.server.deadlines import within
from agent_memory_core.server.errors import INVALID, ApiError
from agent_memory_core.server.serving import Server, apart


class Body(BaseModel):
    """A request whose unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class TurnBody(Body):
    """Who speaks; nothing of it is needed."""

    speaker: str | None = None
    to: str | None = None
    """In the topology whisper, who alone hears it."""
    prompt: str = Field(default="", max_length=50_000)
    """What the speaker is asked beside what it has heard; nobody else is told."""


class RoundBody(Body):
    """In the topology whisper, who whispers to whom."""

    pairs: list[tuple[str, str]] = []


class WhisperBody(Body):
    """Words that only two know of."""

    sender: str = Field(alias="from")
    to: str
    content: str = Field(min_length=1, max_length=50_000)


class SayBody(Body):
    """Words of a person, of "system", or of anybody else."""

    sender: str = Field(min_length=1, max_length=50)
    content: str = Field(min_length=1, max_length=50_000)
    to: list[str] = []


class QuestionBody(Body):
    """What is decided; without choices the agents propose some."""

    question: str | None = Field(default=None, min_length=1, max_length=2000)
    choices: list[str] | None = None


class VoteBody(Body):
    """A vote for the open question."""

    agent_id: str
    question: str | None = None
    """Where it is given, it has to be the open one."""
    choice: str | None = None
    ranking: list[str] | None = None


class InterruptBody(Body):
    """Who cuts in."""

    agent_id: str


class _Talk(NamedTuple):
    """One session, for one request."""

    service: CoordinationService
    status: SessionStatus

    @property
    def session_id(self) -> str:
        return self.status.session_id

    async def standing(self) -> dict[str, Any]:
        """Where the session stands now."""
        return {"session_status": status_body(await asked(self.service.aget(self.session_id)))}


class CoordinationPaths:
    """The paths under /v1/coordination."""

    def __init__(self, server: Server) -> None:
        self._server, self._talks = server, server.talks

    def add_to(self, app: FastAPI) -> None:
        """Add the paths."""
        one = "/sessions/{session_id}"
        for method, path, endpoint in (
            ("POST", "/sessions", self.create),
            ("GET", "/sessions", self.list_all),
            ("GET", one, self.status),
            ("DELETE", one, self.delete),
            ("POST", f"{one}/close", self.close),
            ("POST", f"{one}/prime", self.prime),
            ("POST", f"{one}/turn", self.turn),
            ("POST", f"{one}/round", self.round),
            ("POST", f"{one}/turn/stream", self.stream_turn),
            ("POST", f"{one}/round/stream", self.stream_round),
            ("POST", f"{one}/whisper", self.whisper),
            ("POST", f"{one}/say", self.say),
            ("POST", f"{one}/interrupt", self.interrupt),
            ("POST", f"{one}/ask", self.ask),
            ("POST", f"{one}/vote", self.vote),
            ("POST", f"{one}/decide", self.decide),
            ("GET", f"{one}/messages", self.messages),
            ("GET", f"{one}/decisions", self.decisions),
            ("GET", f"{one}/stats", self.stats),
            ("DELETE", "/caches/{prefix}", self.forget),
        ):
            app.add_api_route(f"/v1/coordination{path}", endpoint, methods=[method])

    # Sessions

    async def create(self, request: Request, body: dict[str, Any]) -> Response:
        """Begin a session; the body has the fields of `SessionSpec`."""
        service = await self._service(request)
        status = await asked(service.acreate_session(body))
        return JSONResponse(status_body(status), 201)

    async def list_all(self, request: Request) -> dict[str, Any]:
        """All sessions of the key."""
        service = await self._service(request)
        found = [status_body(status) for status in await asked(service.alist())]
        return {"sessions": found, "total": len(found)}

    async def status(self, request: Request, session_id: str) -> dict[str, Any]:
        """Where a session stands."""
        return status_body((await self._talk(request, session_id)).status)

    async def delete(self, request: Request, session_id: str) -> Response:
        """Delete a session, also in the middle of a turn."""
        service = await self._service(request)
        await asked(service.adelete(session_id))
        return Response(status_code=204)

    async def close(self, request: Request, session_id: str) -> dict[str, Any]:
        """End a session; its words stay."""
        service = await self._service(request)
        await asked(service.aclose_session(session_id))
        return status_body(await asked(service.aget(session_id)))

    async def forget(self, request: Request, prefix: str) -> Response:
        """Forget the permanent agents of a prefix."""
        service = await self._service(request)
        await asked(service.adelete_persistent(prefix))
        return Response(status_code=204)

    # Turns

    async def prime(self, request: Request, session_id: str) -> dict[str, Any]:
        """Compute what every agent knows before its first word."""
        talk = await self._talk(request, session_id)
        with self._place(request, session_id):
            reports = await asked(talk.service.aprime(session_id))
        counts = {name: report.usage for name, report in reports.items()}
        return {"agents": {name: _counted(usage) for name, usage in counts.items()}}

    async def turn(self, request: Request, session_id: str, body: TurnBody | None = None) -> dict[str, Any]:
        """Let the next agent speak; in a broadcast all, and ``message`` is the last one's."""
        talk = await self._talk(request, session_id)
        found = await self._said(request, talk, _turn(talk, body))
        return {"message": found["messages"][-1], **found}

    async def round(self, request: Request, session_id: str, body: RoundBody | None = None) -> dict[str, Any]:
        """Let everybody speak whose turn it still is in this round."""
        talk = await self._talk(request, session_id)
        return await self._said(request, talk, _round(talk, body))

    async def stream_turn(self, request: Request, session_id: str, body: TurnBody | None = None) -> Response:
        """`turn` as it happens."""
        talk = await self._talk(request, session_id)
        return await self._streamed(request, talk, _turn(talk, body), is_round=False)

    async def stream_round(
        self, request: Request, session_id: str, body: RoundBody | None = None
    ) -> Response:
        """`round` as it happens."""
        talk = await self._talk(request, session_id)
        return await self._streamed(request, talk, _round(talk, body), is_round=True)

    async def interrupt(self, request: Request, session_id: str, body: InterruptBody) -> dict[str, Any]:
        """Let an agent cut in on who speaks."""
        talk = await self._talk(request, session_id)
        with self._place(request, session_id):
            event = await asked(talk.service.ainterrupt(session_id, body.agent_id))
        return await _told(talk, event)

    async def whisper(self, request: Request, session_id: str, body: WhisperBody) -> dict[str, Any]:
        """Enter words that only two know of."""
        talk = await self._talk(request, session_id)
        event = await asked(talk.service.awhisper(session_id, body.sender, body.to, body.content))
        return await _told(talk, event)

    async def say(self, request: Request, session_id: str, body: SayBody) -> dict[str, Any]:
        """Enter words that all know of, or those who are named."""
        talk = await self._talk(request, session_id)
        event = await asked(talk.service.asay(session_id, body.sender, body.content, body.to))
        return await _told(talk, event)

    # Decisions

    async def ask(self, request: Request, session_id: str, body: QuestionBody) -> dict[str, Any]:
        """Open a question, for which votes can be entered."""
        service, _ = await self._talk(request, session_id)
        if body.question is None:
            raise ApiError(INVALID, "question: missing.", param="question")
        await asked(service.aask(session_id, body.question, body.choices))
        return {"question": body.question, "choices": body.choices}

    async def vote(self, request: Request, session_id: str, body: VoteBody) -> dict[str, Any]:
        """Enter a vote for the open question."""
        service, status = await self._talk(request, session_id)
        if body.question is not None and body.question != status.question:
            raise ApiError(
                INVALID, f"The open question is {status.question!r}: vote on that.", param="question"
            )
        await asked(service.avote(session_id, body.agent_id, body.choice, body.ranking))
        return {
            "vote_id": f"{session_id}-{body.agent_id}",
            "question": status.question,
            "agent_id": body.agent_id,
        }

    async def decide(
        self, request: Request, session_id: str, body: QuestionBody | None = None
    ) -> dict[str, Any]:
        """Decide the question, or the one that is open, by the session's mode."""
        talk = await self._talk(request, session_id)
        wanted = body or QuestionBody()
        with self._place(request, session_id):
            decision = await asked(talk.service.adecide(session_id, wanted.question, wanted.choices))
        return {"decision": decision_body(decision), **await talk.standing()}

    # Looking

    async def messages(
        self, request: Request, session_id: str, as_agent: str | None = None
    ) -> dict[str, Any]:
        """What all know of, or what one agent knows of."""
        service, status = await self._talk(request, session_id)
        found = await asked(service.amessages(session_id, as_agent=as_agent))
        return {"messages": messages_body(status, found)}

    async def decisions(self, request: Request, session_id: str) -> dict[str, Any]:
        """What was decided so far, with all ballots."""
        service, _ = await self._talk(request, session_id)
        return {"decisions": await asked(service.adecisions(session_id))}

    async def stats(self, request: Request, session_id: str) -> dict[str, Any]:
        """What each turn cost."""
        service, _ = await self._talk(request, session_id)
        return {"turns": [asdict(row) for row in await asked(service.astats(session_id))]}

    # What they share

    async def _service(self, request: Request) -> CoordinationService:
        talks: Talks = self._talks
        return await apart(lambda: talks.service(request.state.tenant.namespace))

    async def _talk(self, request: Request, session_id: str) -> _Talk:
        service = await self._service(request)
        return _Talk(service, await asked(service.aget(session_id)))

    @contextmanager
    def _place(self, request: Request, session_id: str) -> Iterator[None]:
        """Hold one of the server's places for turns, and count against the limits of the key."""
        tenant = request.state.tenant
        with self._server.turns.place(tenant.namespace):
            self._server.rates.check(tenant, SessionKey(session_id, namespace=tenant.namespace))
            yield

    async def _said(self, request: Request, talk: _Talk, steps: AsyncIterator[Step]) -> dict[str, Any]:
        limit = self._server.time_limit(request, stream=False)
        with self._place(request, talk.session_id):
            events = await within(limit, asked(_events(steps)))
        return {"messages": messages_body(talk.status, events), **await talk.standing()}

    async def _streamed(
        self, request: Request, talk: _Talk, steps: AsyncGenerator[Step, None], *, is_round: bool
    ) -> Response:
        """A stream, once it is sure that something will be said: before that an error has a status of its own."""
        limit = self._server.time_limit(request, stream=True)
        said: list[dict[str, Any]] = []

        async def event(step: Step) -> tuple[str, dict[str, Any]]:
            name, body = step_event(talk.status.spec, step)
            if isinstance(step, TurnComplete):
                said.append(body["message"])
                body |= await talk.standing()
            return name, body

        async def last() -> tuple[str, dict[str, Any]] | None:
            return ("round_complete", {"messages": said, **await talk.standing()}) if is_round else None

        with ExitStack() as places:
            places.enter_context(self._place(request, talk.session_id))
            first = await within(limit, asked(anext(steps, None)))
            silence = self._server.settings.keep_alive
            return StepStream(steps, first, places.pop_all(), event, last, silence, limit)


def _turn(talk: _Talk, body: TurnBody | None) -> AsyncGenerator[Step, None]:
    wanted = body or TurnBody()
    return talk.service.astream_turn(
        talk.session_id, speaker=wanted.speaker, to=wanted.to, prompt=wanted.prompt
    )


def _round(talk: _Talk, body: RoundBody | None) -> AsyncGenerator[Step, None]:
    return talk.service.astream_round(talk.session_id, (body or RoundBody()).pairs)


def _counted(usage: Usage) -> dict[str, int]:
    return {"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cache_read}


async def _events(steps: AsyncIterator[Step]) -> list[Event]:
    return [step.event async for step in steps if isinstance(step, TurnComplete)]


async def _told(talk: _Talk, event: Event) -> dict[str, Any]:
    return {"message": message_body(talk.status.spec, event), **await talk.standing()}
