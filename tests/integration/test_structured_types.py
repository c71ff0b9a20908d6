"""Answers of any Python type, and values that do not fit their class, in LangChain."""

from __future__ import annotations

import asyncio
import datetime
import enum
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, Optional, Union

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel, Field, TypeAdapter, field_validator
from typing_extensions import TypeAliasType, TypedDict

from agent_memory_core import InvalidRequest
from langchain_agent_memory import ChatMLXPersistent


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Place(TypedDict):
    """A place."""

    number: Literal[1, 2]


@dataclass
class Point:
    """A point."""

    x: Literal[1, 2]
    y: bool


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2


class Pair(NamedTuple):
    first: bool
    second: Literal["a", "b"]


class Box(BaseModel):
    """A box."""

    open: bool


Mark = TypeAliasType("Mark", Literal["a", "b"])


class Never(BaseModel):
    """A class that no value of its schema fits."""

    number: Literal[1, 2]

    @field_validator("number")
    @classmethod
    def refuse(cls, value: int) -> int:
        raise ValueError("no number is right")


class Long(BaseModel):
    """Something that takes many tokens."""

    text: str = Field(min_length=60, max_length=90)


class Longer(BaseModel):
    """Something that takes more tokens."""

    words: list[Long] = Field(min_length=3, max_length=4)


TYPES: list[Any] = [
    Place,
    Point,
    Colour,
    bool,
    list[Literal[1, 2]],
    tuple[Literal[1], Literal["a", "b"]],
    Literal["yes", "no"],
    Literal["yes"] | Literal[1, 2],
    bool | None,
    dict[Literal["a", "b"], bool],
    dict[Colour, bool],
    list[Point],
    Size,
    Pair,
    Mark,
    type(None),
    Optional[Colour],  # noqa: UP045 - written as people write it
    Union[Place, Point],  # noqa: UP007
    Box | None,
    Box | Pair,
    list[Box],
    dict[Literal["a", "b"], Box],
    Annotated[int, Field(ge=0, le=9)],
    uuid.UUID,
    datetime.date,
]
"""Types of which every value is short."""

UNBOUNDED: list[Any] = [int, float, str, list[int], list[str], dict[str, int], tuple[int, ...], int | str]
NOT_JSON: list[Any] = [BaseModel, Callable, type, Exception, list["NobodyKnows"], "Box", 3, []]  # type: ignore[name-defined] # noqa: F821


@pytest.fixture(scope="module")
def llm(llama: str) -> Iterator[ChatMLXPersistent]:
    model = ChatMLXPersistent(model=llama, cache_dir=None, temperature=1.0, seed=4, max_tokens=200)
    yield model
    model.memory.close()


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_type_is_answered_with_a_value_of_it_or_refused_by_name(
    llm: ChatMLXPersistent, kind: Any, method: Any
) -> None:
    try:
        structured = llm.with_structured_output(kind, method=method)
    except InvalidRequest as refused:
        told = str(refused)
    else:
        told = ""
        value = structured.invoke("Choose.")
        assert list(structured.stream("Choose."))[-1] == value
    if told:
        assert method == "function_calling"
        assert "json_schema" in told
        return
    if kind in (Place, Point):  # LangChain answers these as dictionaries
        assert TypeAdapter(kind).dump_python(TypeAdapter(kind).validate_python(value)) == value
    else:
        assert TypeAdapter(kind).validate_python(value) == value


@pytest.mark.parametrize("kind", UNBOUNDED, ids=str)
def test_a_type_without_an_end_is_answered_with_a_value_of_it_or_says_that_it_was_cut(
    llm: ChatMLXPersistent, kind: Any
) -> None:
    structured = llm.with_structured_output(kind, include_raw=True, max_tokens=40)
    found: Any = structured.invoke("Choose.")
    if found["raw"].response_metadata["finish_reason"] == "length":
        assert found["parsed"] is None
        assert "max_tokens=40" in str(found["parsing_error"])
    else:
        assert TypeAdapter(kind).validate_python(found["parsed"], strict=True) == found["parsed"]


