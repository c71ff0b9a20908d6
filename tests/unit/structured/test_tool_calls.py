"""What a tool call says is read from its text, and text that is not a call never does more than say so."""

from __future__ import annotations

from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import longcat, mistral, pythonic, qwen3_coder
from support import made_tokenizers as made
from support.json_schemas import tool

from agent_memory_core.messages import ChatRequest
from agent_memory_core.structured.tool_calls import ToolCallParser, model_parser, parser_for

PARSER = model_parser(made.tiny_chat())
TOOL = tool("f", {"type": "object", "properties": {"n": {"type": "integer"}}})


@pytest.mark.parametrize(
    "inner",
    [
        "",
        '{"name": "f", "argum',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "not json"}',
        '{"name": 3, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"arguments": {}}',
        "[1, 2]",
        "null",
        "7",
        "[" * 5_000,
    ],
)
def test_text_that_is_no_call_is_refused_with_a_reason(inner: str) -> None:
    with pytest.raises(ValueError, match=r"^[A-Za-z]+Error: "):
        PARSER.parse(inner)


@pytest.mark.parametrize(
    ("parser", "inner"),
    [
        (longcat, "no name"),
        (qwen3_coder, "<function=f><parameter=n>\ninf\n</parameter></function>"),
        (qwen3_coder, "<function=f><parameter=n>\nx\n</parameter></function>"),
        (pythonic, "["),
    ],
)
def test_whatever_a_parser_raises_is_a_value_error(parser: Any, inner: str) -> None:
    with pytest.raises(ValueError, match="Error: "):
        parser_of(parser).offering(TOOL).parse(inner)


@pytest.mark.parametrize(
    ("inner", "arguments"),
    [
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', {"x": 1}),
        ('{"name": "f", "parameters": {"x": 1}}', {"x": 1}),
        ('{"name": "f"}', {}),
    ],
)
def test_arguments_are_an_object_however_they_are_written(inner: str, arguments: dict[str, Any]) -> None:
    assert [call.arguments for call in PARSER.parse(inner)] == [arguments]


def parser_of(module: Any) -> ToolCallParser:
    return ToolCallParser(module.tool_call_start, module.tool_call_end, module.parse_tool_call)


@pytest.mark.parametrize(
    ("parser", "inner"),
    [
        (pythonic, "[f(x=1), g(x=2)]"),
        (
            mistral,
            '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"x": 2}, "id": "abcdefghi"}]',
        ),
    ],
)
def test_a_span_may_hold_several_calls(parser: Any, inner: str) -> None:
    first, second = parser_of(parser).parse(inner)
    assert (first.name, first.arguments) == ("f", {"x": 1})
    assert (second.name, second.arguments) == ("g", {"x": 2})
    assert first.id.startswith("call_")
    assert parser is pythonic or second.id == "abcdefghi", "the model's own id"


def test_a_parser_is_told_the_plain_types_of_the_offered_tools() -> None:
    optional = tool("f", {"properties": {"n": {"anyOf": [{"type": "string"}, {"type": "null"}]}}})
    call = "<function=f><parameter=n>\n7\n</parameter></function>"
    for offered, value in ((TOOL, 7), (optional, "7")):
        (read,) = parser_of(qwen3_coder).offering(offered).parse(call)
        assert read.arguments == {"n": value}


# Which parser reads an answer


def with_parser(module: Any) -> TokenizerWrapper:
    return TokenizerWrapper(
        made.llama3()._tokenizer,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
        tool_parser=module.parse_tool_call,
    )


def test_a_model_with_a_parser_is_read_by_it() -> None:
    parser = parser_for(with_parser(mistral), ChatRequest((), (TOOL,)))
    assert parser is not None
    assert (parser.start, parser.parse_span) == (mistral.tool_call_start, mistral.parse_tool_call)


def test_a_model_without_a_parser_calls_by_the_convention_if_tools_were_offered() -> None:
    assert not made.llama3().has_tool_calling
    parser = parser_for(made.llama3(), ChatRequest((), (TOOL,)))
    assert parser is not None
    assert (parser.start, parser.end) == ("<tool_call>", "</tool_call>")
    assert parser_for(made.llama3(), ChatRequest(())) is None


def test_no_call_is_read_where_none_can_be_meant() -> None:
    assert parser_for(made.tiny_chat(), ChatRequest((), (TOOL,), tool_choice="none")) is None
    assert parser_for(made.tiny_chat(), ChatRequest((), response_schema={})) is None
    assert parser_for(made.tiny_chat(), ChatRequest(())) is None
    assert parser_for(with_parser(mistral), ChatRequest(())) is None
    assert parser_for(made.tiny_chat(), ChatRequest((), (TOOL,), response_schema={})) is not None
