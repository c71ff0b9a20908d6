"""The server as a process: where it listens, and how it ends without cutting off an answer."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType

import uvicorn
from fastapi import FastAPI

from agent_memory_core import AgentMemory
from agent_memory_core.server.app import Server, create_app
from agent_memory_core.server.logs import configure, log
from agent_memory_core.server.settings import ServerSettings

LAST_WORDS = 5
"""Seconds in which the answers that were withdrawn are told so."""


class GracefulServer(uvicorn.Server):
    """Ends in steps: no more turns are taken, and health checks are told so; those in flight get time to end; the
    others are withdrawn, and what they computed is kept. A second signal leaves no time, a third one ends it at once.
    """

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._endings: list[Future[None]] = []

    async def serve(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Serve until a signal comes, or the model turns out to be unusable."""
        self._loop = asyncio.get_running_loop()
        self._server.on_failure = self._stop
        self._loop.add_signal_handler(signal.SIGHUP, self._server.reload)
        await super().serve()

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
        await self._server.turns.drain(seconds)
        log.info("stopping: no turn is in flight, what they computed is being written")
        self._stop()

    def _stop(self) -> None:
        self.should_exit = True


def serve(
    memory: AgentMemory, settings: ServerSettings, again: Callable[[], ServerSettings] | None = None
) -> None:
    """Serve ``memory`` until a signal ends the process. The caller closes it, which writes what is queued.

    Args:
        memory: what is served.
        settings: how.
        again: reads the settings once more when SIGHUP comes; None keeps them, and reads the file of keys again.

    Raises:
        InvalidSetting: anybody on the network could use it.
        ModelError: the model cannot be loaded.
    """
    configure(settings.log_level, settings.log_format)
    app = create_app(memory, settings)
    server: Server = app.state.server
    server.read_settings = again or (lambda: settings)
    GracefulServer(_config(app, settings), server).run()
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
