"""The handler's sums are those of the answers' own reports: by lane, by run and in all."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langgraph.graph import START, MessagesState, StateGraph

from langchain_agent_memory import ChatMLXPersistent, Reuse, ReuseHandler


@pytest.fixture
def llm(tmp_path: Path) -> ChatMLXPersistent:
    return ChatMLXPersistent(model="tiny-chat", cache_dir=str(tmp_path), temperature=0, max_tokens=4)


def config(handler: ReuseHandler, thread: str = "ada") -> dict[str, Any]:
    return {"callbacks": [handler], "configurable": {"thread_id": thread}}


def counts(answers: list[AIMessage]) -> Reuse:
    usage = [answer.usage_metadata for answer in answers if answer.usage_metadata is not None]
    read = sum(u["input_token_details"]["cache_read"] for u in usage)
    prompt, output = (sum(u[name] for u in usage) for name in ("input_tokens", "output_tokens"))
    return Reuse(len(answers), read, prompt - read, output, 0)


def test_every_way_of_calling_is_counted(llm: ChatMLXPersistent) -> None:
    reuse, answers = ReuseHandler(), []
    asked = [HumanMessage("My name is Ada.")]
    answers.append(llm.invoke(asked, config(reuse)))
    chunks = list(llm.stream(asked, config(reuse)))
    answers.append(sum(chunks[1:], chunks[0]))
    answers.append(asyncio.run(llm.ainvoke(asked, config(reuse))))

    async def streamed() -> AIMessage:
        pieces = [chunk async for chunk in llm.astream(asked, config(reuse))]
        return sum(pieces[1:], pieces[0])

    answers.append(asyncio.run(streamed()))
    list(llm.stream(asked))
    llm.invoke(asked)
    assert reuse.total == counts(answers), "a call without the handler is none of its business"
    assert set(reuse.lanes) == {("ada", "")}
    assert len(reuse.runs) == 4
    assert reuse.last is not None
    assert reuse.last.session_id == "ada"
    reuse.reset()
    assert (reuse.total, reuse.lanes, dict(reuse.runs)) == (Reuse(), {}, {})


def test_a_graph_is_one_run_and_its_nodes_are_lanes(llm: ChatMLXPersistent) -> None:
    def node(name: str) -> Any:
        def act(state: MessagesState) -> dict[str, Any]:
            return {"messages": [llm.invoke([SystemMessage(f"You are {name}."), *state["messages"]])]}

        return act

    graph = StateGraph(MessagesState)
    for name in ("one", "two"):
        graph.add_node(name, node(name))
    graph.add_edge(START, "one")
    graph.add_edge("one", "two")
    app, reuse = graph.compile(), ReuseHandler()
    for _ in range(2):
        app.invoke({"messages": [HumanMessage("Hello.")]}, config(reuse))  # type: ignore[call-overload]
    assert [runs.turns for runs in reuse.runs.values()] == [2, 2]
    assert len(reuse.lanes) == 2
    assert sum(lane.new for lane in reuse.lanes.values()) == reuse.total.new


def test_a_lane_that_is_cold_twice_is_warned_of_with_the_text(
    llm: ChatMLXPersistent, caplog: pytest.LogCaptureFixture
) -> None:
    reuse, quiet = ReuseHandler(), ReuseHandler(warn=False)
    with caplog.at_level(logging.WARNING, "langchain_agent_memory"):
        for clock in ("12:00", "12:01", "12:02", "12:03"):
            asked = [SystemMessage(f"It is {clock}. You are a helpful assistant."), HumanMessage("Hello.")]
            llm.invoke(asked, {**config(reuse), "callbacks": [reuse, quiet]})
    warnings = [r.message for r in caplog.records if r.name.startswith("langchain_agent_memory")]
    assert len(warnings) == 1
    assert "session 'ada'" in warnings[0]
    assert "2. You are a helpful assistant" in warnings[0]
    assert quiet.total == reuse.total
    assert reuse.total.cold == 3
