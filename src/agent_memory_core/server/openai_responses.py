"""Requests of OpenAI's responses, https://platform.openai.com/docs/api-reference/responses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pydantic import Field

from agent_memory_core import Message
from agent_memory_core.adapter import to_response_schema
from agent_memory_core.server.errors import INVALID, PREVIOUS_NOT_FOUND, UNSUPPORTED, ApiError
from agent_memory_core.server.ids import new_id
from agent_memory_core.server.openai_chat import ROLES, TEXTS
from agent_memory_core.server.requests import (
    Asked,
    Body,
    as_token,
    called,
    content_of,
    effort,
    function_tool,
    parts_of,
)
from agent_memory_core.server.threads import Wanted
from agent_memory_core.server.tool_choice import allowed_tools, full_name

MOST_ITEMS = 20_000
"""Most items of an input."""

FREE_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
"""The arguments of a custom tool, which OpenAI's models call with plain text."""


class WireTool(NamedTuple):
    """A tool as the client knows it."""

    name: str
    namespace: str | None
    is_custom: bool


@dataclass(slots=True)
class Tools:
    """The tools of a request. Those of a namespace have its name before theirs, as a model knows one list only."""

    schemas: list[dict[str, Any]] = field(default_factory=list)
    wire: dict[str, WireTool] = field(default_factory=dict)
    """By the name that the model knows."""
    ignored: list[str] = field(default_factory=list)
    """The types of those that were passed over."""

    def add(self, tool: Mapping[str, Any], place: str, namespace: str | None = None) -> None:
        """Add a tool. One that a provider runs itself is passed over, since agents offer those to any model."""
        kind, name = tool.get("type"), str(tool.get("name"))
        if kind == "namespace":
            for inner, where in parts_of(tool.get("tools") or [], f"{place}.tools"):
                self.add(inner, where, name)
        elif kind in ("function", "custom"):
            full = full_name(name, namespace)
            schema = FREE_TEXT if kind == "custom" else tool.get("parameters")
            self.schemas.append(
                function_tool(full if "name" in tool else None, tool.get("description"), schema, place)
            )
            self.wire[full] = WireTool(name, namespace, kind == "custom")
        else:
            self.ignored.append(as_token(kind))


class ResponsesBody(Body):
    """A request for a response."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=512)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    store: bool | None = None
    prompt_cache_options: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    prompt: dict[str, Any] | None = None
    """A template that a provider holds."""

    def read_tools(self) -> Tools:
        """The tools that the model can be told of."""
        tools = Tools()
        for index, tool in enumerate(self.tools or ()):
            tools.add(tool, f"tools.{index}")
        return tools

    @property
    def wanted(self) -> Wanted:
        """What it says of its conversation.

        Raises:
            ApiError: it names two.
        """
        if self.previous_response_id is not None and self.conversation is not None:
            raise ApiError(
                INVALID,
                "previous_response_id and conversation exclude each other: give one of them.",
                param="conversation",
            )
        named = self.conversation
        return Wanted(
            "resp_",
            PREVIOUS_NOT_FOUND,
            previous=self.previous_response_id,
            conversation=str(named.get("id")) if isinstance(named, dict) else named,
            keeps=self.store is not False,
            compare=(self.prompt_cache_options or {}).get("comparison_response_id"),
        )

    def items(self) -> list[dict[str, Any]]:
        """The input as items, each with an id."""
        if isinstance(self.input, str):
            return with_ids([{"type": "message", "role": "user", "content": self.input}])
        return with_ids(self.input)

    def asked(self, earlier: Sequence[dict[str, Any]] = ()) -> Asked:
        """The turn that is asked for.

        Args:
            earlier: items that the server holds and the request goes on from.

        Raises:
            ApiError: a part of the request cannot be used.
            InvalidRequest: the same.
        """
        self._check()
        leading = [Message("system", self.instructions)] if self.instructions else []
        known = self.read_tools()
        tools, choice = allowed_tools(known.schemas, _choice(self.tool_choice))
        sampling = self.given("temperature", "top_p")
        if self.max_output_tokens is not None:
            sampling["max_tokens"] = self.max_output_tokens
        return Asked(
            messages=[*leading, *_messages([*earlier, *self.items()], len(earlier))],
            tools=tools,
            ignored=tuple(known.ignored),
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_schema=_schema((self.text or {}).get("format")),
            sampling=sampling,
            template_kwargs=effort((self.reasoning or {}).get("effort")),
        )

    def _check(self) -> None:
        if len(self.input) > MOST_ITEMS and not isinstance(self.input, str):
            raise ApiError(INVALID, f"input: at most {MOST_ITEMS} items can be read at once.", param="input")
        for name in ("background", "prompt", "top_logprobs"):
            if getattr(self, name):
                raise ApiError(
                    UNSUPPORTED, f"{name} is not supported by this server: leave it out.", param=name
                )


def referenced(item: Mapping[str, Any]) -> str | None:
    """The id of the item that stands somewhere else, where an item only refers to it."""
    is_reference = item.get("type") == "item_reference" or {"id"} <= item.keys() <= {"id", "type"}
    return str(item.get("id")) if is_reference else None


def response_of(item_id: str) -> str:
    """The id of the response that has an item in its output; empty where the id is none of this server's."""
    found = re.fullmatch(r"[a-z]+_([0-9a-f]{32})_\d+", item_id)
    return f"resp_{found[1]}" if found else ""


