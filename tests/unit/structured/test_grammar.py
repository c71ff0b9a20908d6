"""Constrained answers: whatever a model prefers, what it writes is valid."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from mlx_lm.tool_parsers import qwen3_coder
from support import made_tokenizers as made
from support.constrained_answers import ASK, Answer, grammars_of
from support.json_schemas import SCHEMAS, fits, tool
from support.tool_templates import with_tools

from agent_memory_core import ChatRequest, InvalidRequest, Message, ToolCall
from agent_memory_core.structured.grammar import MAX_GRAMMARS, Grammars
from agent_memory_core.structured.mask import Ban
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.token_text import Prompt

TOOLS = (tool("add", SCHEMAS["array"]), tool("find", SCHEMAS["optional"]), tool("stop", SCHEMAS["nothing"]))
PARAMETERS = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
by_tokenizer = pytest.mark.parametrize(
    "tokenizer", [made.tiny_chat, made.thinks, made.llama3, made.metaspace]
)


# Schemas


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_walk_through_the_grammar_fits_the_schema(schema: dict[str, Any]) -> None:
    for seed in range(6):
        answer = Answer(made.tiny_chat(), ChatRequest(ASK, response_schema=schema), seed)
        assert answer.ended
        value = json.loads(answer.text)
        assert fits(value, schema), value
        # Escapes and numbers with a fraction or an exponent can be written in several ways.
        if not set(answer.text.lower()) & set("\\.e"):
            assert answer.text == json.dumps(value, ensure_ascii=False)


@by_tokenizer
def test_every_kind_of_tokenizer_can_be_held_to_a_schema(tokenizer: Any) -> None:
    answer = Answer(tokenizer(), ChatRequest(ASK, response_schema=SCHEMAS["nested"]), 1, likes="</think>")
    assert answer.ended
    assert fits(json.loads(answer.text.split("</think>")[-1]), SCHEMAS["nested"])


@pytest.mark.parametrize("schema", [{}, {"type": "object"}])
def test_an_empty_schema_is_any_object(schema: dict[str, Any]) -> None:
    likes = '{"a": [1, {"b": null}], "c": "d"}'
    request = ChatRequest(ASK, response_schema=schema)
    length = len(made.tiny_chat().encode(likes, add_special_tokens=False))
    assert Answer(made.tiny_chat(), request, 0, most=length, likes=likes).text == likes
    assert Answer(made.tiny_chat(), request, 0, most=1, likes="[1]").text == "{"


def test_the_schema_that_cannot_be_compiled_is_named() -> None:
    grammars = grammars_of(made.tiny_chat())

    def refusal(**wanted: Any) -> str:
        with pytest.raises(InvalidRequest) as caught:
            grammars.processors(ChatRequest(ASK, **wanted), Prompt((1,), "", 0, None))
        return str(caught.value)

    unique = {"type": "object", "properties": {"xs": {"type": "array", "uniqueItems": True}}}
    assert "uniqueItems" in refusal(response_schema=unique)
    assert "'bad'" in refusal(tools=(*TOOLS, tool("bad", unique)), tool_choice="required")
    assert "strin" in refusal(response_schema={"type": "strin"})
    assert "JSON" in refusal(response_schema={"enum": [object()]})
    assert "\n" not in refusal(response_schema=unique)


def test_without_llguidance_only_requests_that_need_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars, prompt = Grammars(made.tiny_chat(), ChatTemplate(made.tiny_chat())), Prompt((1,), "", 0, None)
    assert grammars.processors(ChatRequest(ASK, TOOLS), prompt) == []
    assert len(grammars.processors(ChatRequest(ASK, TOOLS, tool_choice="none"), prompt)) == 1
    with pytest.raises(InvalidRequest, match=r"agent-memory-mlx\[grammar\]"):
        grammars.processors(ChatRequest(ASK, response_schema={}), prompt)


def test_equal_grammars_are_compiled_once() -> None:
    grammars = Grammars(made.tiny_chat(), ChatTemplate(made.tiny_chat()))
    first = grammars.grammar(ChatRequest(ASK, response_schema=SCHEMAS["enum"]), "")
    assert grammars.grammar(ChatRequest(ASK, response_schema=dict(SCHEMAS["enum"])), "") is first
    for n in range(MAX_GRAMMARS):
        grammars.grammar(ChatRequest(ASK, response_schema={"const": n}), "")
    assert grammars.grammar(ChatRequest(ASK, response_schema=SCHEMAS["enum"]), "") is not first


# Calls


@by_tokenizer
@pytest.mark.parametrize("choice", ["required", "add"])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_read_as_calls_whose_arguments_fit(
    tokenizer: Any, choice: str, parallel: bool
) -> None:
    request = ChatRequest(ASK, TOOLS, tool_choice=choice, parallel_tool_calls=parallel)
    counts = set()
    for seed in range(6):
        answer = Answer(tokenizer(), request, seed, likes="</think>")
        read = answer.read()
        assert answer.ended
        assert read.text == ""
        assert read.invalid_tool_calls == ()
        assert all(fits(call.arguments, PARAMETERS[call.name]) for call in read.tool_calls)
        assert choice == "required" or {call.name for call in read.tool_calls} == {choice}
        counts.add(len(read.tool_calls))
    assert counts == {1} if choice == "add" or not parallel else max(counts) > 1


def test_a_syntax_that_cannot_be_learnt_is_refused() -> None:
    tokenizer = with_tools(qwen3_coder, "'<tool_call>' ~ c.function.name ~ '</tool_call>'")
    with pytest.raises(InvalidRequest, match="cannot be forced"):
        Answer(tokenizer, ChatRequest(ASK, TOOLS, tool_choice="required"), 0)


def test_tools_beside_a_schema_may_be_called_instead() -> None:
    request = ChatRequest(ASK, TOOLS, response_schema=SCHEMAS["string"])
    called = Answer(made.tiny_chat(), request, 0, likes="<tool_call>").read()
    answered = Answer(made.tiny_chat(), request, 0, likes="{").read()
    assert called.tool_calls
    assert called.text == ""
    assert fits(json.loads(answered.text), SCHEMAS["string"])


@by_tokenizer
def test_one_call_at_most_may_follow_free_text(tokenizer: Any) -> None:
    request = ChatRequest(ASK, TOOLS, parallel_tool_calls=False)
    likes = (
        "</think>" * (tokenizer is made.thinks)
        + 'Well. <tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    )
    read = Answer(tokenizer(), request, 0, likes=likes).read()
    assert read.text.strip() == "Well."
    assert [call.name for call in read.tool_calls] == ["stop"]


def test_where_no_tool_may_be_called_no_call_can_begin() -> None:
    request = ChatRequest(ASK, TOOLS, tool_choice="none")
    (ban,) = grammars_of(made.tiny_chat()).processors(request, Prompt((1,), "", 0, None))
    call = made.tiny_chat().convert_tokens_to_ids("<tool_call>")
    assert ban == Ban(call), "one token of the vocabulary needs no grammar"
    spelled = Answer(made.llama3(), request, 0, most=40, likes="a<tool_call>")
    assert spelled.text.startswith("a<tool_call")
    assert "<tool_call>" not in spelled.text


def test_where_no_tool_is_offered_no_call_can_begin() -> None:
    prompt = Prompt((1,), "", 0, None)
    call = made.tiny_chat().convert_tokens_to_ids("<tool_call>")
    history = (*ASK, Message("assistant", "", tool_calls=(ToolCall("add", {"x": 1}, "1"),)), *ASK)
    for tokenizer in (made.tiny_chat(), made.llama3()):
        assert grammars_of(tokenizer).processors(ChatRequest(ASK), prompt) == [], "text costs nothing"
    assert grammars_of(made.tiny_chat()).processors(ChatRequest(history), prompt) == [Ban(call)]
    assert len(grammars_of(made.llama3()).processors(ChatRequest(history), prompt)) == 1
    spelled = Answer(made.llama3(), ChatRequest(history), 0, most=40, likes="a<tool_call>")
    assert "<tool_call>" not in spelled.text


def test_a_think_block_comes_first_where_there_is_one() -> None:
    request = ChatRequest(ASK, response_schema=SCHEMAS["string"])
    thinking = Answer(made.thinks(), request, 0, likes="Let me see.</think>")
    assert thinking.prompt.text.endswith("<think>\n")
    assert thinking.read().reasoning == "Let me see."
    assert fits(json.loads(thinking.read().text), SCHEMAS["string"])
    grammars = grammars_of(made.thinks())
    may, did = (
        grammars.grammar(request, "<|im_start|>assistant\n"),
        grammars.grammar(request, "<think>\n\n</think>\n\n"),
    )
    ids = made.thinks().encode('<think>Hm.</think>\n\n{"name": "x"}', add_special_tokens=False)
    assert may.matcher.validate_tokens(ids) == len(ids)
    assert did.matcher.validate_tokens(ids) == 0
    assert did.matcher.validate_tokens(ids[-2:]) == 0
    assert did.matcher.validate_tokens(made.thinks().encode('{"name"', add_special_tokens=False)) > 0


def test_where_a_call_cannot_be_constrained_a_model_may_still_call_or_answer_as_it_likes() -> None:
    tokenizer = with_tools(qwen3_coder, "'<tool_call>' ~ c.function.name ~ '</tool_call>'")
    call = "<tool_call><function=find><parameter=name>x</parameter></function></tool_call>"
    request = ChatRequest(ASK, TOOLS, response_schema=SCHEMAS["string"])
    (called,) = Answer(tokenizer, request, 0, likes=call).read().tool_calls
    assert (called.name, called.arguments) == ("find", {"name": "x"})
    assert fits(json.loads(Answer(tokenizer, request, 0, likes="{").read().text), SCHEMAS["string"])
