"""Tools and calls: a choice in any form that is in use, and the ids of calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import InvalidToolCall, ToolCall, new_call_id


def chosen_tool(
    value: object, tools: Sequence[Mapping[str, Any]], *, required: bool = False
) -> Literal["none", "required"] | str | None:
    """Return a ``tool_choice``, in any form that is in use, as the core's: None (auto), "none", "required" or a name.

    Args:
        value: a word, True, the name of a tool, ``{"type": "any"}``, ``{"name": ...}`` or OpenAI's nested form.
        tools: OpenAI function schemas.
        required: a tool has to be called, whichever it is.

    Raises:
        InvalidRequest: the form is unknown, or no such tool is there.
    """
    word = _word_of(value)
    if word == "auto" and required:
        word = "required"
    names = [str(tool["function"]["name"]) for tool in tools]
    if word in ("auto", "none"):
        return "none" if word == "none" else None
    if word in ("any", "required") and names:
        return "required"
    if word in names:
        return word
    known = ", ".join(names) or "the name of a tool, but no tool is offered"
    raise InvalidRequest(f'tool_choice={value!r} is not valid: "auto", "none", "any", "required" or {known}.')


def _word_of(value: object) -> str | None:
    if value is None or isinstance(value, bool):
        return "required" if value else "auto"
    if isinstance(value, Mapping):
        function = value.get("function")
        named = function if isinstance(function, Mapping) else value
        value = named.get("name", named.get("type"))
    return value if isinstance(value, str) else None


def id_of(call: ToolCall | InvalidToolCall) -> str:
    """The id of a call; a new one where the model gave none."""
    return call.id or new_call_id()
