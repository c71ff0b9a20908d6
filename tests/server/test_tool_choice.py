"""The list of tools that may be called this time, in the forms of both of OpenAI's dialects."""

from __future__ import annotations

from typing import Any

import pytest

from agent_memory_core.server.errors import ApiError
from agent_memory_core.server.tool_choice import allowed_tools

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": name}} for name in ("a", "n__b")]
FLAT = [{"type": "function", "name": "a"}]
DEEP = [{"type": "function", "function": {"name": "a"}}]


@pytest.mark.parametrize(
    "said",
    [
        {"mode": "required", "tools": FLAT},
        {"allowed_tools": {"mode": "required", "tools": DEEP}},
    ],
)
def test_the_forms_of_both_dialects_are_the_same(said: dict[str, Any]) -> None:
    assert allowed_tools(TOOLS, {"type": "allowed_tools", **said}) == (TOOLS[:1], "required")


def test_a_tool_of_a_namespace_and_the_usual_mode() -> None:
    said = {"type": "allowed_tools", "tools": [{"type": "function", "name": "b", "namespace": "n"}]}
    assert allowed_tools(TOOLS, said) == (TOOLS[1:], "auto")


@pytest.mark.parametrize("choice", [None, "auto", {"type": "function", "function": {"name": "a"}}])
def test_any_other_choice_is_left_as_it_is(choice: object) -> None:
    assert allowed_tools(TOOLS, choice) == (TOOLS, choice)


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ({}, "tool_choice.tools"),
        ({"tools": [1]}, "tool_choice.tools.0"),
        ({"tools": [{"function": {}}]}, "tool_choice.tools.0.name"),
        ({"tools": FLAT, "mode": "now"}, "tool_choice.mode"),
        ({"allowed_tools": {"tools": "a"}}, "tool_choice.tools"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_by_its_place(said: dict[str, Any], place: str) -> None:
    with pytest.raises(ApiError) as refused:
        allowed_tools(TOOLS, {"type": "allowed_tools", **said})
    assert refused.value.message.startswith(f"{place}: ")
