"""Constrained answers through AgentMemory and through LangChain, and free answers at the same time."""

from __future__ import annotations

import asyncio
import functools
import json
import operator
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic.v1
import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage
from pydantic import BaseModel, Field, RootModel
from support import engine_driver, tiny_models
from support.constrained_answers import ASK
from support.json_schemas import SCHEMAS, fits, tool
from support.tool_templates import xml_tokenizers
from typing_extensions import TypedDict

from agent_memory_core import AgentMemory, ChatRequest, ChatResult, InvalidRequest, Message, SamplingParams
from langchain_agent_memory import ChatMLXPersistent

Open = Callable[..., engine_driver.Driver]
TOOLS = (tool("add", SCHEMAS["array"]), tool("find", SCHEMAS["string"]))
COUNT = {
    "type": "object",
    "properties": {"xs": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 40, "maxItems": 40}},
    "required": ["xs"],
}


def ask(text: str, new: int = 120, temperature: float = 0.0, **wanted: Any) -> ChatRequest:
    sampling = SamplingParams(max_tokens=new, temperature=temperature, seed=5)
    return ChatRequest((Message("user", text),), sampling=sampling, **wanted)


# The core


@pytest.fixture(scope="module")
def memory(llama: str) -> Iterator[AgentMemory]:
    with AgentMemory(model=llama, cache_dir=None, memory_budget_mb=64, max_batch_size=8) as opened:
        yield opened


async def test_constrained_and_free_answers_share_a_batch_and_do_not_change_each_other(
    memory: AgentMemory,
) -> None:
    requests = [
        ask("Tell me a story.", 90),
        ask("Count.", 200, response_schema=COUNT),
        ask("Tell me another one, of any kind.", 60, temperature=0.9),
        ask("Call something.", tools=TOOLS, tool_choice="add"),
        ask("Say who.", response_schema=SCHEMAS["nested"], temperature=0.9),
        ask("No tools, please.", 50, tools=TOOLS, tool_choice="none"),
    ]
    alone = [await memory.achat(request) for request in requests]
    before = memory.stats().steps
    together: list[ChatResult] = await asyncio.gather(*(memory.achat(request) for request in requests))
    assert memory.stats().steps - before < sum(len(r.token_ids) for r in together), "they decode together"
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert fits(json.loads(together[1].text), COUNT)
    assert fits(together[3].tool_calls[0].arguments, SCHEMAS["array"])
    assert fits(json.loads(together[4].text), SCHEMAS["nested"])
    assert together[5].tool_calls == ()
    assert [r.report.finish_reason for r in together][1:5] == ["stop", "length", "tool_calls", "stop"]


def test_a_constrained_turns_session_goes_on_exactly_where_it_was(llama: str, open_driver: Open) -> None:
    for wanted in ({"response_schema": COUNT}, {"tools": TOOLS, "tool_choice": "find"}):
        driver = open_driver(llama, kv_bits=None)
        first = driver.memory.chat(ask("Begin.", 300, **wanted), session="s")
        answer = Message("assistant", first.text, tool_calls=first.tool_calls)
        history = (*ask("Begin.").messages, answer, Message("user", "Go on."))
        next_turn = ChatRequest(history, wanted.get("tools", ()), SamplingParams(max_tokens=6))
        second = driver.memory.chat(next_turn, session="s")
        known = first.report.usage.total_tokens
        assert tuple(driver.prompts[-1][: known - 1]) == (*driver.prompts[0], *first.token_ids)
        assert second.report.usage.cache_read == known
        anew = open_driver(llama, kv_bits=None, cache_dir=None).memory.chat(next_turn)
        assert anew.token_ids == second.token_ids
        driver.memory.forget("s")


