"""The arguments of a call come while the model writes them, and a call that was cut never becomes one."""

from __future__ import annotations

import json
from functools import reduce
from operator import add
from pathlib import Path

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.tools import FunctionTool

from langchain_agent_memory import ChatMLXPersistent
from llama_index_agent_memory import MLXPersistentLLM

NOTE = {
    "type": "function",
    "function": {
        "name": "note",
        "description": "Write a note.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "minLength": 30, "maxLength": 60}},
            "required": ["text"],
        },
    },
}


def note(text: str) -> str:
    """Write a note."""
    return text


@pytest.fixture
def llm(tmp_path: Path) -> ChatMLXPersistent:
    return ChatMLXPersistent(
        model="tiny-chat", cache_dir=str(tmp_path), temperature=1, seed=7, max_tokens=200
    )


def streamed(llm: ChatMLXPersistent, **options: int) -> list[AIMessageChunk]:
    bound = llm.bind_tools([NOTE], tool_choice="note")
    return list(bound.stream([HumanMessage("Write a note.")], session_id="a", **options))


def test_arguments_are_streamed_and_add_up_to_the_call(llm: ChatMLXPersistent) -> None:
    chunks = streamed(llm)
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    assert (pieces[0]["name"], pieces[0]["args"]) == ("note", "")
    assert len(pieces) > 5
    (call,) = reduce(add, chunks).tool_calls
    assert json.loads("".join(piece["args"] or "" for piece in pieces)) == call["args"]
    whole = llm.bind_tools([NOTE], tool_choice="note").invoke([HumanMessage("Write a note.")])
    assert [c["args"] for c in whole.tool_calls] == [call["args"]]


@pytest.mark.parametrize("tokens", [8, 16, 24])
def test_a_call_that_was_cut_is_invalid_and_the_next_turn_knows_it(
    llm: ChatMLXPersistent, tokens: int
) -> None:
    chunks = streamed(llm, max_tokens=tokens)
    answer = reduce(add, chunks)
    assert (answer.tool_calls, len(answer.invalid_tool_calls)) == ([], 1)
    history = [HumanMessage("Write a note."), answer, HumanMessage("Go on.")]
    after = llm.bind_tools([NOTE]).invoke(history, session_id="a", max_tokens=1)
    usage = answer.usage_metadata
    assert usage is not None
    assert after.usage_metadata is not None
    known = after.usage_metadata["input_token_details"]["cache_read"]
    assert known >= usage["input_tokens"], "at least the prompt of the turn that was cut"


def test_llama_index_streams_arguments_beside_the_calls(tmp_path: Path) -> None:
    llm = MLXPersistentLLM(model="tiny-chat", cache_dir=str(tmp_path), temperature=1, seed=7, max_tokens=200)
    tool = FunctionTool.from_defaults(note)
    responses = list(llm.stream_chat_with_tools([tool], "Write a note.", tool_required=True))
    pieces = [p for r in responses for p in r.additional_kwargs.get("tool_call_deltas", ())]
    (call,) = [block for block in responses[-1].message.blocks if isinstance(block, ToolCallBlock)]
    assert {piece["id"] for piece in pieces} == {call.tool_call_id}
    assert json.loads("".join(piece["arguments"] for piece in pieces)) == call.tool_kwargs
    assert not any(
        isinstance(block, ToolCallBlock) for response in responses[:2] for block in response.message.blocks
    )
    assert isinstance(responses[0].message, ChatMessage)
