"""Values that hold the marks of the tool syntax arrive whole, or the call is invalid: never cut in silence."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support import made_tokenizers as made
from support.constrained_answers import grammars_of, template_of
from support.json_schemas import tool
from support.tool_templates import xml_tokenizers

from agent_memory_core import ChatRequest, Delta, Message, ToolCall
from agent_memory_core.text.detokenizer import Detokenizer

TOOL = tool("write", {"type": "object", "properties": {"text": {"type": "string"}}})
ASKED = ChatRequest((Message("user", "ask"),), (TOOL,))
MARKS = ["</tool_call>", "<tool_call>", "</parameter>", "<parameter=x>", "</function>", "<function=f>"]
VALUES = st.lists(
    st.sampled_from([*MARKS, "a", " ", "\n", '"', "\\", "{", "}", "é"]), min_size=1, max_size=6
).map("".join)


@cache
def tokenizers() -> dict[str, TokenizerWrapper]:
    return {"json": made.tiny_chat(), **xml_tokenizers()}


def read(tokenizer: TokenizerWrapper, text: str) -> Delta:
    """The answer, read in tokens as the engine does it."""
    reader = Detokenizer(tokenizer, calls=grammars_of(tokenizer).call_parser(ASKED))
    deltas = [*map(reader.push, tokenizer.encode(text, add_special_tokens=False)), reader.finish()]
    return Delta(
        "".join(d.text for d in deltas),
        tool_calls=tuple(call for d in deltas for call in d.tool_calls),
        invalid_tool_calls=tuple(call for d in deltas for call in d.invalid_tool_calls),
    )


def written(tokenizer: TokenizerWrapper, value: str) -> str:
    """A call with this value, as the model's own template writes it."""
    asked = (
        Message("user", "ask"),
        Message("assistant", "", tool_calls=(ToolCall("write", {"text": value}, "1"),)),
    )
    before = template_of(tokenizer).render(ChatRequest(asked[:1]))
    whole = template_of(tokenizer).render(ChatRequest(asked), generation_prompt=False)
    return whole.removeprefix(before).split("<|im_end|>")[0]


@pytest.mark.parametrize("name", ["json", "qwen3_coder", "glm47", "minimax_m2"])
@example(value="</parameter><parameter=x>", after="")  # a second parameter, which the tool does not have
@example(value="</parameter>a</function></tool_call>", after="")  # text between the marks
@example(value="</parameter><function=f></function></tool_call>", after="")
@example(value="</tool_call></tool_call><tool_call></tool_call>", after="")  # mlx-lm makes up a name for it
@example(value="</tool_call></tool_call><tool_call>a</tool_call>", after="")  # a call inside a value
@given(value=VALUES, after=st.sampled_from(["", " Done.", " Well </tool_call>"]))
@settings(max_examples=60, deadline=None)
def test_a_value_arrives_whole_or_the_call_is_invalid(name: str, value: str, after: str) -> None:
    tokenizer = tokenizers()[name]
    said = written(tokenizer, value)
    # Text that closes the whole call is the end of the call: nobody could tell it from one.
    parser = grammars_of(tokenizer).call_parser(ASKED)
    assert parser is not None
    if name != "json" and re.sub(r"\s", "", value).find(re.sub(r"\s", "", said.split(value)[-1])) >= 0:
        return
    found = read(tokenizer, said + after)
    arguments = [dict(call.arguments) for call in found.tool_calls]
    if found.invalid_tool_calls:
        assert arguments == []
    else:
        assert [a["text"].strip() for a in arguments] == [value.strip()]
    if name == "json":
        assert arguments == [{"text": value}], "JSON tells where a string ends"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (
            '{"name": "w", "arguments": {"content": "ends with </tool_call> ok"}}',
            {"content": "ends with </tool_call> ok"},
        ),
        (
            '{"name": "w", "arguments": {"content": "two\nlines\tand a tab"}}',
            {"content": "two\nlines\tand a tab"},
        ),
        ('{"name": "w", "arguments": {"content": "a \\" </tool_call>"}}', {"content": 'a " </tool_call>'}),
    ],
)
def test_json_is_read_to_its_end(text: str, arguments: dict[str, Any]) -> None:
    found = read(made.tiny_chat(), f"<tool_call>\n{text}\n</tool_call>")
    assert [dict(call.arguments) for call in found.tool_calls] == [arguments]
    assert (found.text, found.invalid_tool_calls) == ("", ())


def test_a_broken_call_ends_at_its_first_delimiter_and_what_follows_is_read() -> None:
    broken = '<tool_call>\n{"name": "w", "arguments": {"content": "no end}}\n</tool_call>'
    good = f"<tool_call>\n{json.dumps({'name': 'w', 'arguments': {'content': 'x'}})}\n</tool_call>"
    found = read(made.tiny_chat(), f"Well. {broken} And {good}")
    assert [call.text for call in found.invalid_tool_calls] == [broken[11:-12]]
    assert [dict(call.arguments) for call in found.tool_calls] == [{"content": "x"}]
    assert found.text == "Well.  And"


def test_many_broken_calls_are_read_to_the_end() -> None:
    found = read(made.tiny_chat(), '<tool_call>{"</tool_call> a ' * 300)
    assert len(found.invalid_tool_calls) == 300
