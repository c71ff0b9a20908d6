"""A session as a LangGraph graph says what the service says, and is kept by LangGraph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from support.cases import some_of
from support.people import people

from agent_memory_core import AgentMemory, InvalidRequest
from agent_memory_core.coordination import CoordinationService
from agent_memory_core.coordination.spec import Topology
from langchain_agent_memory import ChatMLXPersistent
from langchain_agent_memory.coordination_graph import as_graph

TOPOLOGIES = get_args(Topology)
TALK: dict[str, Any] = {
    "agents": people("ann", "bob", "cyd"),
    "initial_prompt": "Three friends plan a trip.",
    "per_agent_prompts": {"bob": "You would rather stay at home."},
    "max_turns": 6,
}


@pytest.fixture
def llm() -> Iterator[ChatMLXPersistent]:
    model = ChatMLXPersistent(cache_dir=None, memory_budget_mb=64, max_batch_size=8)
    yield model
    model.memory.close()


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def transcript(state: dict[str, Any]) -> list[tuple[str, str, int]]:
    return [(event["sender_id"], event["content"], event["turn"]) for event in state["events"]]


@pytest.mark.parametrize("topology", some_of(TOPOLOGIES, ["turn_by_turn", "broadcast"]))
def test_the_graph_says_what_the_service_says(llm: ChatMLXPersistent, topology: str) -> None:
    sampling = {"max_tokens": 10, "temperature": 0.0 if topology == "broadcast" else 0.9}
    spec = {**TALK, "topology": topology, "seed": 5, "sampling": sampling, "debate_format": "structured"}
    state = as_graph(spec, llm).invoke({}, config("trip"))
    # What was stored is rounded, so both begin with an empty memory.
    with AgentMemory(cache_dir=None, memory_budget_mb=64) as memory, CoordinationService(memory) as service:
        sid = service.create_session(spec).session_id
        while service.get(sid).is_active:
            service.round(sid)
        said = [(event.sender_id, event.content, event.turn) for event in service.events(sid)]
    assert transcript(state) == said


def test_a_thread_is_interrupted_told_something_and_goes_on(llm: ChatMLXPersistent) -> None:
    spec = {**TALK, "sampling": {"max_tokens": 24}}
    graph = as_graph(spec, llm, checkpointer=InMemorySaver(), interrupt_before=["speak"])
    graph.invoke({}, config("trip"))
    graph.invoke(None, config("trip"))
    graph.update_state(
        config("trip"), {"events": [{"sender_id": "guide", "content": "The boat leaves at nine."}]}
    )
    state = graph.get_state(config("trip")).values
    assert [event["sender_id"] for event in state["events"]] == ["system", "ann", "guide"]
    while graph.get_state(config("trip")).next:
        state = graph.invoke(None, config("trip"))
    assert [once["agent_id"] for once in state["spoken"]] == ["ann", "bob", "cyd"] * 2
    assert [event["seq"] for event in state["events"]] == list(range(8))
    assert {info.session_id for info in llm.memory.sessions()} == {
        f"coord/trip/{name}" for name in ("ann", "bob", "cyd")
    }


def test_a_graph_needs_an_end(llm: ChatMLXPersistent) -> None:
    with pytest.raises(InvalidRequest, match="needs to know when it ends"):
        as_graph({**TALK, "max_turns": 0}, llm)


async def test_coroutines_run_it_too(llm: ChatMLXPersistent, tmp_path: Path) -> None:
    state = await as_graph({**TALK, "max_turns": 2, "sampling": {"max_tokens": 8}}, llm).ainvoke(
        {}, config("a")
    )
    assert len(state["spoken"]) == 2
