"""What clients ask and are answered, in files, for whoever debugs an agent and asks for it. Otherwise nothing keeps it.

A file for each request, in a folder that only its owner can read. A disk that fails, or does not answer, costs files
and never an answer. Headers are not written, so no key is.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent_memory_core import InvalidSetting
from agent_memory_core.server.gate import ADMIN_PREFIXES
from agent_memory_core.server.logs import log

MOST_WAITING = 64 * 2**20
"""Bytes that wait for the disk at most; of requests beyond that no file is written."""

LAST_WORDS = 5.0
"""Seconds that a server which ends waits for its last files."""


@dataclass
class Exchange:
    """A request and its answer, as they passed by."""

    request_id: str
    path: str
    namespace: str
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    status: int | None = None
    body: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)
    is_complete: bool = False
    """Whether the answer was sent to its end."""

    @property
    def nbytes(self) -> int:
        """What it takes while it waits."""
        return len(self.body) + len(self.answer)

    def to_json(self) -> bytes:
        """The content of its file."""
        body, answer = bytes(self.body), bytes(self.answer)
        try:
            return self._written(_value(body), _value(answer))
        except RecursionError:
            # Whoever nests a request too deep is refused, and wants to be seen all the same.
            return self._written(_text(body), _text(answer))

    def _written(self, body: object, answer: object) -> bytes:
        said = {
            "request_id": self.request_id,
            "began": self.began.isoformat(timespec="milliseconds"),
            "seconds": round(self.seconds, 3),
            "path": self.path,
            "namespace": self.namespace,
            "status": self.status,
            "complete": self.is_complete,
            "body": body,
            "answer": answer,
        }
        return json.dumps(said).encode() + b"\n"


class PromptLog:
    """The files of a server, which are written one after another on a thread of their own.

    Args:
        folder: where; it is made if it is not there.

    Raises:
        InvalidSetting: others can read it, or it cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = _prepared(folder)
        self._queue: SimpleQueue[Exchange | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting, self._number = 0, 0
        self._is_failing = False
        self._thread: threading.Thread | None = None
        log.warning(
            "log_prompts is on: every prompt and every answer is written, as it is, to %s", self._folder
        )

    def add(self, exchange: Exchange) -> None:
        """Have a file written. It never waits for the disk."""
        with self._lock:
            if self._waiting and self._waiting + exchange.nbytes > MOST_WAITING:
                self._tell_failing("the disk does not keep up")
                return
            self._waiting += exchange.nbytes
            if self._thread is None:
                # A disk that does not answer must not keep the process from ending.
                self._thread = threading.Thread(target=self._work, daemon=True, name="agent-memory-prompts")
                self._thread.start()
        self._queue.put(exchange)

    def close(self) -> None:
        """Write what waits, unless that takes too long."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(LAST_WORDS)

    def _work(self) -> None:
        while (exchange := self._queue.get()) is not None:
            try:
                self._write(exchange)
                error = None
            except OSError as failure:
                error = failure
            with self._lock:
                self._waiting -= exchange.nbytes
                if error is not None:
                    self._tell_failing(str(error))
                elif self._is_failing:
                    self._is_failing = False
                    log.warning("prompts are written again")

    def _write(self, exchange: Exchange) -> None:
        self._number += 1
        stamp = exchange.began.strftime("%Y%m%dT%H%M%S.%f")
        path = self._folder / f"{stamp}-{self._number:06d}-{exchange.request_id}.json"
        content = exchange.to_json()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)

    def _tell_failing(self, why: str) -> None:
        """Once, not with every request that meets the same."""
        level = logging.DEBUG if self._is_failing else logging.ERROR
        self._is_failing = True
        log.log(
            level, "requests are answered, but their prompts are not written until this is mended: %s", why
        )


class PromptRecorder:
    """An ASGI application around another one: hands what passes through to a `PromptLog`. It stands behind the gate."""

    def __init__(self, app: ASGIApp, prompts: PromptLog) -> None:
        self._app, self._prompts = app, prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Record a request that carries something, of those that are a client's."""
        if not _is_a_clients(scope):
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        exchange = Exchange(state["request_id"], scope["path"], state["tenant"].namespace)
        began = perf_counter()
        try:
            await self._app(scope, _heard(receive, exchange), _seen(send, exchange))
        finally:
            exchange.seconds = perf_counter() - began
            self._prompts.add(exchange)


def _is_a_clients(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].startswith(ADMIN_PREFIXES):
        return False
    # Paths that are open to all know of nobody.
    return "tenant" in scope["state"]


def _heard(receive: Receive, exchange: Exchange) -> Receive:
    async def hear() -> Message:
        message = await receive()
        exchange.body += message.get("body", b"")
        return message

    return hear


def _seen(send: Send, exchange: Exchange) -> Send:
    async def see(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
        exchange.answer += message.get("body", b"")
        await send(message)
        if message["type"] == "http.response.body":
            exchange.is_complete = not message.get("more_body", False)

    return see


def _value(raw: bytes) -> object:
    """JSON as its value, and anything else as `_text` has it. Raises RecursionError where it is nested too deep."""
    try:
        return json.loads(raw)
    except ValueError:
        return _text(raw)


def _text(raw: bytes) -> str:
    """Text as it is, and of anything else its size."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return f"{len(raw)} bytes"


def _prepared(folder: Path) -> Path:
    """The folder, which only its owner can read.

    Raises:
        InvalidSetting: others can, or it cannot be used.
    """
    folder, named = folder.absolute(), f"log_prompts={str(folder)!r}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise InvalidSetting(f"{named} cannot be used: {error}.") from error
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise InvalidSetting(
            f"{named} is not yours alone: chmod 700 it, or name a folder that is not there yet."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidSetting(f"{named} cannot be written: chmod 700 it, or name another folder.")
    return folder
