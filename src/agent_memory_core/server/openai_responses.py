"""Requests of OpenAI's responses, https://platform.openai.com/docs/api-reference/responses.

Nothing is kept here between two requests but what the model has read: the client sends its whole input each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pydantic import Field

from agent_memory_core import Message
from agent_memory_core.adapter import to_response_schema
from agent_memory_core.server.errors import INVALID, PREVIOUS_NOT_FOUND, UNSUPPORTED, ApiError
from agent_memory_core.server.openai_chat import ROLES, TEXTS
from agent_memory_core.server.requests import Asked, Body, called, content_of, effort, function_tool, parts_of
from agent_memory_core.server.tool_choice import allowed_tools, full_name

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
    conversation: Any = None
    metadata: dict[str, Any] | None = None

    def read_tools(self) -> Tools:
        """The tools that the model can be told of."""
        tools = Tools()
        for index, tool in enumerate(self.tools or ()):
            tools.add(tool, f"tools.{index}")
        return tools

    def asked(self) -> Asked:
        """The turn that is asked for.

        Raises:
            ApiError: a part of the request cannot be used.
            InvalidRequest: the same.
        """
        self._check()
        leading = [Message("system", self.instructions)] if self.instructions else []
        tools, choice = allowed_tools(self.read_tools().schemas, _choice(self.tool_choice))
        sampling = self.given("temperature", "top_p")
        if self.max_output_tokens is not None:
            sampling["max_tokens"] = self.max_output_tokens
        return Asked(
            messages=[*leading, *self._messages()],
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_schema=_schema((self.text or {}).get("format")),
            sampling=sampling,
            template_kwargs=effort((self.reasoning or {}).get("effort")),
        )

    def _check(self) -> None:
        if self.previous_response_id is not None:
            raise ApiError(
                PREVIOUS_NOT_FOUND,
                f"Previous response with id {self.previous_response_id!r} not found: this server keeps none, send the "
                "whole input.",
                param="previous_response_id",
            )
        for name in ("conversation", "background", "top_logprobs"):
            if getattr(self, name):
                raise ApiError(
                    UNSUPPORTED, f"{name} is not supported by this server: leave it out.", param=name
                )

    def _messages(self) -> list[Message]:
        if isinstance(self.input, str):
            return [Message("user", self.input)]
        messages: list[Message] = []
        for index, item in enumerate(self.input):
            for message in _read(item, f"input.{index}"):
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
