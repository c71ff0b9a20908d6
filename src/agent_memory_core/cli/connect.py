"""`agent-memory connect`: what to tell a client so that it finds the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, NamedTuple

import typer

from agent_memory_core import AgentMemory
from agent_memory_core.cli.options import Model, given

HOUR_MS = 3_600_000
"""How long agents are told to wait: their own limits are shorter than a long prompt takes on a laptop."""

ANSWER = 4096
"""Most tokens of an answer that agents are told to ask for."""


class Client(StrEnum):
    """A client with settings of its own."""

    CLAUDE_CODE = "claude-code"
    CODEX = "codex"
    OPENCODE = "opencode"
    OPENAI = "openai"


class Server(NamedTuple):
    """What a client has to know."""

    url: str
    key: str
    model: str
    context: int | None
    """Most tokens of prompt and answer; None where the model is not here yet."""


def connect(
    client: Annotated[Client, typer.Argument(help="Which client.")],
    model: Model = None,
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    key: Annotated[str, typer.Option(help="Its key; any text where it asks for none.")] = "any",
) -> None:
    """Print the settings with which a client uses the server."""
    with AgentMemory(**given(model=model, cache_dir=None)) as memory:
        server = Server(url.rstrip("/"), key, memory.model_name, memory.stated_context_length)
    # Without the console's markup and its breaks, because it is pasted.
    typer.echo(_SETTINGS[client](server))


def _claude_code(server: Server) -> str:
    values = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": server.key,
        "ANTHROPIC_MODEL": server.model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": server.model,
        "ANTHROPIC_SMALL_FAST_MODEL": server.model,
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(ANSWER),
        "API_TIMEOUT_MS": str(HOUR_MS),
    }
    if server.context:
        # It takes every model for one of its vendor, with a window that few others have.
        windows = ("CLAUDE_CODE_MAX_CONTEXT_TOKENS", "CLAUDE_CODE_AUTO_COMPACT_WINDOW")
        values |= dict.fromkeys(windows, str(server.context))
    return _exports(values)


def _openai(server: Server) -> str:
    return _exports({"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": server.key})


def _exports(values: dict[str, str]) -> str:
    quoted = {name: "'" + value.replace("'", "'\\''") + "'" for name, value in values.items()}
    return "\n".join(f"export {name}={value}" for name, value in quoted.items())


def _codex(server: Server) -> str:
    # JSON's strings are TOML's basic strings.
    window = f"model_context_window = {server.context}\n" if server.context else ""
    return (
        "# ~/.codex/config.toml; the key is in the variable LOCAL_MODEL_KEY\n"
        f"# export LOCAL_MODEL_KEY={json.dumps(server.key)}\n"
        f"model = {json.dumps(server.model)}\n"
        'model_provider = "agent-memory"\n'
        f"{window}\n"
        "[model_providers.agent-memory]\n"
        'name = "agent-memory"\n'
        f"base_url = {json.dumps(server.url + '/v1')}\n"
        'wire_api = "responses"\n'
        'env_key = "LOCAL_MODEL_KEY"\n'
        f"stream_idle_timeout_ms = {HOUR_MS}"
    )


def _opencode(server: Server) -> str:
    model = {"name": server.model}
    limits = {"limit": {"context": server.context, "output": ANSWER}} if server.context else {}
    options = {"baseURL": f"{server.url}/v1", "apiKey": server.key}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "agent-memory",
        "options": options,
        "models": {server.model: model | limits},
    }
    config = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {"agent-memory": provider},
        "model": f"agent-memory/{server.model}",
    }
    return json.dumps(config, indent=2)


_SETTINGS: dict[Client, Callable[[Server], str]] = {
    Client.CLAUDE_CODE: _claude_code,
    Client.CODEX: _codex,
    Client.OPENCODE: _opencode,
    Client.OPENAI: _openai,
}
