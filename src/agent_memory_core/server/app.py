"""The HTTP application: its paths, and what each of them calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response

from agent_memory_core import AgentMemory, AgentMemoryError, InvalidSetting
from agent_memory_core.server import anthropic_messages, openai_chat, openai_completions, responses_writer
from agent_memory_core.server.answers import Answer
from agent_memory_core.server.catalog import Catalog
from agent_memory_core.server.errors import (
    FAULT,
    FORBIDDEN,
    GONE,
    INVALID,
    INVALID_JSON,
    NOT_ALLOWED,
    NOT_FOUND,
    ApiError,
    from_core,
)
from agent_memory_core.server.gate import Gate, speaks_anthropic
from agent_memory_core.server.health import Health
from agent_memory_core.server.keys import Keys
from agent_memory_core.server.logs import log
from agent_memory_core.server.metrics import Metrics
from agent_memory_core.server.openai_responses import ResponsesBody
from agent_memory_core.server.rates import Rates
from agent_memory_core.server.requests import Asked, Body, Client, Reader
from agent_memory_core.server.responses_writer import ResponseWriter
from agent_memory_core.server.sessions import session_of
from agent_memory_core.server.settings import ServerSettings
from agent_memory_core.server.sse import EventStream, Writer, encoded
from agent_memory_core.server.turns import Call, Turns

T = TypeVar("T")


class Server:
    """One memory behind HTTP."""

    def __init__(self, memory: AgentMemory, settings: ServerSettings) -> None:
        self.memory, self.settings = memory, settings
        self.keys = Keys(settings)
        self.turns = Turns(memory, settings)
        self.catalog = Catalog(memory, settings)
        self.health = Health(memory, self.turns)
        self.reader = Reader(memory, settings)
        self.rates = Rates(settings)
        self.metrics = Metrics(memory, self.turns.__len__)
        self.on_failure: Callable[[], None] = lambda: None
        """What is done where the model cannot be loaded."""
        self.read_settings: Callable[[], ServerSettings] = lambda: settings
        """Reads the settings again."""

    async def load(self) -> None:
        """Load the model; meanwhile, and if that fails, the server says that it is not ready."""
        try:
            await asyncio.to_thread(self.memory.load)
            self.reader.context = await asyncio.to_thread(lambda: self.memory.context_length)
        except AgentMemoryError as error:
            self.health.failure = error
            self.on_failure()
            return
        self.turns.loaded = True

    def reload(self) -> None:
        """Take other keys, limits, names of the model and another log level, while requests go on.

        Where a setting is wrong, those that are there stay, and the log tells why.
        """
        try:
            settings = self.read_settings()
            self.keys.read(settings)
        except InvalidSetting as error:
            log.error("the settings stay as they are: %s", error)
            return
        self.rates.read(settings)
        self.catalog.read(settings)
        log.setLevel(settings.log_level.upper())
        log.info("the settings were read again")

    def close(self) -> None:
        """Stop watching the memory."""
        self.turns.close()
        self.metrics.close()

    async def run(
        self,
        request: Request,
        call: Call,
        whole: Callable[[Call, Answer], dict[str, Any]],
        writer: Callable[[Call], Writer],
    ) -> Response:
        """Answer a call, whole or as a stream."""
        self.rates.check(request.state.tenant, call.key)
        turn = request.state.turn = await self.turns.begin(call)
        headers = _headers(call)
        if call.stream:
            return EventStream(turn, writer(call), self.settings.keep_alive, headers)
        try:
            answer = await _unless_gone(request, turn.answer())
        except AgentMemoryError as error:
            raise from_core(error) from error
        finally:
            await turn.close()
        return _json(whole(call, answer), headers)

    async def count(self, call: Call) -> int:
        """How many tokens the prompt of a call has.

        Raises:
            ApiError: the model is not loaded, or its template refuses the messages.
        """
        self.turns.check_loaded()
        try:
            return await asyncio.to_thread(self.memory.count_tokens, call.request)
        except AgentMemoryError as error:
            raise from_core(error) from error

    def client(self, request: Request, body: Body) -> Client:
        """Who asks."""
        state = request.state
        said = body.model_dump(include={"session_id", "prompt_cache_key", "metadata"})
        return Client(state.tenant.namespace, session_of(state.headers, said))

    def asked(self, request: Request, body: Body, asked: Callable[[], Asked], **more: Any) -> Call:
        """The call of a request in any dialect."""
        self.catalog.check(body.model)
        try:
            return self.reader.call(asked(), body, self.client(request, body), **more)
        except AgentMemoryError as error:
            raise from_core(error) from error


def _json(value: dict[str, Any], headers: dict[str, str], status: int = 200) -> Response:
    return Response(encoded(value), status, headers, "application/json")


def _headers(call: Call) -> dict[str, str]:
    headers = {"X-Agent-Memory-Session-Source": call.session.source}
    if call.session.session_id is not None and call.session.session_id.isascii():
        headers["X-Session-ID"] = call.session.session_id
    return headers


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is given up when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(GONE, "The client went away.")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(memory: AgentMemory, settings: ServerSettings | None = None) -> FastAPI:
    """The application that serves ``memory``, which its caller closes.

    Raises:
        InvalidSetting: the keys cannot be read.
    """
    server = Server(memory, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(server.load())
        yield
        loading.cancel()
        server.close()

    app = FastAPI(
        title="agent-memory", lifespan=lifespan, strict_content_type=False, docs_url=None, redoc_url=None
    )
    app.state.server = server
    _add_errors(app)
    _add_paths(app, server)
    if server.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_middleware(Gate, settings=server.settings, keys=server.keys, metrics=server.metrics)
    return app


def _add_paths(app: FastAPI, server: Server) -> None:
    server.health.add_to(app)
    server.catalog.add_to(app)
    server.metrics.add_to(app)
    _add_completions(app, server)
    _add_responses(app, server)
    _add_messages(app, server)


def _add_completions(app: FastAPI, server: Server) -> None:
    async def chat(request: Request, body: openai_chat.ChatBody) -> Response:
        call = server.asked(request, body, body.asked, stream=bool(body.stream), usage=body.wants_usage)
        return await server.run(request, call, openai_chat.whole, openai_chat.ChatWriter)

    async def complete(request: Request, body: openai_completions.CompletionBody) -> Response:
        call = server.asked(request, body, body.asked, stream=bool(body.stream), usage=body.wants_usage)
        whole, writer = openai_completions.whole, openai_completions.CompletionWriter
        return await server.run(request, call, partial(whole, body=body), partial(writer, body=body))

    both(app, "/chat/completions", chat)
    both(app, "/completions", complete)


def _add_responses(app: FastAPI, server: Server) -> None:
    async def respond(request: Request, body: ResponsesBody) -> Response:
        call = server.asked(request, body, body.asked, stream=bool(body.stream))
        whole, writer = partial(responses_writer.whole, body=body), partial(ResponseWriter, body=body)
        return await server.run(request, call, whole, writer)

    async def count(request: Request, body: ResponsesBody) -> dict[str, Any]:
        tokens = await server.count(server.asked(request, body, body.asked, stream=False))
        return {"object": "response.input_tokens", "input_tokens": tokens}

    both(app, "/responses", respond)
    both(app, "/responses/input_tokens", count)


def _add_messages(app: FastAPI, server: Server) -> None:
    strip = server.settings.strip_pseudo_headers

    async def message(request: Request, body: anthropic_messages.MessagesBody) -> Response:
        call = server.asked(request, body, partial(body.asked, strip=strip), stream=bool(body.stream))
        return await server.run(request, call, anthropic_messages.whole, anthropic_messages.MessageWriter)

    async def count(request: Request, body: anthropic_messages.CountBody) -> dict[str, int]:
        call = server.asked(request, body, partial(body.asked, strip=strip), stream=False)
        return {"input_tokens": await server.count(call)}

    both(app, "/messages", message)
    both(app, "/messages/count_tokens", count)


def both(app: FastAPI, path: str, endpoint: Callable[..., Any]) -> None:
    """Add a path with ``/v1`` before it and without: clients are configured either way."""
    app.add_api_route(f"/v1{path}", endpoint, methods=["POST"])
    app.add_api_route(path, endpoint, methods=["POST"], include_in_schema=False)


# Errors -----------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: ApiError) -> Response:
        headers, request_id = request.state.headers, request.state.request_id
        is_anthropic = speaks_anthropic(request.url.path, headers)
        body = error.anthropic(request_id) if is_anthropic else error.openai()
        return _json(body, error.headers(), error.kind.status)

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await answer(request, _of_validation(error))

    async def http(request: Request, error: HTTPException) -> Response:
        kinds = {404: NOT_FOUND, 405: NOT_ALLOWED, 403: FORBIDDEN}
        message = f"{request.method} {request.url.path}: {error.detail}"
        return await answer(request, ApiError(kinds.get(error.status_code, INVALID), message))

    async def fault(request: Request, error: Exception) -> Response:
        # Whoever raised it is told by the log, which has the traceback.
        return await answer(request, ApiError(FAULT, "The server met a fault."))

    app.exception_handler(Exception)(fault)
    app.exception_handler(ApiError)(answer)
    app.exception_handler(RequestValidationError)(invalid)
    for status in (400, 403, 404, 405):
        app.exception_handler(status)(http)


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(INVALID_JSON, f"The request is not valid JSON: {first.get('ctx', {}).get('error')}.")
    place = ".".join(str(part) for part in first["loc"] if part != "body") or None
    return ApiError(INVALID, f"{place or 'the request'}: {first['msg']}.", param=place)
