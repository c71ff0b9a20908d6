"""The pieces of a call are the call: whatever the syntax, wherever the answer ends."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support import made_tokenizers as made
from support.constrained_answers import grammars_of, template_of
from support.json_schemas import tool
from support.tool_templates import xml_tokenizers

from agent_memory_core import ChatRequest, Delta, Message, ToolCall
from agent_memory_core.text.detokenizer import Detokenizer

PROPERTIES: dict[str, Any] = {
    "text": {"type": "string"},
    "note": {"type": "string"},
    "count": {"type": "integer"},
    "list": {"type": "array", "items": {}},
    "any": {},
}
TOOLS = (
    tool("write", {"type": "object", "properties": PROPERTIES}),
    tool("write_all", {"type": "object", "properties": PROPERTIES}),
)
ASKED = ChatRequest((Message("user", "ask"),), TOOLS)
TEXTS = st.one_of(
    st.sampled_from(["null", "None", "7", "", " x ", "a\nb\n", '{"a": 1}', "&lt;b&gt;", 'say "hi" \\ é']),
    st.lists(
        st.sampled_from(
            ["word", " ", "\n", '"', "\\", "{", "}", "<", "</", "</parameter", "</tool_call>", "é", "ü😀"]
        ),
        max_size=14,
    ).map("".join),
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXTS,
        "count": st.integers(-9, 99),
        "note": TEXTS,
        "list": st.lists(st.one_of(TEXTS, st.integers(0, 5), st.none()), max_size=3),
        "any": st.one_of(TEXTS, st.booleans(), st.dictionaries(st.sampled_from("ab"), TEXTS, max_size=2)),
    },
)
SYNTAXES = ["json", "qwen3_coder", "glm47", "minimax_m2"]


@cache
def tokenizers() -> dict[str, TokenizerWrapper]:
    return {"json": made.tiny_chat(), **xml_tokenizers()}


def written(tokenizer: TokenizerWrapper, *calls: tuple[str, dict[str, Any]]) -> str:
    """Calls as the model's own template writes them."""
    made_calls = tuple(ToolCall(name, given, str(i)) for i, (name, given) in enumerate(calls))
    asked = (Message("user", "ask"), Message("assistant", "", tool_calls=made_calls))
    before = template_of(tokenizer).render(ChatRequest(asked[:1]))
    whole = template_of(tokenizer).render(ChatRequest(asked), generation_prompt=False)
    return whole.removeprefix(before).split("<|im_end|>")[0]


def read(tokenizer: TokenizerWrapper, text: str, tokens: int | None = None) -> list[Delta]:
    reader = Detokenizer(tokenizer, calls=grammars_of(tokenizer).call_parser(ASKED))
    ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    return [*map(reader.push, ids), reader.finish()]


def pieces_of(deltas: list[Delta]) -> dict[str, tuple[str, str]]:
    """By the id of each call: its tool, and its pieces put together."""
    found: dict[str, tuple[str, str]] = {}
    for piece in (piece for delta in deltas for piece in delta.call_pieces):
        name, said = found.get(piece.id, (piece.name, ""))
        assert name == piece.name
        assert bool(piece.arguments) or piece.id not in found
        found[piece.id] = piece.name, said + piece.arguments
    return found


def check(deltas: list[Delta]) -> None:
    """Every call that came in pieces is either what its pieces say, or invalid under the same id."""
    calls = {call.id: call for delta in deltas for call in delta.tool_calls}
    invalid = {call.id for delta in deltas for call in delta.invalid_tool_calls}
    for call_id, (name, said) in pieces_of(deltas).items():
        assert (call_id in calls) != (call_id in invalid)
        if call_id in calls:
            assert name == calls[call_id].name
            assert json.loads(said) == dict(calls[call_id].arguments)
            assert list(json.loads(said)) == list(calls[call_id].arguments)


@pytest.mark.parametrize("name", SYNTAXES)
@given(arguments=ARGUMENTS, tool_name=st.sampled_from(["write", "write_all"]), cut=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_the_pieces_of_a_call_are_the_call(
    name: str, arguments: dict[str, Any], tool_name: str, cut: int
) -> None:
    tokenizer = tokenizers()[name]
    text = written(tokenizer, (tool_name, arguments))
    whole = read(tokenizer, text + " Done.")
    check(whole)
    check(read(tokenizer, text, cut))
    if arguments and any(delta.tool_calls for delta in whole):
        assert [name for name, _ in pieces_of(whole).values()] == [tool_name]


@pytest.mark.parametrize("name", SYNTAXES)
def test_a_long_string_comes_while_it_is_written(name: str) -> None:
    tokenizer = tokenizers()[name]
    value = "\n".join(f"line {i} of a file" for i in range(20))
    deltas = read(tokenizer, written(tokenizer, ("write", {"text": value})))
    check(deltas)
    pieces = [piece for delta in deltas for piece in delta.call_pieces]
    assert (pieces[0].name, pieces[0].arguments) == ("write", "")
    assert len(pieces) > 20
    assert max(len(piece.arguments) for piece in pieces) < 40


@pytest.mark.parametrize("name", SYNTAXES)
def test_two_calls_have_pieces_of_their_own(name: str) -> None:
    tokenizer = tokenizers()[name]
    deltas = read(tokenizer, written(tokenizer, ("write", {"text": "a"}), ("write_all", {"count": 2})))
    check(deltas)
    said = [(name, json.loads(text)) for name, text in pieces_of(deltas).values()]
    assert said == [("write", {"text": "a"}), ("write_all", {"count": 2})]


def test_a_call_in_another_form_comes_whole() -> None:
    deltas = read(
        made.tiny_chat(), '<tool_call>\n{"arguments": {"text": "a"}, "name": "write"}\n</tool_call>'
    )
    assert pieces_of(deltas) == {}
    assert [call.name for delta in deltas for call in delta.tool_calls] == ["write"]


@pytest.mark.parametrize("space", ["", " ", "\n  "])
def test_space_between_the_marks_does_not_matter(space: str) -> None:
    text = (
        f'{{{space}"name":{space}"write",{space}"arguments":{space}{{{space}"text":{space}"a\tb"}}{space}}}'
    )
    deltas = read(made.tiny_chat(), f"<tool_call>{text}</tool_call>")
    check(deltas)
    assert [json.loads(said) for _, said in pieces_of(deltas).values()] == [{"text": "a\tb"}]