def with_ids(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items of which each has an id and a type."""
    return [{"id": new_id("item_"), "type": "message", **item} for item in items]


def as_listed(item: dict[str, Any]) -> dict[str, Any]:
    """An item as lists of items have it: the content of a message in parts, and a status."""
    content = item.get("content")
    if item["type"] == "message" and isinstance(content, str):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        content = [{"type": kind, "text": content, "annotations": [], "logprobs": []}]
        item = item | {"content": content}
    return {"status": "completed", **item}


def _messages(items: Sequence[dict[str, Any]], held: int) -> list[Message]:
    """The messages of all items, of which the first ``held`` are not the request's own."""
    messages: list[Message] = []
    for index, item in enumerate(items):
        for message in _read(item, f"input.{index - held}"):
            if message.role == "assistant" and messages and messages[-1].role == "assistant":
                messages[-1] = _together(messages[-1], message)
            else:
                messages.append(message)
    return messages


def _read(item: Mapping[str, Any], place: str) -> Iterator[Message]:
    kind = item.get("type", "message")
    if kind == "message":
        role = ROLES.get(str(item.get("role")))
        if role is None or role == "tool":
            raise ApiError(INVALID, f"{place}.role={item.get('role')!r} is not valid.", param=place)
        text, points = content_of(item.get("content"), f"{place}.content", texts=TEXTS)
        yield Message(role, text, cache_points=points)
    elif kind in ("function_call", "custom_tool_call"):
        is_custom = kind == "custom_tool_call"
        arguments = {"input": str(item.get("input", ""))} if is_custom else item.get("arguments")
        name = full_name(str(item.get("name")), item.get("namespace"))
        yield Message("assistant", "", tool_calls=(called(name, arguments, item.get("call_id"), place),))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        text, points = content_of(item.get("output"), f"{place}.output", texts=TEXTS)
        yield Message("tool", text, tool_call_id=str(item.get("call_id")), cache_points=points)
    elif kind == "reasoning":
        thought, _ = content_of(item.get("content"), f"{place}.content", texts=("reasoning_text", "text"))
        if thought:
            yield Message("assistant", "", reasoning=thought)
    else:
        raise ApiError(UNSUPPORTED, f"{place}: items of type {kind!r} cannot be read.", param=place)


def _together(first: Message, second: Message) -> Message:
    """One turn of the assistant, whose thoughts, texts and calls are items of their own here."""
    return replace(
        first,
        content="\n\n".join(filter(None, (first.content, second.content))),
        tool_calls=first.tool_calls + second.tool_calls,
        reasoning="\n\n".join(filter(None, (first.reasoning, second.reasoning))) or None,
    )


def _choice(choice: object) -> object:
    """The choice of a tool by the name that the model knows."""
    if isinstance(choice, Mapping) and "name" in choice:
        return full_name(str(choice["name"]), choice.get("namespace"))
    return choice


def _schema(form: object) -> Mapping[str, Any] | None:
    """The schema of ``text.format``, which holds here what chat completions hold one level deeper."""
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": form}
    return to_response_schema(form)
