"""The HTTP application: its paths, and what each of them calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response

from agent_memory_core import AgentMemory
from agent_memory_core.manager import ModelManager
from agent_memory_core.server import anthropic_messages, openai_chat, openai_completions
from agent_memory_core.server.admin import Admin
from agent_memory_core.server.agents_api import AgentPaths
from agent_memory_core.server.coordination_api import CoordinationPaths
from agent_memory_core.server.errors import (
    FAULT,
    FORBIDDEN,
    INVALID,
    INVALID_JSON,
    NOT_ALLOWED,
    NOT_FOUND,
    ApiError,
)
from agent_memory_core.server.gate import Gate, speaks_anthropic
from agent_memory_core.server.host import OpenModel
from agent_memory_core.server.prompt_log import PromptLog, PromptRecorder
from agent_memory_core.server.responses_api import ResponsePaths
from agent_memory_core.server.serving import Server, json_response
from agent_memory_core.server.settings import ServerSettings
from agent_memory_core.server.tokens import TokenPaths
from agent_memory_core.server.ui import add_page


def create_app(
    source: AgentMemory | ModelManager,
    settings: ServerSettings | None = None,
    open_model: OpenModel | None = None,
) -> FastAPI:
    """The application that serves one model, or several, which its caller closes.

    Args:
        source: what is served: one memory, or a manager whose models are all on MLX. Requests name one of those, which
            is loaded when it is asked for; its default model is meant where they name none.
        settings: how; None takes them from the environment.
        open_model: makes the memory of another model, without loading it, when the model is swapped; None makes one
            on the same folder, with the settings of that model's profile.

    Raises:
        InvalidSetting: the keys cannot be read, a configured model cannot be served, or prompts cannot be logged.
    """
    server = Server(source, settings or ServerSettings(), open_model)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.ensure_future(work)
            for work in (server.load(), server.free_memory(), server.free_models())
        ]
        yield
        for task in tasks:
            task.cancel()
        server.close()

    app = FastAPI(
        title="agent-memory", lifespan=lifespan, strict_content_type=False, docs_url=None, redoc_url=None
    )
    app.state.server = server
    _add_errors(app, server)
    _add_paths(app, server)
    _add_layers(app, server)
    return app


def _add_layers(app: FastAPI, server: Server) -> None:
    """What a request passes before its path; the last one is passed first."""
    if server.settings.log_prompts is not None:
        prompts = PromptLog(server.settings.log_prompts)
        server.closing.append(prompts.close)
        app.add_middleware(PromptRecorder, prompts=prompts)
    if server.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors_origins),
            allow_methods=["DELETE", "GET", "PATCH", "POST"],
            allow_headers=["*"],
        )
    app.add_middleware(Gate, settings=server.settings, keys=server.keys, metrics=server.metrics)


def _add_paths(app: FastAPI, server: Server) -> None:
    server.health.add_to(app)
    server.catalog.add_to(app)
    server.metrics.add_to(app)
    Admin(server).add_to(app)
    add_page(app)
    CoordinationPaths(server).add_to(app)
    agents = AgentPaths(server)
    agents.add_to(app)
    server.closing.append(agents.close)
    _add_completions(app, server)
    ResponsePaths(server).add_to(app)
    TokenPaths(server).add_to(app)
    _add_messages(app, server)


def _add_completions(app: FastAPI, server: Server) -> None:
    async def chat(request: Request, body: openai_chat.ChatBody) -> Response:
        wire: dict[str, Any] = {"usage_in_stream": body.wants_usage, "is_older": body.is_older}
        call = server.asked(request, body, body.asked, stream=bool(body.stream), **wire)
        if (body.n or 1) > 1:
            count, stream = body.n or 1, partial(openai_chat.stream_of, count=body.n or 1)
            return await server.run_several(request, call, count, openai_chat.whole_of, stream)
        return await server.run(request, call, openai_chat.whole, openai_chat.ChatWriter)

    async def complete(request: Request, body: openai_completions.CompletionBody) -> Response:
        wire: dict[str, Any] = {"usage_in_stream": body.wants_usage}
        call = server.asked(request, body, body.asked, stream=bool(body.stream), **wire)
        whole, writer = openai_completions.whole, openai_completions.CompletionWriter
        return await server.run(request, call, partial(whole, body=body), partial(writer, body=body))

    both(app, "/chat/completions", chat)
    both(app, "/completions", complete)


def _add_messages(app: FastAPI, server: Server) -> None:
    strip = server.settings.strip_pseudo_headers

    async def message(request: Request, body: anthropic_messages.MessagesBody) -> Response:
        whole, writer = anthropic_messages.whole, anthropic_messages.MessageWriter
        place = await server.threads.place(request.state.tenant.namespace, body.wanted)
        asked = partial(body.going_on(place).asked, strip=strip)
        call = server.asked(request, body, asked, place.thread, stream=bool(body.stream))
        in_place = partial(whole, body=body, place=place)
        return await server.run(request, call, in_place, partial(writer, body=body, place=place))

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


def _add_errors(app: FastAPI, server: Server) -> None:
    async def answer(request: Request, error: ApiError) -> Response:
        server.metrics.refused(error.kind)
        headers, request_id = request.state.headers, request.state.request_id
        is_anthropic = speaks_anthropic(request.url.path, headers)
        body = error.anthropic(request_id) if is_anthropic else error.openai()
        return json_response(body, error.headers(), error.kind.status)

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
