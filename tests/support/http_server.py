"""A real server on a free port of this machine, in a thread, and the real clients of OpenAI and Anthropic."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai
import uvicorn

from agent_memory_core import AgentMemory
from agent_memory_core.manager import ModelManager
from agent_memory_core.server import ServerSettings, create_app


@dataclass(frozen=True)
class Running:
    """A server that runs, and the memory that is meant where no model is named."""

    url: str
    memory: AgentMemory
    clients: contextlib.ExitStack
    """Closes them when the server ends."""

    # The clients are untyped: to a type checker every answer is a union of dozens of types.
    def openai(self, key: str = "any", **headers: str) -> Any:
        url = f"{self.url}/v1"
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, default_headers=headers)
        return self.clients.enter_context(client)

    def anthropic(self, key: str = "any", **headers: str) -> Any:
        client = anthropic.Anthropic(base_url=self.url, api_key=key, max_retries=0, default_headers=headers)
        return self.clients.enter_context(client)

    def http(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


@contextlib.contextmanager
def serve(source: AgentMemory | ModelManager, *, ready: bool = True, **settings: Any) -> Iterator[Running]:
    """Serve ``source`` until the block ends; wait for the model unless ``ready`` is off."""
    app = create_app(source, ServerSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    with contextlib.ExitStack() as clients:
        running = Running(f"http://127.0.0.1:{port}", app.state.server.host.memory, clients)
        try:
            with running.http() as client:
                wait_until(lambda: not ready or client.get("/health/ready").status_code == 200)
            yield running
        finally:
            server.should_exit = True
            thread.join()


def wait_until(is_so: Any, seconds: float = 60) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
