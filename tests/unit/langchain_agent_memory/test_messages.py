"""LangChain messages to the core's and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import pytest
from hypothesis import given, strategies as st
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.outputs import ChatGenerationChunk
from support import pieces
from support.pieces import ANSWERS, CUT_OFF, END, whole

from agent_memory_core import (
    Delta,
    InvalidRequest,
    InvalidToolCall,
    Message,
    ToolCall,
    ToolCallPiece,
)
from langchain_agent_memory.messages import (
    ChunkWriter,
    to_ai_message,
    to_core,
)

CALL = {"name": "add", "args": {"b": 2, "a": 1}, "id": "c1", "type": "tool_call"}


# LangChain to core


def one(message: BaseMessage) -> Message:
    (found,) = to_core([message])
    return found


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (HumanMessage("hi", name="ada"), Message("user", "hi", "ada")),
        (SystemMessage("be kind"), Message("system", "be kind")),
        (AIMessage("hello", name="bot"), Message("assistant", "hello", "bot")),
        (ToolMessage("3", name="add", tool_call_id="c1"), Message("tool", "3", "add", tool_call_id="c1")),
        (FunctionMessage(content="3", name="add"), Message("tool", "3", "add")),
        (ChatMessage(content="hi", role="user"), Message("user", "hi")),
        (ChatMessage(content="rules", role="developer"), Message("system", "rules")),
        (ChatMessage(content="hi", role="ai"), Message("assistant", "hi")),
    ],
)
def test_roles_names_and_ids(message: BaseMessage, expected: Message) -> None:
    assert one(message) == expected


def test_a_failed_tool_says_so_once() -> None:
    def failed(text: str) -> str:
        return one(ToolMessage(text, tool_call_id="c1", status="error")).content

    assert failed("no such file") == "Error: no such file"
    assert failed("Error: Missing required argument 'b'.") == "Error: Missing required argument 'b'."


def test_only_leading_system_messages_become_one() -> None:
    messages = [SystemMessage("a"), SystemMessage("b"), HumanMessage("c"), SystemMessage("d")]
    assert to_core(messages) == (Message("system", "a\n\nb"), Message("user", "c"), Message("system", "d"))
    assert to_core(messages[:2]) == (Message("system", "a\n\nb"),)


def test_same_roles_in_a_row_and_a_last_message_of_any_role_stay_as_they_are() -> None:
    messages = [HumanMessage("a"), HumanMessage("b"), AIMessage("c"), AIMessage("d")]
    assert [(m.role, m.content) for m in to_core(messages)] == [
        ("user", "a"),
        ("user", "b"),
        ("assistant", "c"),
        ("assistant", "d"),
    ]


def test_text_blocks_are_joined() -> None:
    blocks: list[str | dict[Any, Any]] = [
        "a",
        {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": ""},
        {"text": "c"},
    ]
    assert one(HumanMessage(blocks)).content == "a\nb\nc"
    assert one(AIMessage(blocks)).content == "abc"


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image", "base64": "AAAA", "mime_type": "image/png"},
        {"type": "tool_result", "tool_use_id": "c1", "content": "3"},
        {"cachePoint": {"type": "default"}},
    ],
)
def test_what_is_no_text_is_refused_by_name(block: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=rf"{block.get('type')!r} in a user message"):
        to_core([HumanMessage([{"type": "text", "text": "look"}, block])])


@pytest.mark.parametrize(
    "messages", [[], [RemoveMessage(id="1")], [ChatMessage(content="x", role="narrator")]]
)
def test_what_is_no_message_is_refused(messages: list[BaseMessage]) -> None:
    with pytest.raises(InvalidRequest):
        to_core(messages)


def test_calls_are_rendered_once_and_keep_the_order_of_their_arguments() -> None:
    blocks: list[str | dict[Any, Any]] = [
        {"type": "text", "text": "some text"},
        {"type": "tool_use", "id": "c1", "name": "add", "input": {"b": 2, "a": 1}},
    ]
    call = ToolCall("add", {"b": 2, "a": 1}, "c1")
    expected = Message("assistant", "some text", tool_calls=(call,))
    assert one(AIMessage(blocks, tool_calls=[CALL])) == expected
    assert one(AIMessage(blocks)) == expected
    assert list(one(AIMessage("", tool_calls=[CALL])).tool_calls[0].arguments) == ["b", "a"]


def test_reasoning_is_found_in_either_place() -> None:
    blocks: list[str | dict[Any, Any]] = [
        {"type": "reasoning", "reasoning": "hm "},
        {"type": "thinking", "thinking": "well", "signature": "x"},
        {"type": "text", "text": "yes"},
    ]
    assert one(AIMessage("yes", additional_kwargs={"reasoning_content": "hm"})).reasoning == "hm"
    assert one(AIMessage(blocks)) == Message("assistant", "yes", reasoning="hm well")
    assert one(AIMessage("yes")).reasoning is None


# Core to LangChain


DELTAS = [*pieces.DELTAS, Delta(invalid_tool_calls=(CUT_OFF,)), END]


def merged(deltas: Sequence[Delta]) -> AIMessageChunk:
    writer = ChunkWriter()
    return reduce(add, [chunk for delta in deltas for chunk in writer.chunks(delta)])


def test_an_answer_as_one_message() -> None:
    message = to_ai_message(whole(DELTAS))
    assert message.text == "I will add"
    assert message.additional_kwargs == {"reasoning_content": "let me see"}
    assert [(c["name"], c["args"], c["id"]) for c in message.tool_calls] == [
        ("add", {"b": 2, "a": "ä"}, "c1"),
        ("clock", {}, "c2"),
    ]
    assert message.invalid_tool_calls[0]["error"] == "the answer ended inside a call"
    assert message.usage_metadata == {
        "input_tokens": 20,
        "output_tokens": 5,
        "total_tokens": 25,
        "input_token_details": {"cache_read": 16, "cache_creation": 4},
        "output_token_details": {"reasoning": 2},
    }
    assert message.response_metadata == {
        "model_provider": "mlx",
        "model_name": "tiny-chat",
        "finish_reason": "stop",
    }


def test_chunks_add_up_to_the_same_message() -> None:
    chunk, message = merged(DELTAS), to_ai_message(whole(DELTAS))
    assert chunk.content == message.content
    assert chunk.tool_calls == message.tool_calls
    assert chunk.usage_metadata == message.usage_metadata
    assert chunk.response_metadata == message.response_metadata
    assert chunk.additional_kwargs == message.additional_kwargs
    assert chunk.invalid_tool_calls[0]["args"] == message.invalid_tool_calls[0]["args"]
    assert chunk.chunk_position == "last"


def test_only_the_last_chunk_counts_tokens_and_names_the_model() -> None:
    writer = ChunkWriter()
    chunks = [chunk for delta in DELTAS for chunk in writer.chunks(delta)]
    assert [c.usage_metadata is not None for c in chunks] == [False] * 7 + [True]
    assert all(c.response_metadata == {"model_provider": "mlx"} for c in chunks[:-1])
    assert [c.chunk_position for c in chunks] == [None] * 7 + ["last"]


def test_a_call_without_an_id_gets_one() -> None:
    message = to_ai_message(whole([Delta(tool_calls=(ToolCall("a", {}), ToolCall("a", {}))), END]))
    first, second = (call["id"] for call in message.tool_calls)
    assert first
    assert first != second


class Scripted(GenericFakeChatModel):
    """Streams DELTAS by the routes that turn chunks into blocks and events."""

    messages: Any = iter(())

    def _stream(self, *args: Any, **kwargs: Any) -> Any:
        writer = ChunkWriter(blocks=self.output_version == "v1")
        for delta in DELTAS:
            for chunk in writer.chunks(delta):
                yield ChatGenerationChunk(message=chunk)


def check_blocks(message: AIMessage) -> None:
    kinds = [block["type"] for block in message.content_blocks]
    assert kinds[:4] == ["reasoning", "text", "tool_call", "tool_call"]
    assert message.text == "I will add"
    assert [call["id"] for call in message.tool_calls] == ["c1", "c2"]
    assert message.tool_calls[0]["args"] == {"b": 2, "a": "ä"}
    assert len(message.invalid_tool_calls) == 1


def test_content_blocks_stay_apart_while_streaming() -> None:
    check_blocks(reduce(add, Scripted(output_version="v1").stream("hi")))


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
def test_content_blocks_stay_apart_in_events() -> None:
    events = pytest.importorskip(
        "langchain_core.language_models.chat_model_stream", reason="no events of version 3"
    )
    stream = Scripted().stream_events("hi", version="v3")
    assert isinstance(stream, events.ChatModelStream)
    list(stream)
    check_blocks(stream.output)


@pytest.mark.parametrize("text", ["{", "not json", CUT_OFF.text, '{"nme": "add"}', "[1]", '"a"', "null", ""])
def test_an_unreadable_call_stays_one_and_comes_back_as_it_was_written(text: str) -> None:
    deltas = [Delta(text="so"), Delta(invalid_tool_calls=(InvalidToolCall(text, "unreadable"),)), END]
    for message in (merged(deltas), to_ai_message(whole(deltas))):
        assert message.tool_calls == []
        assert len(message.invalid_tool_calls) == 1
        assert one(message).content == "\n".join(filter(None, ["so", text]))


@given(ANSWERS)
def test_what_was_streamed_comes_back_unchanged(deltas: list[Delta]) -> None:
    answer = whole(deltas)
    back = one(merged(deltas))
    assert back == Message("assistant", answer.text, tool_calls=answer.tool_calls)
    assert json.dumps([c.arguments for c in back.tool_calls]) == json.dumps(  # the order, too
        [c.arguments for c in answer.tool_calls]
    )


@pytest.mark.parametrize(
    "block",
    [
        {"type": "text-plain", "text": "My name is Ada.", "mime_type": "text/plain"},
        {"type": "file", "mime_type": "text/markdown", "base64": "TXkgbmFtZSBpcyBBZGEu"},
        {"type": "file", "source_type": "text", "mime_type": "text/plain", "text": "My name is Ada."},
        {
            "type": "document",
            "source": {"type": "text", "media_type": "text/plain", "data": "My name is Ada."},
        },
    ],
)
def test_files_of_plain_text_are_read(block: dict[str, Any]) -> None:
    assert to_core([HumanMessage([block])])[0].content == "My name is Ada."


def test_a_tools_result_says_what_cannot_be_shown(caplog: pytest.LogCaptureFixture) -> None:
    picture = {"type": "image", "base64": "AA==", "mime_type": "image/png"}
    result = ToolMessage([{"type": "text", "text": "A map:"}, picture], tool_call_id="1")
    assert to_core([result])[0].content == "A map:\n[a part of type image that cannot be shown]"
    assert "'image'" in caplog.text
    with pytest.raises(InvalidRequest, match="'image' in a user message"):
        to_core([HumanMessage([picture])])


PIECES = st.lists(
    st.sampled_from(["{", "}", "[", "]", '"', "\\", "a", ": ", ", ", "1", "\n", "unreadable"]), max_size=8
)


@given(begun=PIECES.map(lambda parts: '{"a": ' + "".join(parts)), text=PIECES.map("".join))
def test_a_call_that_was_begun_and_is_invalid_never_becomes_one(begun: str, text: str) -> None:
    pieces = (ToolCallPiece("c1", "add", ""), ToolCallPiece("c1", "add", begun))
    deltas = [Delta(call_pieces=pieces), Delta(invalid_tool_calls=(InvalidToolCall(text, "cut", "c1"),)), END]
    message = merged(deltas)
    assert (message.tool_calls, len(message.invalid_tool_calls)) == ([], 1)
    assert one(message).content == text


def test_a_call_in_pieces_is_the_call() -> None:
    said = (ToolCallPiece("c1", "add", ""), ToolCallPiece("c1", "add", '{"b": 2,'))
    whole_call = ToolCall("add", {"b": 2, "a": 1}, "c1")
    deltas = [
        Delta(call_pieces=said),
        Delta(call_pieces=(ToolCallPiece("c1", "add", ' "a": 1}'),), tool_calls=(whole_call,)),
        Delta(tool_calls=(ToolCall("sub", {}, "c2"),)),
        END,
    ]
    writer = ChunkWriter()
    chunks = [chunk for delta in deltas for chunk in writer.chunks(delta)]
    assert [
        (c["name"], c["args"], c["id"], c["index"]) for chunk in chunks for c in chunk.tool_call_chunks
    ] == [
        ("add", "", "c1", 0),
        (None, '{"b": 2,', None, 0),
        (None, ' "a": 1}', None, 0),
        ("sub", "{}", "c2", 1),
    ]
    assert one(reduce(add, chunks)).tool_calls == (whole_call, ToolCall("sub", {}, "c2"))
