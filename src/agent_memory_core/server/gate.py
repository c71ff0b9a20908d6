"""What every request passes first: who asks, from where, and how much. Before anything of its body is read.

A page in a browser can send requests to a server on the same machine. So the name under which the server was reached
must be one of its own (which stops DNS rebinding), and a page's origin must be allowed.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent_memory_core.server.errors import FORBIDDEN, TOO_LARGE, TOO_SLOW, UNAUTHORIZED, ApiError
from agent_memory_core.server.ids import new_id
from agent_memory_core.server.keys import NOBODY, Keys, Tenant, key_hash
from agent_memory_core.server.logs import log, log_request, short_hash
from agent_memory_core.server.metrics import Metrics
from agent_memory_core.server.settings import ServerSettings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})

OPEN_PATHS = frozenset({"/", "/health", "/health/live", "/health/ready", "/health/startup", "/ui"})
"""What anybody may ask: whether the server lives, and the page for whoever runs it, which shows nothing by itself."""

OPEN_PREFIX = "/ui/"
"""How the paths begin of the page's files."""

ADMIN_PREFIXES = ("/admin/", "/debug/")
"""How the paths begin of whoever runs the server."""


PROVIDER_PREFIX = "/anthropic/"
"""What some clients put before every path of Anthropic's dialect."""


def speaks_anthropic(path: str, headers: Mapping[str, str]) -> bool:
    """Whether a request is in Anthropic's dialect rather than in OpenAI's."""
    return "/messages" in path or ("anthropic-version" in headers and "/models" in path)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


class Gate:
    """An ASGI application in front of another one."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, keys: Keys, metrics: Metrics) -> None:
        self._app, self._settings, self._keys, self._metrics = app, settings, keys, metrics
        own = {"localhost", "127.0.0.1", "[::1]", settings.host, f"[{settings.host}]"}
        self._hosts = {name.lower() for name in own | set(settings.allowed_hosts)}
        self._checks_host = settings.host not in ("0.0.0.0", "::") or bool(settings.allowed_hosts)
        self._most = int(settings.max_body_mb * 2**20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with why not; then count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"].startswith(PROVIDER_PREFIX):
            scope = {**scope, "path": scope["path"].removeprefix(PROVIDER_PREFIX.rstrip("/"))}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id("req_")
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, headers=headers)
        sent = _Sent(send, request_id)
        try:
            await self._let_in(scope, headers, receive, sent)
        finally:
            self._count(scope, sent)

    async def _let_in(self, scope: Scope, headers: Mapping[str, str], receive: Receive, sent: _Sent) -> None:
        try:
            self._check_source(headers)
            self._check_length(headers)
            # A browser asks without the key whether it may ask with it.
            if not _is_open(scope["path"]) and scope["method"] != "OPTIONS":
                scope["state"]["tenant"] = self._tenant(scope, headers)
            body = await self._body(receive)
        except ApiError as error:
            self._metrics.refused(error.kind)
            await _refuse(error, scope["path"], headers, sent)
            return
        await self._app(scope, _replay(body, receive), sent)

    def _tenant(self, scope: Scope, headers: Mapping[str, str]) -> Tenant:
        """Whose request it is; whoever runs the server needs another key, or the private socket."""
        if not scope["path"].startswith(ADMIN_PREFIXES):
            return self._keys.tenant(headers)
        wanted, given = self._settings.admin_key, headers.get("x-admin-key", "")
        if self._is_private(scope) or (wanted and hmac.compare_digest(key_hash(wanted), key_hash(given))):
            return NOBODY
        if wanted:
            raise ApiError(UNAUTHORIZED, "Send the admin key in X-Admin-Key.")
        raise ApiError(
            FORBIDDEN, "These paths are closed: set admin_key, or admin_socket, where the server is started."
        )

    def _is_private(self, scope: Scope) -> bool:
        """Whether a request came in by the admin socket; another Unix socket is nothing better than a port."""
        private, reached = self._settings.admin_socket, scope.get("server")
        return private is not None and reached is not None and tuple(reached) == (str(private), None)

    def _count(self, scope: Scope, sent: _Sent) -> None:
        # Only the templates of paths: what clients make up would fill the memory of whoever counts.
        endpoint = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.answered(endpoint, method, sent.status, perf_counter() - sent.began)
        level = logging.DEBUG if _is_open(scope["path"]) else logging.INFO
        if log.isEnabledFor(level):
            request = {"request": sent.request_id, "method": method, "endpoint": endpoint}
            log_request(level, request | {"status": sent.status, **sent.details(scope["state"])})

    def _check_source(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        host = headers["host"] if headers.get("host", "").endswith("]") else host
        if self._checks_host and host.lower() not in self._hosts:
            raise ApiError(
                FORBIDDEN, f"The host {host!r} is not one of this server's: name it in allowed_hosts."
            )
        origin = headers.get("origin")
        allowed = self._settings.cors_origins
        if origin is None or "*" in allowed or origin in allowed:
            return
        if re.sub(r"^https?://|:\d+$", "", origin.lower()) not in self._hosts:
            raise ApiError(
                FORBIDDEN, f"Pages of the origin {origin!r} may not call: name it in cors_origins."
            )

    def _check_length(self, headers: Mapping[str, str]) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._most:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            TOO_LARGE, f"The request is larger than {self._settings.max_body_mb:g} MiB: send less."
        )

    async def _body(self, receive: Receive) -> list[Message]:
        """The messages of a request's body, which has to come in time."""
        messages, size = [], 0
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                while True:
                    message = await receive()
                    messages.append(message)
                    size += len(message.get("body", b""))
                    if size > self._most:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return messages
        except TimeoutError:
            seconds = self._settings.body_timeout
            raise ApiError(TOO_SLOW, f"The request did not arrive within {seconds:g} seconds.") from None


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """Give what was received already, and then what still comes."""
    waiting = iter(messages)

    async def again() -> Message:
        return next(waiting, None) or await receive()

    return again


class _Sent:
    """Sends an answer with the headers by which it is found again in the log, and notes its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.request_id, self.began, self.status = request_id, perf_counter(), 499
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = headers["request-id"] = self.request_id
            headers["x-response-time"] = f"{perf_counter() - self.began:.6f}"
        await self._send(message)

    def details(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What the log says of an answer, without a word of its content."""
        turn = state.get("turn")
        said: dict[str, Any] = {"seconds": round(perf_counter() - self.began, 3)}
        if turn is None:
            return said
        key, report = turn.call.key, turn.report
        said |= {"namespace": key.namespace, "session": short_hash(key.session_id)}
        if report is None:
            return said
        counted = report.usage
        return said | {
            "prompt": counted.prompt_tokens,
            "cached": counted.cache_read,
            "tier": report.hit_tier,
            "miss": report.miss_reason or "-",
            "answer": counted.completion_tokens,
            "ttft": round(report.time_to_first_token, 3),
        }


async def _refuse(error: ApiError, path: str, headers: Mapping[str, str], sent: _Sent) -> None:
    body = error.anthropic(sent.request_id) if speaks_anthropic(path, headers) else error.openai()
    raw = [(b"content-type", b"application/json"), (b"connection", b"close")]
    raw += [(name.lower().encode(), value.encode()) for name, value in error.headers().items()]
    await sent({"type": "http.response.start", "status": error.kind.status, "headers": raw})
    await sent({"type": "http.response.body", "body": json.dumps(body).encode()})