def test_forbidden_tools_stay_in_the_prompt_that_a_session_knows(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama, kv_bits=None)
    free = driver.memory.chat(ask("Begin. " * 30, 4, tools=TOOLS), session="s")
    barred = driver.memory.chat(ask("Begin. " * 30, 4, tools=TOOLS, tool_choice="none"), session="s")
    assert barred.report.usage.prompt_tokens == free.report.usage.prompt_tokens
    assert barred.report.usage.cache_read >= barred.report.usage.prompt_tokens - 32


def test_an_answer_cut_by_max_tokens_says_so_and_is_not_completed(memory: AgentMemory) -> None:
    cut = memory.chat(ask("Call.", 12, tools=TOOLS, tool_choice="find"))
    assert cut.report.finish_reason == "length"
    assert cut.tool_calls == ()
    assert [call.text.strip()[:8] for call in cut.invalid_tool_calls] == ['{"name":']
    half = memory.chat(ask("Count.", 30, response_schema=COUNT))
    assert half.report.finish_reason == "length"
    assert half.text.startswith('{"xs": [')


@pytest.mark.parametrize(
    ("wanted", "refusal"),
    [
        ({"tool_choice": "required"}, "without tools"),
        ({"tools": TOOLS, "tool_choice": "substract"}, r"'substract'.*'add', 'find'"),
        ({"tools": TOOLS, "tool_choice": "required", "response_schema": COUNT}, "exclude each other"),
        ({"response_schema": "a schema"}, "mapping"),
        ({"response_schema": {"not": {}}}, "response_schema: .*not"),
    ],
)
def test_a_constraint_that_cannot_be_kept_is_refused_before_any_work(
    memory: AgentMemory, wanted: dict[str, Any], refusal: str
) -> None:
    memory.load()
    before = memory.stats().prompt_tokens
    with pytest.raises(InvalidRequest, match=refusal):
        memory.chat(ask("Anything.", **wanted))
    assert memory.stats().prompt_tokens == before


@pytest.mark.parametrize("kind", ["schema", "call"])
def test_random_answers_of_a_random_model_are_all_valid(memory: AgentMemory, kind: str) -> None:
    schemas = [SCHEMAS[name] for name in ("string", "enum", "nested", "array", "optional", "ünï")]

    def one(seed: int) -> None:
        schema = schemas[seed % len(schemas)]
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
        list(pool.map(one, range(48)))


def test_calls_that_are_not_json_are_forced_in_a_batch(tmp_path: Path) -> None:
    """mlx-lm itself recognises this template, and chooses the parser."""
    folder = tmp_path / "model"
    tiny_models.write(folder, tiny_models.LLAMA, seed=7)
    settings = folder / "tokenizer_config.json"
    template = str(xml_tokenizers()["qwen3_coder"].chat_template)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    schemas = [SCHEMAS[name] for name in ("string", "array", "nested", "number")]

    def one(seed: int) -> None:
        schema = schemas[seed % len(schemas)]
        sampling = SamplingParams(max_tokens=400, temperature=1.0, seed=seed)
        result = opened.chat(ChatRequest(ASK, (tool("f", schema),), sampling, tool_choice="f"))
        assert result.report.finish_reason == "tool_calls"
        (call,) = result.tool_calls
        assert fits(call.arguments, schema), call

    with (
        AgentMemory(model=str(folder), cache_dir=None, memory_budget_mb=64) as opened,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(one, range(24)))


# LangChain


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=150)


class OldPerson(pydantic.v1.BaseModel):
    """Somebody."""

    name: str = pydantic.v1.Field(max_length=6)
    age: int = pydantic.v1.Field(ge=0, le=150)


class PersonDict(TypedDict):
    """Somebody."""

    age: int
    tall: bool


PERSON = {
    "title": "person",
    "description": "Somebody.",
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 150}},
    "required": ["age"],
}


