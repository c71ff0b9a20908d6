"""A proxy between a client and a server that wants what a model with random weights does not: a word, or a call.

It changes nothing but the constraint of a request's answer, and the schema of one tool, so that the call does no harm.
What it saw can be read afterwards.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from support.http_server import wait_until

CALL = "Call your tool"
"""Where the user's last words contain this, the answer is a call of the shell's tool; else it is `ANSWER`."""

ANSWER = {"const": "pong"}
PRINTED = "the-tool-was-called"
COMMAND = f"echo {PRINTED}"
SHELLS = {"Bash": "command", "bash": "command", "exec_command": "cmd", "shell_command": "command"}
"""The clients' tools that run a command, and the argument that holds it."""


class Usage(NamedTuple):
    """The tokens of an answer, in whichever dialect it came."""

    prompt: int
    cached: int
    answer: int


@dataclass(slots=True)
class Exchange:
    """A request of a client, and what it was answered."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    """As the client sent it."""
    answer: bytearray = field(default_factory=bytearray)
    status: int = 0

    @property
    def has_tools(self) -> bool:
        """Whether it is of the conversation itself: requests beside it, such as those for a title, have none."""
        return bool(self.body.get("tools"))

    @property
    def turn(self) -> list[dict[str, Any]]:
        """The conversation that was sent."""
        return conversation_of(self.body)

    @property
    def usage(self) -> Usage:
        """The last that the answer says of its tokens."""
        return usage_of(self.events())

    def events(self) -> list[dict[str, Any]]:
        """The JSON objects of the answer: the events of a stream, or the only one."""
        text = self.answer.decode()
        if text.startswith("{"):
            return [json.loads(text)]
        lines = (line[6:] for line in text.splitlines() if line.startswith("data: {"))
        return [json.loads(line) for line in lines]


def usage_of(events: list[dict[str, Any]]) -> Usage:
    """The last that the objects of an answer say of its tokens."""
    said = [event.get("response", event).get("usage") for event in events]
    last = next(usage for usage in reversed(said) if usage)
    if "prompt_tokens" in last:
        cached = last["prompt_tokens_details"]["cached_tokens"]
        return Usage(last["prompt_tokens"], cached, last["completion_tokens"])
    if "input_tokens_details" in last:
        cached = last["input_tokens_details"]["cached_tokens"]
        return Usage(last["input_tokens"], cached, last["output_tokens"])
    cached = last["cache_read_input_tokens"]
    whole = last["input_tokens"] + last["cache_creation_input_tokens"] + cached
    return Usage(whole, cached, last["output_tokens"])


def conversation_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a chat, or the items of a response."""
    return body.get("messages") or body.get("input") or []


class Proxy:
    """The proxy as an ASGI application. Its ``target`` changes when the server is started again on another port."""

    def __init__(self) -> None:
        self.target, self.seen = "", list[Exchange]()
        self._client = httpx.AsyncClient(timeout=600)
        methods = ["DELETE", "GET", "HEAD", "POST"]
        routes = [Route("/{path:path}", self._pass, methods=methods)]
        self.app = Starlette(routes=routes, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self._client:
            yield

    async def _pass(self, request: Request) -> Response:
        body, raw = None, await request.body()
        if raw:
            body = json.loads(raw)
        exchange = Exchange(request.url.path, dict(request.headers), body or {})
        self.seen.append(exchange)
        sent = json.dumps(steered(request.url.path, body)).encode() if body else raw
        headers = {k: v for k, v in exchange.headers.items() if k not in ("host", "content-length")}
        url = f"{self.target}{request.url.path}?{request.url.query}"
        asked = self._client.build_request(request.method, url, headers=headers, content=sent)
        try:
            answer = await self._client.send(asked, stream=True)
        except httpx.ConnectError:
            return Response(status_code=503)
        exchange.status = answer.status_code
        kept = {k: v for k, v in answer.headers.items() if k not in ("content-length", "content-encoding")}
        return StreamingResponse(
            _recorded(answer, exchange), answer.status_code, kept, background=BackgroundTask(answer.aclose)
        )


async def _recorded(answer: httpx.Response, exchange: Exchange) -> AsyncIterator[bytes]:
    async for chunk in answer.aiter_bytes():
        exchange.answer += chunk
        yield chunk


@contextlib.contextmanager
def steering() -> Iterator[tuple[Proxy, str]]:
    """A proxy, which needs a target, and its address."""
    proxy = Proxy()
    server = uvicorn.Server(uvicorn.Config(proxy.app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield proxy, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


# What is wanted ---------------------------------------------------------------------------------------------


def steered(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The request that wants what a client's user would get of a good model."""
    name = next((name for end, name in _DIALECTS.items() if path.endswith(end)), None)
    if name is None:
        return body
    # Side requests, such as those for a title, are cut short.
    if not body.get("tools"):
        return {**body, _LIMITS[name]: 8}
    tools = [_harmless(tool) for tool in body["tools"]]
    shell = next((_name(tool) for tool in tools if _name(tool) in SHELLS), None)
    wants_call = shell is not None and CALL in json.dumps(_since_the_model_spoke(conversation_of(body)))
    return body | {"tools": tools} | (_CALLS[name](shell) if wants_call else _WORDS[name])


def _since_the_model_spoke(turn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    spoken = [
        index
        for index, item in enumerate(turn)
        if item.get("role") == "assistant" or item.get("type") in ("function_call", "reasoning")
    ]
    return turn[spoken[-1] + 1 :] if spoken else turn


def _name(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool).get("name"))


def _harmless(tool: dict[str, Any]) -> dict[str, Any]:
    if _name(tool) not in SHELLS:
        return tool
    argument = SHELLS[_name(tool)]
    schema = {
        "type": "object",
        "properties": {argument: {"const": COMMAND}},
        "required": [argument],
        "additionalProperties": False,
    }
    if "function" in tool:
        return tool | {"function": tool["function"] | {"parameters": schema}}
    return tool | {"input_schema" if "input_schema" in tool else "parameters": schema}


_DIALECTS = {"/chat/completions": "chat", "/messages": "messages", "/responses": "responses"}
_LIMITS = {"chat": "max_tokens", "messages": "max_tokens", "responses": "max_output_tokens"}
_FORM = {"type": "json_schema", "name": "answer", "schema": ANSWER}
_WORDS: dict[str, dict[str, Any]] = {
    "chat": {"tool_choice": "none", "response_format": {"type": "json_schema", "json_schema": _FORM}},
    "messages": {"tool_choice": {"type": "none"}, "output_config": {"format": _FORM}},
    "responses": {"tool_choice": "none", "text": {"format": _FORM}},
}
_CALLS: dict[str, Callable[[str | None], dict[str, Any]]] = {
    "chat": lambda name: {"tool_choice": {"type": "function", "function": {"name": name}}},
    "messages": lambda name: {"tool_choice": {"type": "tool", "name": name}},
    "responses": lambda name: {"tool_choice": {"type": "function", "name": name}},
}
