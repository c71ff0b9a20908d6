"""LlamaIndex messages to the core's, and the core's answers to LlamaIndex responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.tools import FunctionTool
from support import pieces
from support.pieces import ANSWERS, CUT_OFF, END, MEASURED, whole

from agent_memory_core import (
    Delta,
    InvalidRequest,
    Message,
    ToolCall,
)
from llama_index_agent_memory.messages import (
    ResponseWriter,
    to_chat_response,
    to_completion,
    to_core,
    to_tools,
)

CACHE = CachePoint(cache_control=CacheControl(type="ephemeral"))
CALL = ToolCallBlock(tool_call_id="c1", tool_name="add", tool_kwargs={"b": 2, "a": 1})


# LlamaIndex to core


def one(message: ChatMessage) -> Message:
    (found,) = to_core([message])
    return found


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("system", "system"),
        ("developer", "system"),
        ("user", "user"),
        ("assistant", "assistant"),
        ("chatbot", "assistant"),
        ("model", "assistant"),
        ("tool", "tool"),
        ("function", "tool"),
    ],
)
def test_roles(role: str, expected: str) -> None:
    assert one(ChatMessage("hi", role=role)) == Message(expected, "hi")


def test_names_and_ids() -> None:
    assert one(ChatMessage("hi", additional_kwargs={"name": "ada"})) == Message("user", "hi", "ada")
    result = ChatMessage("3", role="tool", additional_kwargs={"tool_call_id": "c1", "name": "add"})
    assert one(result) == Message("tool", "3", "add", tool_call_id="c1")


def test_a_result_has_the_name_of_its_call() -> None:
    calls = ChatMessage(role="assistant", blocks=[CALL])
    results = [ChatMessage("3", role="tool", additional_kwargs={"tool_call_id": id_}) for id_ in ("c1", "c2")]
    assert [message.name for message in to_core([calls, *results])] == [None, "add", None]


def test_only_leading_system_messages_become_one() -> None:
    said = [("system", "a"), ("system", "b"), ("user", "c"), ("system", "d")]
    messages = [ChatMessage(text, role=role) for role, text in said]
    assert to_core(messages) == (Message("system", "a\n\nb"), Message("user", "c"), Message("system", "d"))
    assert to_core(messages[:2]) == (Message("system", "a\n\nb"),)


def test_text_blocks_are_joined_and_cache_points_passed_over() -> None:
    blocks = [TextBlock(text="a"), CACHE, TextBlock(text=""), TextBlock(text="b")]
    assert one(ChatMessage(blocks=blocks)).content == "a\nb"
    assert one(ChatMessage(role="assistant", blocks=blocks)).content == "ab"
    assert one(ChatMessage(blocks=[])).content == ""


def test_the_text_of_what_may_be_cited_is_read() -> None:
    block = CitableBlock(title="t", source="s", content=[TextBlock(text="a"), TextBlock(text="b")])
    assert one(ChatMessage(role="tool", blocks=[block])).content == "a\nb"


@pytest.mark.parametrize(
    ("role", "block"),
    [
        ("user", ImageBlock(url="https://example.com/a.png")),
        ("user", DocumentBlock(data=b"x", document_mimetype="application/pdf")),
        ("user", DocumentBlock(url="https://example.com/a.txt", document_mimetype="text/plain")),
        ("user", CALL),
        ("assistant", ImageBlock(url="https://example.com/a.png")),
    ],
)
def test_what_is_no_text_is_refused_by_name(role: str, block: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"{block.block_type!r} in a {role} message"):
        to_core([ChatMessage(role=role, blocks=[TextBlock(text="look"), block])])


def test_documents_of_plain_text_are_read() -> None:
    document = DocumentBlock(data=b"My name is Ada.", document_mimetype="text/markdown")
    cited = CitableBlock(title="t", source="s", content=[document])
    for block in (document, cited):
        assert one(ChatMessage(blocks=[TextBlock(text="Read:"), block])).content == "Read:\nMy name is Ada."


def test_a_tools_result_says_what_cannot_be_shown(caplog: pytest.LogCaptureFixture) -> None:
    block = ImageBlock(url="https://example.com/a.png")
    result = ChatMessage(role="tool", blocks=[TextBlock(text="A map:"), block])
    assert one(result).content == "A map:\n[a part of type image that cannot be shown]"
    assert "'image'" in caplog.text


def test_what_is_no_message_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="a dict is not a message"):
        to_core([{"role": "user", "content": "hi"}])  # type: ignore[list-item]


def test_no_messages_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        to_core([])


def test_thoughts_text_and_calls_of_an_answer() -> None:
    cited = CitationBlock(cited_content="x", source="s", title="t", additional_location_info={})
    blocks = [ThinkingBlock(content="hm "), ThinkingBlock(), TextBlock(text="so"), cited, CALL]
    found = one(ChatMessage(role="assistant", blocks=blocks))
    assert found == Message(
        "assistant", "so", tool_calls=(ToolCall("add", {"b": 2, "a": 1}, "c1"),), reasoning="hm "
    )
    assert list(found.tool_calls[0].arguments) == ["b", "a"]


OLDER = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"b": 2, "a": 1}'}}
OBJECTS = SimpleNamespace(id="c1", function=SimpleNamespace(name="add", arguments={"b": 2, "a": 1}))


@pytest.mark.parametrize("call", [OLDER, OBJECTS])
def test_calls_in_the_form_before_blocks(call: object) -> None:
    message = ChatMessage("so", role="assistant")
    message.additional_kwargs = {"tool_calls": [call]}
    expected = ToolCall("add", {"b": 2, "a": 1}, "c1")
    assert one(message).tool_calls == (expected,)
    message.blocks.append(CALL)
    assert one(message).tool_calls == (expected,)


@pytest.mark.parametrize(
    ("arguments", "expected"), [('{"a": 1}', {"a": 1}), ("", {}), ({}, {}), ('{"a": 1', None), ("[1]", None)]
)
def test_arguments_that_are_text(arguments: Any, expected: Any) -> None:
    message = ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_name="add", tool_kwargs=arguments)])
    if expected is None:
        with pytest.raises(InvalidRequest, match="tool arguments"):
            to_core([message])
    else:
        assert one(message).tool_calls[0].arguments == expected


def test_a_call_without_a_function_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="tool_calls"):
        to_core([ChatMessage(role="assistant", additional_kwargs={"tool_calls": [{"id": "c1"}]})])


# Core to LlamaIndex


DELTAS = [*pieces.DELTAS, END]


def streamed(deltas: Sequence[Delta]) -> list[ChatResponse]:
    writer = ResponseWriter()
    return [response for delta in deltas for response in writer.responses(delta)]


def test_an_answer_as_one_response() -> None:
    response = to_chat_response(whole(DELTAS))
    assert response.message.role == "assistant"
    assert response.message.blocks == [
        ThinkingBlock(content="let me see", num_tokens=2),
        TextBlock(text="I will add"),
        ToolCallBlock(tool_call_id="c1", tool_name="add", tool_kwargs={"b": 2, "a": "ä"}),
        ToolCallBlock(tool_call_id="c2", tool_name="clock", tool_kwargs={}),
    ]
    # What stands there LlamaIndex's memories count as text.
    assert response.message.additional_kwargs == {}
    assert response.delta is None
    assert response.raw == {
        "model": "tiny-chat",
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 5,
            "total_tokens": 25,
            "prompt_tokens_details": {"cached_tokens": 16},
            "completion_tokens_details": {"reasoning_tokens": 2},
        },
        **MEASURED,
        "invalid_tool_calls": [],
    }
    assert json.loads(json.dumps(response.raw)) == response.raw


def test_each_response_of_a_stream_has_the_answer_so_far() -> None:
    responses = streamed(DELTAS)
    assert [r.delta for r in responses] == ["", "", "I will ", "add", "", "", ""]
    assert [r.message.content for r in responses[2:]] == ["I will ", *["I will add"] * 4]
    assert [r.additional_kwargs for r in responses[:3]] == [
        {"thinking_delta": "let me "},
        {"thinking_delta": "see"},
        {},
    ]
    calls = [[b.tool_name for b in r.message.blocks if isinstance(b, ToolCallBlock)] for r in responses]
    assert calls[3:] == [[], ["add"], ["add", "clock"], ["add", "clock"]]
    assert [r.raw is not None for r in responses] == [False] * 6 + [True]


def test_the_last_response_is_the_whole_answer() -> None:
    last, response = streamed(DELTAS)[-1], to_chat_response(whole(DELTAS))
    assert last.message.blocks == response.message.blocks
    assert last.raw == response.raw


def test_a_streams_calls_also_stand_where_programs_look_for_them() -> None:
    last = streamed(DELTAS)[-1].message
    calls = [call["function"] for call in last.additional_kwargs["tool_calls"]]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("add", {"b": 2, "a": "ä"}),
        ("clock", {}),
    ]
    assert [call.id for call in to_core([last])[0].tool_calls] == ["c1", "c2"], "and are read once"


def test_an_answer_of_nothing_is_an_empty_text_and_one_of_calls_has_none() -> None:
    assert to_chat_response(whole([END])).message.blocks == [TextBlock(text="")]
    blocks = to_chat_response(whole(DELTAS[-2:])).message.blocks
    assert [block.block_type for block in blocks] == ["tool_call"]


def test_a_call_without_an_id_gets_one_and_keeps_it() -> None:
    deltas = [Delta(tool_calls=(ToolCall("a", {}), ToolCall("a", {}))), END]
    first, last = ([b.tool_call_id for b in r.message.blocks] for r in streamed(deltas))  # type: ignore[union-attr]
    assert first == last
    assert len(set(first)) == 2
    assert all(first)


def test_an_unreadable_call_stays_what_the_model_wrote() -> None:
    deltas = [Delta(text="so "), Delta(invalid_tool_calls=(CUT_OFF,)), END]
    for response in (to_chat_response(whole(deltas)), streamed(deltas)[-1]):
        assert one(response.message) == Message("assistant", "so " + CUT_OFF.text)
        assert response.raw["invalid_tool_calls"] == [{"text": CUT_OFF.text, "error": CUT_OFF.error}]  # type: ignore[index]


def test_a_completion_says_what_the_response_says() -> None:
    pieces = [to_completion(response) for response in streamed(DELTAS)]
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].text == "I will add"
    assert pieces[-1].raw == to_chat_response(whole(DELTAS)).raw
    assert pieces[0].text == ""


@given(ANSWERS)
def test_what_was_streamed_comes_back_unchanged(deltas: list[Delta]) -> None:
    answer = whole(deltas)
    stored = ChatMessage.model_validate_json(streamed(deltas)[-1].message.model_dump_json())
    back = one(stored)
    assert back == Message("assistant", answer.text, tool_calls=answer.tool_calls)
    assert json.dumps([c.arguments for c in back.tool_calls]) == json.dumps(  # the order, too
        [c.arguments for c in answer.tool_calls]
    )


# Tools


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_tools_become_function_schemas() -> None:
    tool = FunctionTool.from_defaults(add, description="d" * 2000)
    (schema,) = to_tools([tool])
    assert schema["function"]["name"] == "add"
    assert list(schema["function"]["parameters"]["properties"]) == ["a", "b"]
    assert to_tools([schema]) == (schema,)
    with pytest.raises(InvalidRequest, match="FunctionTool"):
        to_tools([add])  # type: ignore[list-item]
