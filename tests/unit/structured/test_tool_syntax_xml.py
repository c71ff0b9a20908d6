"""Calls whose arguments are written one by one: forced, they are valid and come back as what was meant."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import glm47, minimax_m2, qwen3_coder
from support import tiny_models
from support.json_forms import SCHEMAS, fits, tool
from unit.structured.test_grammar import ASK, Answer, with_tools

from agent_memory_core import AgentMemory, ChatRequest, InvalidRequest, Message, SamplingParams, ToolCall
from agent_memory_core.structured.grammar import find_tool_syntax
from agent_memory_core.structured.tool_calls import model_parser, parser_for
from agent_memory_core.structured.tool_schema import plainly_typed, schema_types
from agent_memory_core.structured.tool_syntax_xml import XmlToolSyntax
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.detokenizer import Detokenizer

VALUE = "(v if v is string else v | tojson)"
QWEN3_CODER = (
    "'\\n<tool_call>\\n<function=' ~ c.function.name ~ '>\\n' -}}{%- for k, v in c.function.arguments.items() -%}"
    "{{- '<parameter=' ~ k ~ '>\\n' ~ VALUE ~ '\\n</parameter>\\n' -}}{%- endfor -%}"
    "{{- '</function>\\n</tool_call>'"
).replace("VALUE", VALUE)
# As the first release of that template: what is no container is written as Python does.
QWEN3_CODER_PYTHON = QWEN3_CODER.replace(
    VALUE, "(v | tojson if v is mapping or (v is sequence and v is not string) else v | string)"
)
GLM = (
    "'<tool_call>' ~ c.function.name -}}{%- for k, v in c.function.arguments.items() -%}"
    "{{- '<arg_key>' ~ k ~ '</arg_key><arg_value>' ~ VALUE ~ '</arg_value>' -}}{%- endfor -%}{{- '</tool_call>'"
).replace("VALUE", VALUE)
GLM_LINES = (
    "'\\n<tool_call>' ~ c.function.name ~ '\\n' -}}{%- for k, v in c.function.arguments.items() -%}"
    "{{- '<arg_key>' ~ k ~ '</arg_key>\\n<arg_value>' ~ VALUE ~ '</arg_value>\\n' -}}{%- endfor -%}"
    "{{- '</tool_call>'"
).replace("VALUE", VALUE)
MINIMAX = (
    "'<minimax:tool_call>\\n<invoke name=\"' ~ c.function.name ~ '\">\\n' -}}"
    "{%- for k, v in c.function.arguments.items() -%}"
    "{{- '<parameter name=\"' ~ k ~ '\">' ~ VALUE ~ '</parameter>\\n' -}}{%- endfor -%}"
    "{{- '</invoke>\\n</minimax:tool_call>'"
).replace("VALUE", VALUE)


@cache
def tokenizers() -> dict[str, TokenizerWrapper]:
    return {
        "qwen3_coder": with_tools(qwen3_coder, QWEN3_CODER),
        "qwen3_coder, Python's words": with_tools(qwen3_coder, QWEN3_CODER_PYTHON),
        "qwen3_coder, delimiters are tokens": with_tools(
            qwen3_coder, QWEN3_CODER, "<tool_call>", "</tool_call>"
        ),
        "glm47": with_tools(glm47, GLM),
        "glm47, tags are tokens": with_tools(
            glm47,
            GLM,
            *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        ),
        "glm47, in lines": with_tools(glm47, GLM_LINES),
        "minimax_m2": with_tools(minimax_m2, MINIMAX),
    }


STYLES = list(tokenizers())
by_style = pytest.mark.parametrize("style", STYLES)


@cache
def syntax_of(style: str) -> XmlToolSyntax:
    tokenizer = tokenizers()[style]
    syntax = find_tool_syntax(ChatTemplate(tokenizer), model_parser(tokenizer))
    assert isinstance(syntax, XmlToolSyntax)
    return syntax


def props(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


TEXT = {"type": "string"}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
FORMS: dict[str, dict[str, Any]] = {
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


def judged(value: Any, schema: dict[str, Any]) -> bool:
    """`fits`, for schemas with a list of types too."""
    properties = {
        key: {"anyOf": [{"type": one} for one in part["type"]]}
        if isinstance(part.get("type"), list)
        else part
        for key, part in schema["properties"].items()
    }
    return fits(value, {**schema, "properties": properties})


@by_style
@pytest.mark.parametrize("name", FORMS)
def test_forced_calls_come_back_and_fit(style: str, name: str) -> None:
    schema = FORMS[name]
    request = ChatRequest(ASK, (tool("find", schema),), tool_choice="find")
    seen = set()
    for seed in range(4):
        answer = Answer(tokenizers()[style], request, seed, most=600)
        read = answer.read()
        assert answer.ended, answer.text
        assert (read.text, read.invalid_tool_calls) == ("", ()), answer.text
        (call,) = read.tool_calls
        assert call.name == "find"
        assert judged(call.arguments, schema), (call.arguments, answer.text)
        seen.add(json.dumps(call.arguments))
    assert len(seen) > 1 or name == "nothing"


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


def taken(style: str, schema: Any, value: Any) -> tuple[bool, Any]:
    """Whether a model that means this value may write it, and what is read of its call."""
    tokenizer, syntax = tokenizers()[style], syntax_of(style)
    parameters = {
        **props(**{"the key": schema} if "glm" in style else {"key": schema}),
        "$defs": {"point": POINT},
    }
    (key,) = parameters["properties"]
    offered = tool("find", parameters)
    likes = syntax.parser.start + syntax.inside("find", [(key, syntax.write(value))]) + syntax.parser.end
    request = ChatRequest(ASK, (offered,), tool_choice="find")
    answer = Answer(
        tokenizer, request, 0, most=len(tokenizer.encode(likes, add_special_tokens=False)), likes=likes
    )
    found = answer.read().tool_calls
    return answer.text == likes, found[0].arguments.get(key) if found else None


@by_style
@pytest.mark.parametrize("meant", MEANT)
def test_what_a_model_means_it_may_write_and_is_read(style: str, meant: str) -> None:
    schema, value = MEANT[meant]
    if meant == "an optional string that is not there" and "glm" in style:
        value = "null"  # its parser knows no other value in a string's place
    written, read = taken(style, schema, value)
    assert written
    assert read == value
    assert type(read) is type(value) or value == 3


@by_style
@pytest.mark.parametrize(
    "text", [" edged", "edged\n", "</parameter>", "a</arg_value>b", "x</tool_call>", "null", "None"]
)
def test_a_text_that_would_not_come_back_cannot_be_written(style: str, text: str) -> None:
    written, read = taken(style, TEXT, text)
    assert not written or read == text


@by_style
def test_a_call_is_written_as_the_template_renders_it(style: str) -> None:
    tokenizer = tokenizers()[style]
    template = ChatTemplate(tokenizer)
    schema = props(
        name={"type": "string", "maxLength": 9},
        ok={"type": "boolean"},
        xs={"type": "array", "items": POINT, "maxItems": 2},
    )
    request = ChatRequest(
        ASK, (tool("find", schema), tool("stop", SCHEMAS["nothing"])), tool_choice="required"
    )
    for seed in range(4):
        answer = Answer(tokenizer, request, seed, most=900)
        calls = answer.read().tool_calls
        assert calls
        said = Message("assistant", "", tool_calls=calls)
        again = template.render(ChatRequest((*ASK, said), request.tools), generation_prompt=False)
        assert answer.ended
        # What stands before the first call is the template's and not the call's.
        assert again.endswith(answer.text + "<|im_end|>\n")


@by_style
def test_several_calls_follow_one_another_where_they_may(style: str) -> None:
    request = ChatRequest(ASK, (tool("a", props(n={"type": "integer"})), tool("b", SCHEMAS["nothing"])))
    counts = {
        parallel: {
            len(
                Answer(
                    tokenizers()[style],
                    ChatRequest(ASK, request.tools, tool_choice="required", parallel_tool_calls=parallel),
                    seed,
                    most=900,
                )
                .read()
                .tool_calls
            )
            for seed in range(6)
        }
        for parallel in (True, False)
    }
    assert counts[False] == {1}
    assert max(counts[True]) > 1


def test_what_cannot_be_held_is_refused_by_name_and_left_free_where_nothing_is_forced() -> None:
    tokenizer = tokenizers()["qwen3_coder"]
    dated = tool("book", props(day={"type": "string", "format": "date"}))
    with pytest.raises(InvalidRequest, match=r"'book' cannot be forced.*'day'"):
        Answer(tokenizer, ChatRequest(ASK, (dated,), tool_choice="book"), 0)
    either = tool("pick", {"anyOf": [POINT, SCHEMAS["nothing"]], "type": "object"})
    with pytest.raises(InvalidRequest, match=r"'pick' cannot be forced.*anyOf"):
        Answer(tokenizer, ChatRequest(ASK, (either,), tool_choice="required"), 0)
    syntax = syntax_of("qwen3_coder")
    call = syntax.parser.start + syntax.inside("book", [("day", "2024-01-01")]) + syntax.parser.end
    request = ChatRequest(ASK, (dated,), parallel_tool_calls=False)
    (said,) = Answer(tokenizer, request, 0, likes=call).read().tool_calls
    assert said.arguments == {"day": "2024-01-01"}


def test_a_template_that_quotes_its_strings_has_no_such_syntax() -> None:
    quoted = with_tools(qwen3_coder, QWEN3_CODER.replace(VALUE, "(v | tojson)"))
    assert find_tool_syntax(ChatTemplate(quoted), model_parser(quoted)) is None


# What parsers are told


def test_a_parameter_of_one_type_beside_null_says_so() -> None:
    given = tool(
        "f",
        {
            "type": "object",
            "properties": {
                "plain": {"type": "integer"},
                "optional": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "listed": {"enum": ["a", "b"]},
                "referred": {"$ref": "#/$defs/point"},
                "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                "any": {},
                "loop": {"$ref": "#/properties/loop"},
            },
            "$defs": {"point": POINT},
        },
    )
    before = json.dumps(given)
    found = plainly_typed(given)["function"]["parameters"]["properties"]
    types = {key: schema.get("type") for key, schema in found.items()}
    assert types == {
        "plain": "integer",
        "optional": "integer",
        "listed": "string",
        "referred": "object",
        "either": None,
        "any": None,
        "loop": None,
    }
    assert json.dumps(given) == before
    assert plainly_typed({"name": "f"}) == {"name": "f"}


def test_types_of_a_schema() -> None:
    def names(schema: Any) -> list[str]:
        return [found.name for found in schema_types(schema, {})]

    assert names({"const": 1}) == ["enum"]
    assert names({"oneOf": [{"type": "string"}, {"enum": [1]}]}) == ["string", "enum"]
    assert names({"type": ["array", "null"]}) == ["array", "null"]
    assert names({"allOf": [POINT]}) == ["object"]
    assert len(names(True)) == 7


@pytest.mark.parametrize("value", [12, None, "12"])
def test_a_free_call_is_read_by_the_type_of_an_optional_parameter(value: Any) -> None:
    tokenizer, syntax = tokenizers()["qwen3_coder"], syntax_of("qwen3_coder")
    kind = "string" if isinstance(value, str) else "integer"
    optional = {"anyOf": [{"type": kind}, {"type": "null"}]}
    calls = parser_for(tokenizer, ChatRequest(ASK, (tool("f", props(key=optional)),)))
    reader = Detokenizer(tokenizer, calls=calls)
    text = syntax.parser.start + syntax.inside("f", [("key", syntax.write(value))]) + syntax.parser.end
    deltas = [reader.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    read: list[ToolCall] = [call for delta in [*deltas, reader.finish()] for call in delta.tool_calls]
    assert [call.arguments for call in read] == [{"key": value}]


@pytest.mark.model
def test_a_whole_engine_forces_them_in_a_batch(tmp_path: Path) -> None:
    """mlx-lm itself recognises this template, and chooses the parser."""
    folder = tmp_path / "model"
    tiny_models.write(folder, tiny_models.LLAMA, seed=7)
    settings = folder / "tokenizer_config.json"
    template = str(tokenizers()["qwen3_coder"].chat_template)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    with AgentMemory(model=str(folder), cache_dir=None, memory_budget_mb=64) as memory:

        def one(seed: int) -> None:
            schema = FORMS[("texts", "booleans", "array", "listed")[seed % 4]]
            sampling = SamplingParams(max_tokens=400, temperature=1.0, seed=seed)
            result = memory.chat(ChatRequest(ASK, (tool("f", schema),), sampling, tool_choice="f"))
            assert result.report.finish_reason == "tool_calls"
            (call,) = result.tool_calls
            assert judged(call.arguments, schema), call

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(24)))
