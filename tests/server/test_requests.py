"""Whatever a client sends, it is either a turn or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

from agent_memory_core import AgentMemory, ChatRequest, InvalidRequest
from agent_memory_core.server import ServerSettings
from agent_memory_core.server.anthropic_messages import MessagesBody
from agent_memory_core.server.errors import ApiError
from agent_memory_core.server.host import Host
from agent_memory_core.server.openai_chat import ChatBody
from agent_memory_core.server.openai_responses import ResponsesBody
from agent_memory_core.server.requests import Asked, Reader
from agent_memory_core.server.sessions import SessionKeys, session_of

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}
CHAT = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi.", "cache_control": {"type": "ephemeral"}}],
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "Rain."},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "auto",
            "tools": [{"type": "function", "function": {"name": "get_weather"}}],
        },
    },
    "stop": ["x"],
    "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"a": 1},
    "reasoning_effort": "low",
    "metadata": {"session_id": "s"},
}
MESSAGES = {
    "model": "m",
    "max_tokens": 5,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: a"},
        {"type": "text", "text": "Be brief."},
    ],
    "messages": [
        {"role": "user", "content": "Hi."},
        {"role": "system", "content": "Agents: none."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Paris"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": [{"type": "image"}]},
                {"type": "document", "source": {"type": "text", "data": "A page."}},
            ],
        },
    ],
    "tools": [
        {"name": "get_weather", "input_schema": SCHEMA},
        {"type": "web_search_20250305", "name": "web"},
    ],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "max", "format": None},
    "metadata": {"user_id": '{"session_id": "s"}'},
}
RESPONSES = {
    "model": "m",
    "instructions": "Be brief.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Hi."}]},
        {"role": "user", "content": "Hi."},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "name": "a", "namespace": "n", "arguments": "{}", "call_id": "c"},
        {"type": "function_call_output", "call_id": "c", "output": "Rain."},
        {"type": "custom_tool_call", "name": "b", "input": "x", "call_id": "d"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "y"}]},
    ],
    "tools": [
        {
            "type": "namespace",
            "name": "n",
            "tools": [{"type": "function", "name": "a", "parameters": SCHEMA}],
        },
        {"type": "custom", "name": "b"},
        {"type": "web_search"},
    ],
    "tool_choice": {"type": "function", "name": "a", "namespace": "n"},
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "high", "summary": "auto"},
}

HOST = Host(AgentMemory(cache_dir=None))
MODEL = HOST.served
READER = Reader(HOST, ServerSettings())
READERS: dict[str, tuple[dict[str, Any], Callable[[Any], Asked]]] = {
    "chat": (CHAT, lambda body: ChatBody.model_validate(body).asked()),
    "messages": (MESSAGES, lambda body: MessagesBody.model_validate(body).asked(strip=True)),
    "responses": (RESPONSES, lambda body: ResponsesBody.model_validate(body).asked()),
}


def read(dialect: str, body: Any) -> ChatRequest:
    asked = READERS[dialect][1](body)
    request = READER.request(asked, MODEL)
    SessionKeys().key_of(session_of({}, body), "default", request)
    return request


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside of one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in places(item, (*path, key)))]


def with_value(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(body)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("dialect", READERS)
def test_the_examples_are_turns(dialect: str) -> None:
    assert [message.role for message in read(dialect, READERS[dialect][0]).messages][-1] == (
        "user" if dialect == "messages" else "tool"
    )


ODD = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.just("\ud800"))
VALUES = st.one_of(ODD, st.lists(ODD, max_size=2), st.dictionaries(st.text(max_size=3), ODD, max_size=2))


@pytest.mark.parametrize("dialect", READERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_value_of_another_kind_anywhere_is_refused_or_read(dialect: str, data: st.DataObject) -> None:
    body = READERS[dialect][0]
    path = data.draw(st.sampled_from([path for path in places(body) if path]))
    changed = with_value(body, path, data.draw(VALUES))
    try:
        read(dialect, changed)
    except (ApiError, InvalidRequest, ValidationError):
        return


def test_the_same_conversation_is_the_same_turn_in_every_dialect() -> None:
    """Two agents of two vendors that say the same find each other's tokens."""
    chat = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]}
    messages = {"system": "Be brief.", "messages": chat["messages"][1:], "max_tokens": 4096}
    responses = {"instructions": "Be brief.", "input": "Hi."}
    tools = {
        "chat": [{"type": "function", "function": FUNCTION}],
        "messages": [{"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}],
        "responses": [{"type": "function", **FUNCTION}],
    }
    said: dict[str, dict[str, Any]] = {"chat": chat, "messages": messages, "responses": responses}
    first, *others = (read(name, body | {"tools": tools[name]}) for name, body in said.items())
    assert [(other.messages, other.tools) for other in others] == [(first.messages, first.tools)] * 2


def test_a_budget_of_thinking_is_taken_from_either_dialect() -> None:
    thinking = {"type": "enabled", "budget_tokens": 2048}
    message = MessagesBody.model_validate(MESSAGES | {"thinking": thinking})
    assert message.asked(strip=True).thinking_budget == 2048
    assert ChatBody.model_validate(CHAT | {"thinking_budget": 7}).asked().thinking_budget == 7
    wrong = MessagesBody.model_validate(MESSAGES | {"thinking": thinking | {"budget_tokens": "many"}})
    with pytest.raises(ApiError, match="budget_tokens='many'"):
        wrong.asked(strip=True)


def test_an_input_of_too_many_items_is_refused() -> None:
    body = ResponsesBody.model_validate({"input": [{"role": "user", "content": "a"}] * 20_001})
    with pytest.raises(ApiError, match="at most 20000 items"):
        body.asked()
