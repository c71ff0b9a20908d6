"""Calls that write each argument by itself: forced, they are valid and come back as what was meant."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.tool_parsers import qwen3_coder
from support.constrained_answers import ASK, Answer, template_of
from support.json_schemas import SCHEMAS, fits, tool
from support.tool_templates import QWEN3_CODER, VALUE, with_tools, xml_tokenizers

from agent_memory_core import ChatRequest, InvalidRequest, Message, ToolCall
from agent_memory_core.structured.grammar import find_tool_syntax
from agent_memory_core.structured.tool_calls import model_parser, parser_for
from agent_memory_core.structured.tool_syntax_xml import XmlToolSyntax
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.detokenizer import Detokenizer

STYLES = list(xml_tokenizers())
by_style = pytest.mark.parametrize("style", STYLES)


@cache
def syntax_of(style: str) -> XmlToolSyntax:
    tokenizer = xml_tokenizers()[style]
    syntax = find_tool_syntax(template_of(tokenizer), model_parser(tokenizer))
    assert isinstance(syntax, XmlToolSyntax)
    return syntax


def props(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


TEXT = {"type": "string"}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
PARAMETERS: dict[str, dict[str, Any]] = {
    **{name: SCHEMAS[name] for name in ("nested", "array", "optional", "number", "referred", "nothing")},
    "texts": props(a={"type": "string", "maxLength": 12}, b={"type": "string", "minLength": 1, "maxLength": 4}),
    "booleans": props(yes={"type": "boolean"}, no={"type": "boolean"}),
    "listed": props(colour={"type": "string", "enum": ["rot", "a \"b\" <c>", "κόκκινο", "赤"]}, n={"enum": [1, 2]}),
    "all optional": {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}], "default": None},
            "c": {"type": ["boolean", "null"]},
        },
    },
    "matched": props(code={"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}),
}  # fmt: skip


# Any of these may be one of the parameters of a tool.
VALUES: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 6},
    {"type": "string", "pattern": "^[a-z]{1,3}$"},
    {"type": "integer"},
    {"type": "integer", "minimum": 10, "maximum": 99},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "boolean"},
    {"enum": ["Ja", "nein", 3]},
    {"const": "Fixed"},
    {"type": ["integer", "null"]},
    {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
    {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    POINT,
]
KEYS = ["a", "b_c", "é", "D"]
schemas = st.builds(
    lambda properties, optional: {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    },
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=4),
    st.sets(st.sampled_from(KEYS)),
)


def forced(style: str, schema: dict[str, Any], seed: int) -> dict[str, Any]:
    """The arguments of a random call that a model is forced to make, which has to be valid."""
    request = ChatRequest(ASK, (tool("find", schema),), tool_choice="find")
    answer = Answer(xml_tokenizers()[style], request, seed, most=600)
    read = answer.read()
    assert answer.ended, answer.text
    assert (read.text, read.invalid_tool_calls) == ("", ()), answer.text
    (call,) = read.tool_calls
    assert call.name == "find"
    assert fits(call.arguments, schema), (call.arguments, answer.text)
    return dict(call.arguments)


@by_style
def test_forced_calls_come_back_and_fit(style: str) -> None:
    for name, schema in PARAMETERS.items():
        first, second = (forced(style, schema, seed) for seed in range(2))
        assert first != second or name in ("nothing", "booleans", "listed", "all optional")


@given(st.sampled_from(STYLES), schemas, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_calls_of_any_tool_come_back_and_fit(style: str, schema: dict[str, Any], seed: int) -> None:
    forced(style, schema, seed)


MEANT: dict[str, tuple[Any, Any]] = {
    "a word": (TEXT, "Paris"),
    "nothing at all": (TEXT, ""),
    "lines": (TEXT, "def f(x):\n    return x < 3 and 'a' > \"b\"\n\n# é 赤 🟣"),
    "other tags": (TEXT, "<b>bold</b> & </p>"),
    "digits": (TEXT, "007"),
    "JSON in a string": (TEXT, '{"a": [1, 2]}'),
    "true in a string": (TEXT, "true"),
    "an integer": ({"type": "integer"}, -42),
    "a number": ({"type": "number"}, 3.25),
    "a whole number": ({"type": "number"}, 3),
    "true": ({"type": "boolean"}, True),
    "false": ({"type": "boolean"}, False),
    "an object": ({"type": "object"}, {"a": {"b": [1, None, "é"]}}),
    "a list": ({"type": "array", "items": TEXT}, ["x", "ünï ✓"]),
    "an optional string": ({"anyOf": [TEXT, {"type": "null"}]}, "12"),
    "an optional string that is not there": ({"anyOf": [TEXT, {"type": "null"}]}, None),
    "an optional integer": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 12),
    "a referred object": ({"$ref": "#/$defs/point"}, {"x": 1}),
    "an optional referred object": ({"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]}, {"x": 1}),
}


def write(style: str, parameters: dict[str, Any], arguments: dict[str, Any]) -> tuple[bool, Any]:
    """Whether a model that means these arguments may write them, and what is read of its call."""
    tokenizer, syntax = xml_tokenizers()[style], syntax_of(style)
    pairs = [(key, syntax.write(value)) for key, value in arguments.items()]
    likes = syntax.parser.start + syntax.inside("find", pairs) + syntax.parser.end
    most = len(tokenizer.encode(likes, add_special_tokens=False))
    request = ChatRequest(ASK, (tool("find", parameters),), tool_choice="find")
    answer = Answer(tokenizer, request, 0, most=most, likes=likes)
    calls = answer.read().tool_calls
    return answer.text == likes, calls[0].arguments if calls else {}


def write_one(style: str, schema: Any, value: Any) -> tuple[bool, Any]:
    """`write`, with one required parameter."""
    key = "the key" if "glm" in style else "key"
    written, read = write(style, {**props(**{key: schema}), "$defs": {"point": POINT}}, {key: value})
    return written, read.get(key)


@by_style
def test_what_a_model_means_it_may_write_and_is_read(style: str) -> None:
    for name, (schema, value) in MEANT.items():
        if name == "an optional string that is not there" and "glm" in style:
            value = "null"  # its parser knows no other value in a string's place
        written, read = write_one(style, schema, value)
        assert written, name
        assert (read, type(read)) == (value, type(value)) or read == value == 3


UNSAFE = [" edged", "edged\n", "</parameter>", "a</arg_value>b", "x</tool_call>", "null", "None"]
texts = st.sampled_from(UNSAFE) | st.text("ab é7.-{}[]\"'\n </>pt", max_size=8)


@given(st.sampled_from(STYLES), texts)
@settings(max_examples=60, deadline=None)
def test_a_text_that_would_not_come_back_cannot_be_written(style: str, text: str) -> None:
    written, read = write_one(style, TEXT, text)
    assert not written or read == text


@by_style
def test_limits_of_a_text_are_kept(style: str) -> None:
    between, lower = (
        {"type": "string", "minLength": 2, "maxLength": 3},
        {"type": "string", "pattern": "^[a-z]+$"},
    )
    for text, length, letters in (
        ("a", False, True),
        ("abc", True, True),
        ("abcd", False, True),
        ("aB", True, False),
    ):
        assert write_one(style, between, text)[0] == length
        assert write_one(style, lower, text)[0] == letters


@by_style
def test_optional_parameters_may_be_left_out_and_required_ones_may_not(style: str) -> None:
    names = ("a", "b", "c")
    parameters = {**props(**{name: {"type": "integer"} for name in names}), "required": ["b"]}
    for count in range(4):
        for given_names in combinations(names, count):
            arguments = dict.fromkeys(given_names, 7)
            written, read = write(style, parameters, arguments)
            assert written == ("b" in arguments)
            assert read == arguments or not written


@by_style
def test_unsafe_texts_come_back_or_cannot_be_written(style: str) -> None:
    for text in UNSAFE:
        written, read = write_one(style, TEXT, text)
        assert not written or read == text


@by_style
def test_a_call_is_written_as_the_template_renders_it(style: str) -> None:
    tokenizer = xml_tokenizers()[style]
    schema = props(
        name={"type": "string", "maxLength": 9},
        ok={"type": "boolean"},
        xs={"type": "array", "items": POINT, "maxItems": 2},
    )
    request = ChatRequest(
        ASK, (tool("find", schema), tool("stop", SCHEMAS["nothing"])), tool_choice="required"
    )
    for seed in range(2):
        answer = Answer(tokenizer, request, seed, most=900)
        calls = answer.read().tool_calls
        assert calls
        conversation = ChatRequest((*ASK, Message("assistant", "", tool_calls=calls)), request.tools)
        rendered = template_of(tokenizer).render(conversation, generation_prompt=False)
        assert answer.ended
        # What stands before the first call belongs to the template and not to the call.
        assert rendered.endswith(answer.text + "<|im_end|>\n")


@by_style
@pytest.mark.parametrize("parallel", [True, False])
def test_several_calls_follow_one_another_where_they_may(style: str, parallel: bool) -> None:
    tools = (tool("a", props(n={"type": "integer"})), tool("b", SCHEMAS["nothing"]))
    request = ChatRequest(ASK, tools, tool_choice="required", parallel_tool_calls=parallel)
    answers = [Answer(xml_tokenizers()[style], request, seed, most=900) for seed in range(6)]
    counts = {len(answer.read().tool_calls) for answer in answers}
    assert max(counts) > 1 if parallel else counts == {1}


def test_what_cannot_be_constrained_is_refused_by_name_and_left_free_where_nothing_is_forced() -> None:
    tokenizer = xml_tokenizers()["qwen3_coder"]
    dated = tool("book", props(day={"type": "string", "format": "date"}))
    with pytest.raises(InvalidRequest, match=r"'book' cannot be forced.*'day'"):
        Answer(tokenizer, ChatRequest(ASK, (dated,), tool_choice="book"), 0)
    either = tool("pick", {"anyOf": [POINT, SCHEMAS["nothing"]], "type": "object"})
    with pytest.raises(InvalidRequest, match=r"'pick' cannot be forced.*anyOf"):
        Answer(tokenizer, ChatRequest(ASK, (either,), tool_choice="required"), 0)
    syntax = syntax_of("qwen3_coder")
    call = syntax.parser.start + syntax.inside("book", [("day", "2024-01-01")]) + syntax.parser.end
    request = ChatRequest(ASK, (dated,), parallel_tool_calls=False)
    (read,) = Answer(tokenizer, request, 0, likes=call).read().tool_calls
    assert read.arguments == {"day": "2024-01-01"}


def test_a_template_that_quotes_its_strings_has_no_such_syntax() -> None:
    quoted = with_tools(qwen3_coder, QWEN3_CODER.replace(VALUE, "(v | tojson)"))
    assert find_tool_syntax(ChatTemplate(quoted), model_parser(quoted)) is None


@pytest.mark.parametrize("value", [12, None, "12"])
def test_a_free_call_is_read_by_the_type_of_an_optional_parameter(value: Any) -> None:
    tokenizer, syntax = xml_tokenizers()["qwen3_coder"], syntax_of("qwen3_coder")
    kind = "string" if isinstance(value, str) else "integer"
    optional = {"anyOf": [{"type": kind}, {"type": "null"}]}
    calls = parser_for(tokenizer, ChatRequest(ASK, (tool("f", props(key=optional)),)))
    reader = Detokenizer(tokenizer, calls=calls)
    text = syntax.parser.start + syntax.inside("f", [("key", syntax.write(value))]) + syntax.parser.end
    deltas = [reader.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    read: list[ToolCall] = [call for delta in [*deltas, reader.finish()] for call in delta.tool_calls]
    assert [call.arguments for call in read] == [{"key": value}]
