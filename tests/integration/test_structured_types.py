"""Answers of any Python type, and values that do not fit their class, in LangChain."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel, Field, TypeAdapter, field_validator
from typing_extensions import TypedDict

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
]


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
    if told:
        assert method == "function_calling"
        assert "json_schema" in told
        return
    if kind in (Place, Point):  # LangChain answers these as dictionaries
        assert TypeAdapter(kind).dump_python(TypeAdapter(kind).validate_python(value)) == value
    else:
        assert TypeAdapter(kind).validate_python(value) == value


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


@pytest.mark.parametrize("strategy", [ProviderStrategy, ToolStrategy])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_agents_answer_that_was_cut_says_so(llm: ChatMLXPersistent, strategy: Any, streamed: bool) -> None:
    agent = create_agent(llm.model_copy(update={"max_tokens": 12}), [], response_format=strategy(Long))
    asked: Any = {"messages": [("user", "Write.")]}
    with pytest.raises(OutputParserException, match="max_tokens=12"):
        list(agent.stream(asked, stream_mode="messages")) if streamed else agent.invoke(asked)


def test_what_a_graph_reads_itself_stays_its_own(llm: ChatMLXPersistent) -> None:
    """With ``include_raw`` a cut answer is no error, inside a graph neither."""
    structured = llm.with_structured_output(Long, include_raw=True, max_tokens=12)

    def node(state: MessagesState) -> dict[str, Any]:
        found: Any = structured.invoke(state["messages"])
        return {"messages": [f"{found['parsed']}: {found['parsing_error']}"]}

    graph = StateGraph(MessagesState).add_node("node", node).add_edge(START, "node").compile()
    state = graph.invoke({"messages": [HumanMessage("Write.")]})
    assert "None: the answer ended at max_tokens=12" in state["messages"][-1].text
