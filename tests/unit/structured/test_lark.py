"""Parts of grammars match exactly the text that they were made from."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from llguidance import LLMatcher
from support import made_tokenizers as made
from support.constrained_answers import ASK, grammars_of

from agent_memory_core import ChatRequest, InvalidRequest
from agent_memory_core.structured.lark import Lark, escaped, json_of

CALL, END = "<tool_call>", "</tool_call>"
texts = st.text("ab é漢😀\n\t/\\\"'.*()[]{}|^$<>", min_size=1, max_size=12)


def vocabulary() -> tuple[Any, Lark]:
    """That of a tokenizer in which the delimiters of calls are special tokens."""
    grammars = grammars_of(made.tiny_chat())
    grammars.grammar(ChatRequest(ASK, response_schema={}), "")
    assert grammars._vocabulary is not None
    return grammars._vocabulary.tokens, grammars._vocabulary.lark


def takes(rules: str, text: str) -> bool:
    """Whether a whole answer may be ``text``."""
    matcher = LLMatcher(vocabulary()[0], "%llguidance {}\n" + rules, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = made.tiny_chat().encode(text, add_special_tokens=False)
    return bool(
        matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()
    )


@given(texts, texts)
@settings(max_examples=40, deadline=None)
def test_a_literal_is_its_text_and_no_other(text: str, other: str) -> None:
    lark = vocabulary()[1]
    for spelled in (text, f"{text}{CALL}{text}"):
        rules = f"start: {lark.literal(spelled)}"
        assert takes(rules, spelled)
        assert takes(rules, other) == (other == spelled)
        assert not takes(rules, spelled + "a")


@given(texts, texts)
@settings(max_examples=40, deadline=None)
def test_an_escaped_text_is_matched_as_it_is(text: str, other: str) -> None:
    assert takes(f"start: /{escaped(text)}/", text)
    assert takes(f"start: /{escaped(text)}/", other) == (other == text)


@pytest.mark.parametrize("delimiter", [END, "</call>\n"])
def test_text_up_to_a_delimiter_ends_at_the_first(delimiter: str) -> None:
    rules = f"start: body\n{vocabulary()[1].until('body', delimiter)}"
    for text in ("", "a </ b\n"):
        assert takes(rules, text + delimiter)
        assert not takes(rules, text)
        assert not takes(rules, f"{text}{delimiter}b{delimiter}")


def test_what_precedes_a_special_token() -> None:
    lark = Lark({"<a>": 1, "<a><b>": 2})
    assert lark.before_special("x<a><b>") == "x"
    assert lark.literal("x<a><b>y<a>") == '"x" <[2]> "y" <[1]>', "the longest that matches"
    assert lark.before_special("x<b>") is None
    assert lark.literal("") == '""'
    assert Lark({}).before_special("<a>") is None


def test_an_object_has_the_properties_it_names_unless_its_schema_says_more() -> None:
    named = {"type": "object", "properties": {"a": {"type": "integer"}}}
    point = {"type": "object", "properties": {"y": {"type": "integer"}}, "required": ["y"]}
    both = {"$defs": {"p": point}, "allOf": [{"$ref": "#/$defs/p"}, named]}
    extra, several = '{"a": 1, "z": 2}', '{"y": 1, "a": 2}'

    def fits(schema: dict[str, Any], text: str) -> bool:
        return takes(f"start: {json_of(schema)}", text)

    assert not fits(named, extra)
    assert not fits({"anyOf": [named, {"type": "array", "items": named}]}, extra)
    assert not fits({"type": "object", "properties": {"in": named}}, f'{{"in": {extra}}}')
    assert fits(named | {"additionalProperties": True}, extra)
    assert fits({"type": "object"}, extra)
    assert fits(both, several)


def test_a_schema_that_is_not_json_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="the schema is not JSON"):
        json_of({"enum": [object()]})


LISTED = {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"enum": [1, 2]}}


def test_a_mapping_from_listed_names_has_no_others() -> None:
    named = {**LISTED, "propertyNames": {"$ref": "#/$defs/n"}, "$defs": {"n": {"enum": ["a", "b"]}}}
    for schema in (LISTED, named):
        rules = f"start: {json_of(schema)}"
        assert all(takes(rules, text) for text in ("{}", '{"a": 1}', '{"b": 2}', '{"a": 2, "b": 1}'))
        assert not any(takes(rules, text) for text in ('{"c": 1}', '{"a": 3}', '{"a": 1, "a": 1}'))


WORDS_OF_SCHEMAS = [
    "propertyNames",
    "additionalProperties",
    "properties",
    "$defs",
    "enum",
    "default",
    "items",
]


@pytest.mark.parametrize("keyword", WORDS_OF_SCHEMAS)
def test_a_property_may_be_called_like_a_keyword(keyword: str) -> None:
    schema = {"type": "object", "properties": {keyword: {"enum": ["a"]}}, "required": [keyword]}
    inner = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    written = f'{{"{keyword}": "a"}}'
    assert takes(f"start: {json_of(schema)}", written)
    assert takes(f"start: {json_of(inner)}", f'{{"x": {written}}}')
    assert not takes(f"start: {json_of(schema)}", f'{{"{keyword}": "b"}}')


@pytest.mark.parametrize("key", ["const", "enum"])
def test_a_value_that_looks_like_a_schema_is_a_value(key: str) -> None:
    value = {"propertyNames": {"enum": ["a"]}}
    schema = {key: value if key == "const" else [value]}
    assert takes(f"start: {json_of(schema)}", '{"propertyNames": {"enum": ["a"]}}')
    assert not takes(f"start: {json_of(schema)}", '{"properties": {"a": {}}}')