@pytest.fixture(scope="module")
def llm(llama: str) -> Iterator[ChatMLXPersistent]:
    model = ChatMLXPersistent(
        model=llama, cache_dir=None, memory_budget_mb=64, max_tokens=300, temperature=1, seed=3
    )
    yield model
    model.memory.close()


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [Person, OldPerson, PersonDict, PERSON])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_every_kind_of_schema_is_answered_in_its_own_kind(
    llm: ChatMLXPersistent, schema: Any, method: Any
) -> None:
    kind = schema if schema in (Person, OldPerson) else dict
    asked = llm.with_structured_output(schema, method=method)
    answers = [asked.invoke("Who?"), await asked.ainvoke("Who?"), list(asked.stream("Who?"))[-1]]
    assert all(isinstance(answer, kind) for answer in answers)
    assert answers[0] == answers[1] == answers[2]
    raw = llm.with_structured_output(schema, method=method, include_raw=True).invoke("Who?")
    assert raw["parsed"] == answers[0]
    assert raw["parsing_error"] is None
    assert isinstance(raw["raw"], AIMessage)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_strict_is_accepted_and_changes_nothing(llm: ChatMLXPersistent, method: Any) -> None:
    answers = [
        llm.with_structured_output(Person, method=method, strict=strict).invoke("Who?")
        for strict in (None, True, False)
    ]
    assert isinstance(answers[0], Person)
    assert answers[0] == answers[1] == answers[2]


def test_json_mode_is_any_object(llm: ChatMLXPersistent) -> None:
    asked = llm.with_structured_output(None, method="json_mode", include_raw=True, max_tokens=40)
    raw = asked.invoke("Anything.")
    assert raw["raw"].text.startswith("{")
    assert isinstance(raw["parsed"], dict) or isinstance(raw["parsing_error"], OutputParserException)
    with pytest.raises(InvalidRequest, match="json_mode"):
        llm.with_structured_output(None)
    with pytest.raises(InvalidRequest, match="yaml"):
        llm.with_structured_output(Person, method="yaml")


LONG = {"type": "string", "minLength": 90}
CUT = {"title": "t", "type": "object", "properties": {"a": LONG}, "required": ["a"]}


class Cut(BaseModel):
    """Too long for a short answer."""

    a: str = Field(min_length=90)


