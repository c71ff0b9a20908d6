"""The server as a process: where it listens, and how it ends without cutting off an answer."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType

import uvicorn
from fastapi import FastAPI

from agent_memory_core import AgentMemory
from agent_memory_core.manager import ModelManager
from agent_memory_core.server.app import create_app
from agent_memory_core.server.host import OpenModel
from agent_memory_core.server.logs import configure, log
from agent_memory_core.server.serving import Server
from agent_memory_core.server.settings import ServerSettings
from agent_memory_core.server.unix_socket import listening

LAST_WORDS = 5
"""Seconds in which the answers that were withdrawn are told so."""


class GracefulServer(uvicorn.Server):
    """Ends in steps: no more turns are taken, and health checks are told so; those in flight get time to end; the
    others are withdrawn, and what they computed is kept. A second signal leaves no time, a third one ends it at once.
    """

    def __init__(self, config: uvicorn.Config, server: Server, admin: socket.socket | None) -> None:
        super().__init__(config)
        self._server, self._admin = server, admin
        self._endings: list[Future[None]] = []

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes, or the model turns out to be unusable."""
        self._loop = asyncio.get_running_loop()
        self._server.on_failure = self._stop
        self._loop.add_signal_handler(signal.SIGHUP, self._server.reload)
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, also on the admin socket if there is to be one."""
        await super().startup(sockets)
        if sockets is not None:
            log.info("running on unix:%s", self._server.settings.uds)
        if self._admin is not None:
            self.servers.append(await self._loop.create_server(self._protocol, sock=self._admin))

    def _protocol(self, _loop: asyncio.AbstractEventLoop | None = None) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=_loop
        )
        return made

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if len(self._endings) >= 2:
            super().handle_exit(sig, frame)
            return
        self._server.turns.draining = True
        seconds = 0 if self._endings else self._server.settings.drain
        self._endings.append(asyncio.run_coroutine_threadsafe(self._drain(seconds), self._loop))

    async def _drain(self, seconds: float) -> None:
        log.info("stopping: no more turns are taken, those in flight get %g seconds to end", seconds)
        try:
            if not await self._server.drain(seconds):
                log.warning(
                    "stopping: not everything is in the object store; the next start uploads the rest"
                )
            log.info("stopping: no turn is in flight, what they computed is being written")
        finally:
            self._stop()

    def _stop(self) -> None:
        self.should_exit = True


def serve(
    source: AgentMemory | ModelManager,
    settings: ServerSettings,
    again: Callable[[], ServerSettings] | None = None,
    open_model: OpenModel | None = None,
) -> None:
    """Serve one model, or several, until a signal ends the process. The caller closes it, which writes what is queued.

    Args:
        source: what is served, see `create_app`.
        settings: how.
        again: reads the settings once more when SIGHUP comes; None keeps them, and reads the file of keys again.
        open_model: see `create_app`.

    Raises:
        InvalidSetting: anybody on the network could use it, or a Unix socket cannot be opened.
        ModelError: the model cannot be loaded.
    """
    configure(settings.log_level, settings.log_format)
    app = create_app(source, settings, open_model)
    server: Server = app.state.server
    server.read_settings = again or (lambda: settings)
    with (
        listening(settings.admin_socket, "admin_socket") as admin_socket,
        listening(settings.uds, "uds") as own_socket,
    ):
        sockets = None if own_socket is None else [own_socket]
        GracefulServer(_config(app, settings), server, admin_socket).run(sockets)
    if server.health.failure is not None:
        raise server.health.failure


def _config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_WORDS,
        workers=1,
    )