@pytest.mark.parametrize("kind", [set[Literal[1, 2]], Decimal, bytes], ids=str)
def test_a_type_that_no_grammar_can_hold_is_refused_before_any_work(
    llm: ChatMLXPersistent, kind: Any
) -> None:
    before = llm.memory.stats().prompt_tokens
    with pytest.raises(InvalidRequest, match="answers cannot be held to response_schema"):
        llm.with_structured_output(kind).invoke("Choose.")
    assert llm.memory.stats().prompt_tokens == before


@pytest.mark.parametrize("kind", NOT_JSON, ids=str)
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_what_is_no_type_of_json_is_refused_by_name(llm: ChatMLXPersistent, kind: Any, method: Any) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(f"schema={kind!r} is not valid")):
        llm.with_structured_output(kind, method=method)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_value_that_its_class_refuses_is_a_parsing_error(llm: ChatMLXPersistent, method: Any) -> None:
    structured = llm.with_structured_output(Never, method=method)
    with pytest.raises(OutputParserException, match="no number is right"):
        structured.invoke("Choose.")
    both = llm.with_structured_output(Never, method=method, include_raw=True)
    pieces = list(both.stream("Choose."))
    for whole in (both.invoke("Choose."), {key: value for piece in pieces for key, value in piece.items()}):
        assert whole["raw"] is not None
        assert whole["parsed"] is None
        assert "no number is right" in str(whole["parsing_error"])


def look_up(word: str) -> str:
    """Look up a word."""
    return word


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "invoke": lambda agent, asked: agent.invoke(asked),
    "ainvoke": lambda agent, asked: asyncio.run(agent.ainvoke(asked)),
    "messages": lambda agent, asked: list(agent.stream(asked, stream_mode="messages")),
    "updates": lambda agent, asked: list(agent.stream(asked, stream_mode="updates")),
    "astream": lambda agent, asked: asyncio.run(drained(agent.astream(asked, stream_mode="messages"))),
}


async def drained(pieces: AsyncIterator[Any]) -> list[Any]:
    return [piece async for piece in pieces]


@pytest.mark.parametrize(
    ("form", "tools"),
    [
        (ProviderStrategy(Long), []),
        (ToolStrategy(Long), []),
        (ToolStrategy(Long | Longer), []),
        (ToolStrategy(Longer), [look_up]),
        (ToolStrategy(Long, handle_errors="Again."), []),
        (Long, []),
    ],
    ids=["provider", "tool", "one of two", "beside a tool", "errors handled", "chosen by LangChain"],
)
@pytest.mark.parametrize("way", WAYS)
def test_an_agents_answer_that_was_cut_says_so(
    llm: ChatMLXPersistent, form: Any, tools: list[Any], way: str
) -> None:
    agent = create_agent(llm.model_copy(update={"max_tokens": 12}), tools, response_format=form)
    with pytest.raises(OutputParserException, match=r"max_tokens=12.*raise max_tokens"):
        WAYS[way](agent, {"messages": [("user", "Write.")]})


def test_what_a_graph_reads_itself_stays_its_own(llm: ChatMLXPersistent) -> None:
    """With ``include_raw`` a cut answer is no error, inside a graph neither."""
    structured = llm.with_structured_output(Long, include_raw=True, max_tokens=12)

    def node(state: MessagesState) -> dict[str, Any]:
        found: Any = structured.invoke(state["messages"])
        return {"messages": [f"{found['parsed']}: {found['parsing_error']}"]}

    graph = StateGraph(MessagesState).add_node("node", node).add_edge(START, "node").compile()
    state = graph.invoke({"messages": [HumanMessage("Write.")]})
    assert "None: the answer ended at max_tokens=12" in state["messages"][-1].text