def added(pieces: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The pieces of a stream, put together."""
    return functools.reduce(operator.add, pieces)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [CUT, Cut])
async def test_an_answer_that_was_cut_is_an_error_and_not_half_an_object(
    llm: ChatMLXPersistent, schema: Any, method: Any
) -> None:
    asked = llm.with_structured_output(schema, method=method, max_tokens=20)
    with pytest.raises(OutputParserException, match="max_tokens=20"):
        asked.invoke("Who?")
    with pytest.raises(OutputParserException, match="max_tokens=20"):
        list(asked.stream("Who?"))
    with pytest.raises(OutputParserException, match="max_tokens=20"):
        [piece async for piece in asked.astream("Who?")]
    both = llm.with_structured_output(schema, method=method, max_tokens=20, include_raw=True)
    asynchronously = added([piece async for piece in both.astream("Who?")])
    for raw in (both.invoke("Who?"), added(both.stream("Who?")), asynchronously):
        assert raw["parsed"] is None
        assert isinstance(raw["parsing_error"], OutputParserException)
        assert isinstance(raw["raw"], AIMessage)


def test_a_stop_string_inside_the_form_is_told_as_one(llm: ChatMLXPersistent) -> None:
    with pytest.raises(OutputParserException, match="stop string"):
        llm.with_structured_output(CUT, stop=['"a"']).invoke("Who?")


class Tree(BaseModel):
    """A tree."""

    leaf: Literal["a", "b"]
    below: list[Tree] = Field(default=[], max_length=1)


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]
    age: int = Field(ge=0, le=20)


class Pet(BaseModel):
    """A pet."""

    pet: Cat | Dog = Field(discriminator="kind")


Marks = RootModel[Annotated[list[Literal["a", "b"]], Field(min_length=1, max_length=3)]]
NOT_OBJECTS: list[dict[str, Any]] = [
    {"title": "array", "type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    {"title": "enum", "enum": ["a", "b", 3]},
    {"title": "const", "const": 3},
    {"title": "union", "anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
    {"title": "text", "type": "string", "maxLength": 5},
    {"title": "named", "$defs": {"n": {"enum": [1, 2]}}, "$ref": "#/$defs/n"},
]
OBJECTS: list[dict[str, Any]] = [
    {
        "title": "map",
        "patternProperties": {"^[ab]$": {"enum": [1]}},
        "additionalProperties": False,
        "type": "object",
    },
    {"title": "cases", "oneOf": [Cat.model_json_schema(), Dog.model_json_schema()]},
    Tree.model_json_schema(),
    Pet.model_json_schema(),
]


@pytest.mark.parametrize("schema", [*NOT_OBJECTS, *OBJECTS], ids=lambda schema: schema.get("title", "tree"))
def test_a_titled_schema_of_any_root_is_held(llm: ChatMLXPersistent, schema: dict[str, Any]) -> None:
    asked = llm.with_structured_output(schema)
    value = asked.invoke("Fill in the form.")
    assert fits(value, schema)
    assert list(asked.stream("Fill in the form."))[-1] == value
    if schema in OBJECTS:
        assert fits(llm.with_structured_output(schema, method="function_calling").invoke("Go."), schema)
    else:
        with pytest.raises(InvalidRequest, match=r"is not an object.*json_schema"):
            llm.with_structured_output(schema, method="function_calling")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [Tree, Pet, Marks])
def test_recursive_and_discriminated_classes_are_held(
    llm: ChatMLXPersistent, schema: type[BaseModel], method: Any
) -> None:
    if schema is Marks and method == "function_calling":
        with pytest.raises(InvalidRequest, match="is not an object"):
            llm.with_structured_output(schema, method=method)
        return
    for seed in range(3):
        asked = llm.with_structured_output(schema, method=method, seed=seed)
        assert isinstance(asked.invoke("Fill in the form."), schema)


FUNCTION = {"name": "person", "description": "Somebody.", "parameters": PERSON}


@pytest.mark.parametrize(
    "schema",
    [
        FUNCTION,
        {"type": "function", "function": FUNCTION},
        {"name": "person", "input_schema": PERSON},
        {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
    ],
)
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_function_schema_stands_for_its_parameters(
    llm: ChatMLXPersistent, schema: dict[str, Any], method: Any
) -> None:
    assert fits(llm.with_structured_output(schema, method=method).invoke("Who?"), PERSON)


@pytest.mark.parametrize(
    "choice", ["any", "required", True, "find", {"type": "function", "function": {"name": "find"}}]
)
def test_a_choice_of_tools_is_kept(llm: ChatMLXPersistent, choice: Any) -> None:
    answer = llm.bind_tools(list(TOOLS), tool_choice=choice, parallel_tool_calls=False).invoke("Do it.")
    (call,) = answer.tool_calls
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert answer.text == ""
    if choice in ("any", "required", True):
        assert fits(
            call["args"], dict(zip(("add", "find"), map(_parameters, TOOLS), strict=True))[call["name"]]
        )
    else:
        assert call["name"] == "find"
    assert llm.bind_tools(list(TOOLS), tool_choice="none", max_tokens=30).invoke("Do it.").tool_calls == []


def test_an_agents_answer_has_its_response_format(llm: ChatMLXPersistent) -> None:
    assert llm.profile is not None
    assert llm.profile["structured_output"]
    for response_format in (Person, ProviderStrategy(Person)):
        agent = create_agent(llm, [], response_format=response_format)
        state = agent.invoke({"messages": [HumanMessage("Who?")]})
        assert isinstance(state["structured_response"], Person)
    either = llm.bind_tools(list(TOOLS), **ProviderStrategy(Person).to_model_kwargs()).invoke("Who?")
    assert either.tool_calls or isinstance(Person.model_validate_json(either.text), Person)


def _parameters(offered: dict[str, Any]) -> dict[str, Any]:
    return dict(offered["function"]["parameters"])
