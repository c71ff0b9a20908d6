"""The server as a process: where it listens, and how it ends without cutting off an answer."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from concurrent.futures import Future
from types import FrameType

import uvicorn

from agent_memory_core import AgentMemory, InvalidSetting
from agent_memory_core.server.app import Server, create_app
from agent_memory_core.server.settings import ServerSettings

log = logging.getLogger("agent_memory.server")

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
        await self._server.turns.drain(seconds)
        self._stop()

    def _stop(self) -> None:
        self.should_exit = True


def serve(memory: AgentMemory, settings: ServerSettings) -> None:
    """Serve ``memory`` until a signal ends the process. The caller closes it.

    Raises:
        InvalidSetting: anybody on the network could use it.
        ModelError: the model cannot be loaded.
    """
    app = create_app(memory, settings)
    server: Server = app.state.server
    check_binding(settings, has_keys=bool(server.keys))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_WORDS,
        workers=1,
    )
    GracefulServer(config, server).run()
    if server.health.failure is not None:
        raise server.health.failure


def check_binding(settings: ServerSettings, *, has_keys: bool) -> None:
    """Check that only this machine reaches a server that asks for no key.

    Raises:
        InvalidSetting: others would.
    """
    if has_keys or is_loopback(settings.host):
        return
    if not settings.insecure_no_auth:
        raise InvalidSetting(
            f"host={settings.host!r} without keys would let anybody on the network in: set "
            "AGENT_MEMORY_SERVER_API_KEYS or --api-key-file, or listen on 127.0.0.1. --insecure-no-auth listens "
            "all the same."
        )
    log.warning("anybody who reaches %s may use this server: it asks for no key", settings.host)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
