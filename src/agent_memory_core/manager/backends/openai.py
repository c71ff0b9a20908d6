"""Models at an endpoint that speaks OpenAI's chat completions: they take no memory here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from agent_memory_core import (
    ChatRequest,
    DeadlineExceeded,
    Delta,
    InvalidRequest,
    InvalidSetting,
    InvalidToolCall,
    Message,
    ToolCall,
    Usage,
)
from agent_memory_core.manager.backends.base import Asked, Clock, required
from agent_memory_core.manager.config import ModelConfig
from agent_memory_core.manager.errors import ManagerError

_EXTENDED = ("top_k", "min_p", "repetition_penalty")
"""Sampling values that OpenAI itself does not know, and most servers of open models do."""


class EndpointError(ManagerError):
    """The endpoint refused a call, or could not be reached."""


def api_key_of(config: ModelConfig) -> str:
    """The key of an endpoint: as configured, or from the environment; a server on this machine needs none.

    Raises:
        InvalidSetting: there is none, and the endpoint is elsewhere.
    """
    native = config.native
    key = native.get("api_key")
    if key is not None:
        return key.get_secret_value() if isinstance(key, SecretStr) else str(key)
    variable = str(native.get("api_key_env", "OPENAI_API_KEY"))
    found = os.environ.get(variable)
    if found:
        return found
    host = urlsplit(str(native.get("api_base") or "https://elsewhere")).hostname
    if host in ("localhost", "127.0.0.1", "::1"):
        return "not-needed"
    raise InvalidSetting(
        f"the model {config.name!r} needs a key: set the variable {variable}, or api_key_env."
    )


def client_of(config: ModelConfig) -> dict[str, Any]:
    """The fields of a client of an endpoint, as OpenAI's own and the frameworks' classes name them.

    Raises:
        InvalidSetting: the endpoint needs a key, and there is none.
    """
    native = config.native
    more: dict[str, Any] = {
        k: native[k] for k in ("timeout", "max_retries", "default_headers") if k in native
    }
    return {"model": config.path, "base_url": native.get("api_base"), "api_key": api_key_of(config), **more}


def to_wire(message: Message) -> dict[str, Any]:
    """A message as the endpoint reads it."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None and message.role != "tool":
        said["name"] = message.name
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        said["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
            }
            for call in message.tool_calls
        ]
    return said


def wire_tools(request: ChatRequest) -> dict[str, Any]:
    """The tools of a request, and whether they must be called, as the endpoint reads them."""
    if not request.tools:
        return {}
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in request.tools]
    choice: Any = request.tool_choice or "auto"
    if choice not in ("auto", "none", "required"):
        choice = {"type": "function", "function": {"name": choice}}
    return {"tools": tools, "tool_choice": choice}


def _form(request: ChatRequest) -> dict[str, Any]:
    schema = request.response_schema
    if schema is None:
        return {}
    if not schema:
        return {"response_format": {"type": "json_object"}}
    named = {"name": "answer", "schema": dict(schema)}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _body(model: str, asked: Asked) -> dict[str, Any]:
    request, given = asked.request, asked.given
    body: dict[str, Any] = {
        "model": model,
        "messages": [to_wire(message) for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        **wire_tools(request),
        **_form(request),
    }
    body |= {name: given[name] for name in ("temperature", "max_tokens", "top_p", "seed") if name in given}
    if given.get("stop"):
        body["stop"] = list(given["stop"])
    more = {name: given[name] for name in _EXTENDED if name in given}
    if more:
        body["extra_body"] = more
    if request.timeout is not None:
        body["timeout"] = request.timeout
    return body


class ToolCalls:
    """Tool calls as they come in pieces."""

    def __init__(self) -> None:
        self._parts: dict[int, dict[str, str]] = {}

    def add(self, pieces: Any) -> None:
        """Take the pieces of one chunk, as objects of the client or as mappings."""
        for piece in pieces or ():
            index, function = _get(piece, "index") or 0, _get(piece, "function")
            part = self._parts.setdefault(index, {"id": "", "name": "", "arguments": ""})
            part["id"] = part["id"] or _get(piece, "id") or ""
            part["name"] += _get(function, "name") or ""
            part["arguments"] += _get(function, "arguments") or ""

    def delta(self) -> Delta:
        """All calls."""
        calls: list[ToolCall] = []
        invalid: list[InvalidToolCall] = []
        for _, part in sorted(self._parts.items()):
            try:
                arguments = json.loads(part["arguments"] or "{}")
            except ValueError as error:
                invalid.append(InvalidToolCall(part["arguments"], str(error), part["id"]))
                continue
            calls.append(ToolCall(part["name"], arguments, part["id"]))
        return Delta(tool_calls=tuple(calls), invalid_tool_calls=tuple(invalid))


def _get(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)


class LoadedOpenAI:
    """An endpoint and its client."""

    tokenizer = None
    nbytes = 0

    def __init__(self, client: Any, model: str) -> None:
        self.native = client
        self._model = model

    def chat(self, asked: Asked) -> Iterator[Delta]:
        """Ask the endpoint. Withdrawing the call closes the connection at the next piece."""
        openai = required("openai", extra="openai", what="openai")
        clock = Clock()
        try:
            with self.native.chat.completions.create(**_body(self._model, asked)) as chunks:
                yield from self._read(chunks, asked, clock)
        except openai.APITimeoutError as error:
            raise DeadlineExceeded(f"the endpoint of {self._model!r} gave no answer in time.") from error
        except openai.BadRequestError as error:
            raise InvalidRequest(f"the endpoint of {self._model!r} refused the request: {error}") from error
        except openai.OpenAIError as error:
            raise EndpointError(f"the endpoint of {self._model!r} failed: {error}") from error

    def _read(self, chunks: Any, asked: Asked, clock: Clock) -> Iterator[Delta]:
        reason, usage, calls = "stop", Usage(0, 0, 0), ToolCalls()
        for chunk in chunks:
            asked.check()
            if chunk.usage is not None:
                usage = _usage(chunk.usage)
            for choice in chunk.choices[:1]:
                clock.first()
                reason = choice.finish_reason or reason
                calls.add(choice.delta.tool_calls)
                reasoning = getattr(choice.delta, "reasoning_content", None) or ""
                if choice.delta.content or reasoning:
                    yield Delta(text=choice.delta.content or "", reasoning=reasoning)
        last = calls.delta()
        yield Delta(
            tool_calls=last.tool_calls,
            invalid_tool_calls=last.invalid_tool_calls,
            report=clock.report(self._model, reason, usage),
        )

    def cancel(self) -> None:
        """Nobody else calls through this client."""

    def unload(self) -> None:
        """Close the connections."""
        self.native.close()


def _usage(usage: Any) -> Usage:
    details = usage.prompt_tokens_details
    return Usage(usage.prompt_tokens, usage.completion_tokens, (details and details.cached_tokens) or 0)


class OpenAIBackend:
    """Makes clients of endpoints."""

    def estimate(self, config: ModelConfig, limit: int) -> int:
        """Nothing is loaded here."""
        return 0

    def load(self, config: ModelConfig, limit: int) -> LoadedOpenAI:
        """Make a client; the endpoint is not asked yet."""
        openai = required("openai", extra="openai", what="openai")
        fields = {name: value for name, value in client_of(config).items() if name != "model"}
        client = openai.OpenAI(**fields)
        return LoadedOpenAI(client, config.path)
