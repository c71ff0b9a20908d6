"""The text of a tool call to a `ToolCall`, by the parser that mlx-lm has for the model.

A model that mlx-lm has no parser for is read by the <tool_call> JSON convention. Where a request offers no tools, an
answer has no calls: its text is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools

from agent_memory_core.messages import ChatRequest, ToolCall, new_call_id
from agent_memory_core.structured.tool_schema import Tool, plainly_typed, tool_name, tool_parameters
from agent_memory_core.text.detokenizer import CallReader

_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What mlx-lm's parsers raise on text that is not a call.

They use json, ast and regular expressions that may not match. RecursionError and MemoryError are how json and ast
refuse deep nesting. OverflowError, an ArithmeticError, is how int refuses infinity.
"""


@dataclass(frozen=True, slots=True)
class ToolCallParser:
    """Parses the calls that one model writes."""

    start: str
    """The delimiter that begins a call."""
    end: str
    """The delimiter that ends a call; empty where a call ends with the answer."""
    parse_span: Callable[[str, Any], Any]
    """mlx-lm's parser of the text between the delimiters. Its second argument is the tools, or None."""
    tools: tuple[Tool, ...] = ()
    """The tools that the request offers: some parsers read a value by the type that its schema names."""
    loses: Callable[[str, Sequence[ToolCall]], bool] | None = None
    """Whether a span says more than the calls that were read in it; None where that cannot be told."""

    read: Callable[[], CallReader | None] | None = None
    """Makes what reads a call while it is written; None where that cannot be."""

    def reader(self) -> CallReader | None:
        """What reads a call while it is written; None where its arguments are known at its end only."""
        return self.read() if self.read is not None else None

    def offering(self, *tools: Tool) -> ToolCallParser:
        """The same parser, told of these tools."""
        return replace(self, tools=tuple(plainly_typed(tool) for tool in tools))

    def parse(self, span: str) -> list[ToolCall]:
        """The calls in ``span``, which stood between the delimiters.

        Raises:
            ValueError: the text is not a call.
        """
        try:
            calls = self._read(span)
        except _UNREADABLE as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if self.loses is not None:
            self._check_whole(span, calls)
        return calls

    @property
    def ends_are_certain(self) -> bool:
        """Whether text after a call that cannot be read is outside of it: JSON tells where a string ends."""
        return self.loses is None

    def _check_whole(self, span: str, calls: Sequence[ToolCall]) -> None:
        """Refuse calls whose values may go on where the syntax seems to end them."""
        assert self.loses is not None
        if self.loses(span, calls):
            raise ValueError(
                "a value holds a mark of the tool syntax, so that it cannot be told where it ends"
            )
        declared = {tool_name(tool): tool_parameters(tool) for tool in self.tools}
        for call in calls:
            # Some parsers make up a name or a key for what they cannot read.
            if re.search(r"[<>]", call.name) or not all(
                word in span for word in (call.name, *call.arguments)
            ):
                raise ValueError("the text between the delimiters names no tool, or no parameter")
            schema = declared.get(call.name, {})
            unknown = call.arguments.keys() - (schema.get("properties") or call.arguments).keys()
            if unknown and not schema.get("additionalProperties"):
                raise ValueError(
                    f"{call.name} has no parameter {min(unknown)!r}, or the value before it holds its mark"
                )

    def _read(self, span: str) -> list[ToolCall]:
        try:
            parsed = self.parse_span(span, list(self.tools) or None)
        except json.JSONDecodeError:
            # Small models write line breaks into strings as they are, which strict JSON forbids.
            parsed = json.loads(span, strict=False)
        return [_tool_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]

    def is_open(self, span: str) -> bool:
        """Whether the end delimiter after ``span`` may stand inside a value, so that the call goes on after it."""
        if not self.end:
            return False
        text = span.lstrip()
        if text.startswith(("{", "[")):
            return _is_inside_string(text)
        return self.loses is not None and _is_call_begun(text)


def model_parser(tokenizer: TokenizerWrapper) -> ToolCallParser:
    """The model's own parser, else that of the <tool_call> JSON convention."""
    source = tokenizer if tokenizer.has_tool_calling else json_tools
    parse = tokenizer.tool_parser if tokenizer.has_tool_calling else json_tools.parse_tool_call
    return ToolCallParser(source.tool_call_start, source.tool_call_end, parse)


def parser_for(tokenizer: TokenizerWrapper, request: ChatRequest) -> ToolCallParser | None:
    """What parses the calls in the answer to ``request``; None where no tool may be called, so that all is text."""
    if not request.tools or request.tool_choice == "none":
        return None
    return model_parser(tokenizer).offering(*request.tools)


def _is_inside_string(text: str) -> bool:
    """Whether JSON ends inside a string."""
    return re.sub(r"\\.", "", text, flags=re.DOTALL).count('"') % 2 == 1


def _is_call_begun(text: str) -> bool:
    """Whether the tags of a call are not all closed."""
    opened = re.findall(r"<([\w:]+)[=\s>]", text)
    closed = re.findall(r"</([\w:]+)>", text)
    return len(opened) > len(closed)


def _tool_call(parsed: Any) -> ToolCall:
    """What mlx-lm's parser returned, as a call. A model's own id is kept: its template may write it again."""
    name, arguments = parsed["name"], parsed.get("arguments", parsed.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of the tool is {name!r}")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {name} are not an object")
    own = parsed.get("id")
    return ToolCall(name, arguments, own if isinstance(own, str) and own else new_call_id())
