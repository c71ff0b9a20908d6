"""Forms as masks: whatever a model prefers, what it writes is valid."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import glm47, mistral, qwen3_coder
from support import made_tokenizers as made, tiny_models
from support.json_forms import SCHEMAS, fits, tool

from agent_memory_core import AgentMemory, ChatRequest, Delta, InvalidRequest, Message, SamplingParams
from agent_memory_core.structured.grammar import MAX_GRAMMARS, Grammars, find_tool_syntax
from agent_memory_core.structured.mask import Ban, Mask
from agent_memory_core.structured.tool_calls import model_parser, parser_for
from agent_memory_core.structured.tool_syntax import JsonToolSyntax
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.detokenizer import Detokenizer, starts_in_reasoning
from agent_memory_core.text.token_text import Prompt

ASK = (Message("user", "ask"),)
TOOLS = (tool("add", SCHEMAS["array"]), tool("find", SCHEMAS["optional"]), tool("stop", SCHEMAS["nothing"]))
PARAMETERS = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
by_schema = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
by_tokenizer = pytest.mark.parametrize(
    "tokenizer", [made.tiny_chat, made.thinks, made.llama3, made.metaspace]
)


class Answer:
    """An answer whose every token is drawn at random from those its processors leave."""

    def __init__(
        self, tokenizer: TokenizerWrapper, request: ChatRequest, seed: int, most: int = 400, likes: str = ""
    ) -> None:
        template = ChatTemplate(tokenizer)
        self.prompt = template.encode(request)
        self.tokenizer, self.request = tokenizer, request
        self.processors = Grammars(tokenizer, template).processors(request, self.prompt)
        self.ids: list[int] = []
        rng = random.Random(seed)
        liked = tokenizer.encode(likes, add_special_tokens=False)
        while len(self.ids) < most:
            allowed = self.allowed()
            wanted = liked[len(self.ids)] if len(self.ids) < len(liked) else None
            token = wanted if wanted in allowed else rng.choice(allowed)
            if token in tokenizer.eos_token_ids:
                self.ended = True
                return
            self.ids.append(token)
        self.ended = False

    def allowed(self) -> list[int]:
        ids = mx.array([*self.prompt.token_ids, *self.ids])
        logits = mx.zeros((1, len(self.tokenizer) + 50))
        for processor in self.processors:
            logits = processor(ids, logits)
        values: list[float] = logits[0].tolist()  # type: ignore[assignment]
        if self.processors and isinstance(self.processors[0], Mask):
            assert set(values[len(self.tokenizer) :]) == {-float("inf")}, "beyond the vocabulary"
        return [i for i, value in enumerate(values[: len(self.tokenizer)]) if value == 0]

    @property
    def text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=False))

    def read(self) -> Delta:
        """The answer as the engine reads it."""
        prompt = starts_in_reasoning(self.tokenizer, self.prompt.text)
        reader = Detokenizer(
            self.tokenizer, calls=parser_for(self.tokenizer, self.request), in_reasoning=prompt
        )
        parts = [*(reader.push(token) for token in self.ids), reader.finish()]
        return Delta(
            "".join(p.text for p in parts),
            "".join(p.reasoning for p in parts),
            tuple(call for p in parts for call in p.tool_calls),
            tuple(call for p in parts for call in p.invalid_tool_calls),
        )


def grammars(tokenizer: TokenizerWrapper) -> Grammars:
    return Grammars(tokenizer, ChatTemplate(tokenizer))


# Schemas


@by_schema
@pytest.mark.parametrize("seed", range(4))
def test_every_walk_through_the_masks_fits_the_schema(schema: dict[str, Any], seed: int) -> None:
    answer = Answer(made.tiny_chat(), ChatRequest(ASK, response_schema=schema), seed)
    assert answer.ended
    value = json.loads(answer.text)
    assert fits(value, schema), value
    if "\\" not in answer.text:
        assert (
            answer.text == json.dumps(value, ensure_ascii=False)
            or "." in answer.text
            or "e" in answer.text.lower()
        )


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


def test_an_object_has_the_properties_it_names_unless_its_schema_says_more() -> None:
    named = {"type": "object", "properties": {"a": {"type": "integer"}}}
    point = {"type": "object", "properties": {"y": {"type": "integer"}}, "required": ["y"]}
    both = {"$defs": {"p": point}, "allOf": [{"$ref": "#/$defs/p"}, named]}
    extra, several = '{"a": 1, "z"', '{"y": 1, "a": 2}'
    held, tokenizer = grammars(made.tiny_chat()), made.tiny_chat()

    def takes(schema: dict[str, Any], text: str) -> bool:
        ids = tokenizer.encode(text, add_special_tokens=False)
        matcher = held.grammar(ChatRequest(ASK, response_schema=schema), "").matcher
        return matcher.validate_tokens(ids) == len(ids)

    assert not takes(named, extra)
    assert not takes({"anyOf": [named, {"type": "array", "items": named}]}, extra)
    assert takes(named | {"additionalProperties": True}, extra)
    assert takes({"type": "object"}, extra)
    assert takes(both, several)


def test_a_mask_leaves_what_the_matcher_takes_and_always_something() -> None:
    schema = SCHEMAS["nested"]
    tokenizer = made.tiny_chat()
    answer = Answer(tokenizer, ChatRequest(ASK, response_schema=schema), 2)
    begun = grammars(tokenizer).grammar(answer.request, answer.prompt.text)
    mask, matcher = begun.mask(0), begun.matcher.deep_copy()
    for at, token in enumerate(answer.ids):
        left = mask(mx.array(answer.ids[:at]), mx.zeros((1, len(tokenizer))))
        values: list[float] = left[0].tolist()  # type: ignore[assignment]
        allowed = [i for i, value in enumerate(values) if value == 0]
        # Where the next letters are certain only the tokenizer's own spelling of them is left.
        assert allowed
        assert all(matcher.validate_tokens([i]) for i in allowed)
        assert matcher.consume_token(token)


def test_a_token_is_read_once_and_a_complete_answer_ends() -> None:
    answer = Answer(made.tiny_chat(), ChatRequest(ASK, response_schema=SCHEMAS["string"]), 3)
    (eos,) = answer.tokenizer.eos_token_ids
    for _ in range(2):
        assert answer.allowed() == [eos]
    answer.ids += [eos, eos]
    assert answer.allowed() == [eos], "a batch asks one step beyond the end"


def test_what_cannot_be_compiled_is_named() -> None:
    held = grammars(made.tiny_chat())

    def said(**form: Any) -> str:
        with pytest.raises(InvalidRequest) as caught:
            held.processors(ChatRequest(ASK, **form), Prompt((1,), "", 0, None))
        return str(caught.value)

    unique = {"type": "object", "properties": {"xs": {"type": "array", "uniqueItems": True}}}
    assert "uniqueItems" in said(response_schema=unique)
    assert "'bad'" in said(tools=(*TOOLS, tool("bad", unique)), tool_choice="required")
    assert "strin" in said(response_schema={"type": "strin"})
    assert "JSON" in said(response_schema={"enum": [object()]})
    assert "\n" not in said(response_schema=unique)


def test_without_llguidance_only_requests_that_need_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    held, prompt = grammars(made.tiny_chat()), Prompt((1,), "", 0, None)
    assert held.processors(ChatRequest(ASK, TOOLS), prompt) == []
    assert len(held.processors(ChatRequest(ASK, TOOLS, tool_choice="none"), prompt)) == 1
    with pytest.raises(InvalidRequest, match=r"agent-memory-mlx\[grammar\]"):
        held.processors(ChatRequest(ASK, response_schema={}), prompt)


def test_equal_forms_are_compiled_once() -> None:
    held = grammars(made.tiny_chat())
    first = held.grammar(ChatRequest(ASK, response_schema=SCHEMAS["enum"]), "")
    assert held.grammar(ChatRequest(ASK, response_schema=dict(SCHEMAS["enum"])), "") is first
    for n in range(MAX_GRAMMARS):
        held.grammar(ChatRequest(ASK, response_schema={"const": n}), "")
    assert held.grammar(ChatRequest(ASK, response_schema=SCHEMAS["enum"]), "") is not first


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


def test_a_call_is_written_as_the_template_renders_it() -> None:
    tokenizer = made.tiny_chat()
    template = ChatTemplate(tokenizer)
    request = ChatRequest(ASK, TOOLS, tool_choice="required")
    answer = Answer(tokenizer, request, 5)
    said = Message("assistant", "", tool_calls=answer.read().tool_calls)
    again = template.render(ChatRequest((*ASK, said), TOOLS), generation_prompt=False)
    assert again == answer.prompt.text + answer.text + "<|im_end|>\n"


def test_arguments_are_an_object_also_where_a_tool_does_not_say_so() -> None:
    loose = (tool("f", {"properties": {"a": {"type": "boolean"}}, "required": ["a"]}), tool("g", {}))
    for name, fields in (("f", {"a"}), ("g", set())):
        (call,) = Answer(made.tiny_chat(), ChatRequest(ASK, loose, tool_choice=name), 0).read().tool_calls
        assert set(call.arguments) == fields


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
    banned = Answer(made.tiny_chat(), request, 0, most=3, likes="a<tool_call>")
    assert isinstance(banned.processors[0], Ban), "one token of the vocabulary needs no grammar"
    assert "<tool_call>" not in banned.text
    spelled = Answer(made.llama3(), request, 0, most=40, likes="a<tool_call>")
    assert spelled.text.startswith("a<tool_call")
    assert "<tool_call>" not in spelled.text


def test_a_think_block_comes_first_where_there_is_one() -> None:
    request = ChatRequest(ASK, response_schema=SCHEMAS["string"])
    thinking = Answer(made.thinks(), request, 0, likes="Let me see.</think>")
    assert thinking.prompt.text.endswith("<think>\n")
    assert thinking.read().reasoning == "Let me see."
    assert fits(json.loads(thinking.read().text), SCHEMAS["string"])
    held = grammars(made.thinks())
    may, did = (
        held.grammar(request, "<|im_start|>assistant\n"),
        held.grammar(request, "<think>\n\n</think>\n\n"),
    )
    ids = made.thinks().encode('<think>Hm.</think>\n\n{"name": "x"}', add_special_tokens=False)
    assert may.matcher.validate_tokens(ids) == len(ids)
    assert did.matcher.validate_tokens(ids) == 0
    assert did.matcher.validate_tokens(ids[-2:]) == 0
    assert did.matcher.validate_tokens(made.thinks().encode('{"name"', add_special_tokens=False)) > 0


CALLS = "{%- for c in m.tool_calls or [] -%}{{- CALL -}}{%- endfor -%}"


def with_tools(parser: Any, call: str, *special: str) -> TokenizerWrapper:
    """A tokenizer whose template writes calls as ``call`` does and whose model is read by ``parser``."""
    template = made.CHATML.replace("m.content", "m.content ~ calls(m)").replace(
        "{%- for m", "{%- macro calls(m) -%}" + CALLS.replace("CALL", call) + "{%- endmacro -%}{%- for m", 1
    )
    added = made.special("<|im_start|>", "<|im_end|>", *special)
    plain = made.byte_level(template, added, eos_token="<|im_end|>")
    return TokenizerWrapper(
        plain._tokenizer,
        eos_token_ids=plain.eos_token_ids,
        tool_call_start=parser.tool_call_start,
        tool_call_end=parser.tool_call_end,
        tool_parser=parser.parse_tool_call,
    )


def test_another_syntax_is_learnt_from_the_template() -> None:
    call = "'[TOOL_CALLS]' ~ c.function.name ~ '[ARGS]' ~ c.function.arguments | tojson"
    tokenizer = with_tools(mistral, call, "[TOOL_CALLS]", "[ARGS]")
    request = ChatRequest(ASK, TOOLS, tool_choice="add")
    answer = Answer(tokenizer, request, 0)
    assert answer.text.startswith("[TOOL_CALLS]add[ARGS]{")
    (said,) = answer.read().tool_calls
    assert fits(said.arguments, PARAMETERS["add"])


def test_a_syntax_that_only_reads_json_is_forced_in_json_and_others_are_refused() -> None:
    call = "'<tool_call>' ~ c.function.name ~ '</tool_call>'"
    read = with_tools(glm47, call)
    syntax = find_tool_syntax(ChatTemplate(read), model_parser(read))
    assert isinstance(syntax, JsonToolSyntax)
    assert syntax.before_name == '\n{"name": "'
    refused = with_tools(qwen3_coder, call)
    with pytest.raises(InvalidRequest, match="cannot be forced"):
        Answer(refused, ChatRequest(ASK, TOOLS, tool_choice="required"), 0)


def test_where_a_call_cannot_be_held_a_model_may_still_call_or_answer_as_it_likes() -> None:
    tokenizer = with_tools(qwen3_coder, "'<tool_call>' ~ c.function.name ~ '</tool_call>'")
    call = "<tool_call><function=find><parameter=name>x</parameter></function></tool_call>"
    request = ChatRequest(ASK, TOOLS, response_schema=SCHEMAS["string"])
    (said,) = Answer(tokenizer, request, 0, likes=call).read().tool_calls
    assert (said.name, said.arguments) == ("find", {"name": "x"})
    assert fits(json.loads(Answer(tokenizer, request, 0, likes="{").read().text), SCHEMAS["string"])


# A whole engine


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentMemory]:
    folder = tiny_models.write(tmp_path_factory.mktemp("models") / "llama", tiny_models.LLAMA, seed=7)
    with AgentMemory(model=folder, cache_dir=None, memory_budget_mb=64) as opened:
        yield opened


@pytest.mark.model
@pytest.mark.parametrize("kind", ["schema", "call"])
def test_random_answers_of_a_random_model_are_all_valid(memory: AgentMemory, kind: str) -> None:
    forms = [SCHEMAS[name] for name in ("string", "enum", "nested", "array", "optional", "ünï")]

    def one(seed: int) -> None:
        schema = forms[seed % len(forms)]
        sampling = SamplingParams(max_tokens=300, temperature=1.0, seed=seed)
        if kind == "schema":
            result = memory.chat(ChatRequest(ASK, sampling=sampling, response_schema=schema))
            assert result.report.finish_reason == "stop"
            assert fits(json.loads(result.text), schema), result.text
            return
        result = memory.chat(ChatRequest(ASK, (tool("f", schema),), sampling, tool_choice="f"))
        assert result.report.finish_reason == "tool_calls"
        (call,) = result.tool_calls
        assert fits(call.arguments, schema), call

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(100)))
