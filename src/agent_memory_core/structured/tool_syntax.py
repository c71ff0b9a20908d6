"""Tool syntax: the exact text in which a model's template writes a tool call.

A `ToolSyntax` is learnt from calls that the template renders, and used only if the model's own parser reads them back.
So the next prompt repeats exactly what was generated. There are two kinds: calls whose arguments are one JSON object,
which are here, and calls that write each argument by itself, which are in `tool_syntax_xml`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest, Message, ToolCall
from agent_memory_core.structured.lark import Lark, json_of
from agent_memory_core.structured.tool_calls import ToolCallParser
from agent_memory_core.structured.tool_schema import Tool, function_tool, tool_name, tool_parameters
from agent_memory_core.text.chat_template import ChatTemplate

PROBE_NAMES = ("probe_one", "probe_two")
"""The tools that probes call, in this order."""

_ARGUMENTS = {"x": 1}
_ARGUMENTS_TEXT = '{"x": 1}'


class ToolSyntax(Protocol):
    """How a model writes tool calls."""

    @property
    def between_calls(self) -> str | None:
        """The text between two calls; None where no second call can follow."""

    def rules(self, rule: str, tool: Tool, lark: Lark) -> list[str]:
        """The grammar rule named ``rule``, and the rules it needs: a call, from after its start delimiter to its end.

        Raises:
            InvalidRequest: the tool has a parameter that cannot be written so that it is read back.
        """


def render_calls(template: ChatTemplate, *arguments: Mapping[str, Any]) -> str:
    """The text of a conversation that ends with a message of calls: one of `PROBE_NAMES` for each ``arguments``.

    Raises:
        InvalidRequest: the template refuses it.
    """
    calls = tuple(
        ToolCall(name, given, f"call_{name}") for name, given in zip(PROBE_NAMES, arguments, strict=False)
    )
    request = ChatRequest((Message("user", "ask"), Message("assistant", "", tool_calls=calls)))
    return template.render(request, generation_prompt=False)


@dataclass(frozen=True, slots=True)
class JsonToolSyntax:
    """Calls whose arguments are one JSON object. The default texts are those of the <tool_call> JSON convention.

    The text of a call: start before_name NAME after_name ARGUMENTS after_arguments end
    """

    parser: ToolCallParser
    """Reads such calls, and has the delimiters ``start`` and ``end``."""
    before_name: str = '\n{"name": "'
    after_name: str = '", "arguments": '
    after_arguments: str = "}\n"
    between_calls: str | None = "\n"

    def inside(self, name: str, arguments: str) -> str:
        """The text between the delimiters of a call."""
        return self.before_name + name + self.after_name + arguments + self.after_arguments

    def is_read_back(self) -> bool:
        """Whether the model's parser reads a call in this syntax as what it is."""
        parser = self.parser.offering(function_tool(PROBE_NAMES[0], {"type": "object"}))
        try:
            calls = parser.parse(self.inside(PROBE_NAMES[0], _ARGUMENTS_TEXT))
        except ValueError:
            return False
        return [(call.name, call.arguments) for call in calls] == [(PROBE_NAMES[0], _ARGUMENTS)]

    def rules(self, rule: str, tool: Tool, lark: Lark) -> list[str]:
        """See `ToolSyntax.rules`."""
        name = json.dumps(tool_name(tool), ensure_ascii=False)[1:-1]
        before = lark.literal(self.before_name + name + self.after_name)
        after = lark.literal(self.after_arguments + self.parser.end)
        return [f"{rule}: {before} {json_of(arguments_schema(tool))} {after}"]


def arguments_schema(tool: Tool) -> Mapping[str, Any]:
    """The JSON schema of a tool's arguments, which are an object even where the tool does not say so."""
    return {"type": "object", **(tool_parameters(tool) or {"properties": {}})}


def learn_json_syntax(template: ChatTemplate, parser: ToolCallParser) -> JsonToolSyntax | None:
    """The syntax of two calls that the template renders; None where their arguments are not written as JSON."""
    first, second = PROBE_NAMES
    try:
        text = render_calls(template, _ARGUMENTS, _ARGUMENTS)
    except InvalidRequest:
        return None
    name = text.find(first)
    start = text.rfind(parser.start, 0, max(0, name))
    arguments = text.find(_ARGUMENTS_TEXT, name)
    after = arguments + len(_ARGUMENTS_TEXT)
    end = text.find(parser.end, after)
    if min(name, start, arguments, end) < 0:
        return None
    syntax = JsonToolSyntax(
        parser,
        before_name=text[start + len(parser.start) : name],
        after_name=text[name + len(first) : arguments],
        after_arguments=text[after:end],
        between_calls=None,
    )
    next_call = parser.start + syntax.inside(second, _ARGUMENTS_TEXT) + parser.end
    between, found, _ = text[end + len(parser.end) :].partition(next_call)
    return replace(syntax, between_calls=between) if found else syntax
