"""A summary replaces the older messages of a deep agent's thread, in whatever form the user's words come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from support.ecosystem import Directed, get_weather

from langchain_agent_memory.middleware import PrefixSummarization

deepagents = pytest.importorskip("deepagents", reason="make ecosystem installs it")

FORMS: dict[str, Callable[[str], Any]] = {
    "tuple": lambda text: ("user", text),
    "dict": lambda text: {"role": "user", "content": text},
    "message": lambda text: HumanMessage(text),
    "message with an id": lambda text: HumanMessage(text, id=text),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_thread_is_the_summary_and_what_follows_it(form: str, tmp_path: Path) -> None:
    llm = Directed(cache_dir=str(tmp_path), min_free_mb=0, temperature=0, max_tokens=48)
    rule = PrefixSummarization(llm, trigger=("messages", 10), keep=("messages", 4), max_summary_tokens=24)
    agent = deepagents.create_deep_agent(
        model=llm, tools=[get_weather], middleware=[rule], checkpointer=InMemorySaver()
    )
    thread: Any = {"configurable": {"thread_id": form}}
    told: list[str] = []
    for number in range(6):
        text = f"What is the weather in town {number}?"
        told.append(text)
        state = agent.invoke({"messages": [FORMS[form](text)]}, thread)
        check(state["messages"], told)
        check(agent.get_state(thread).values["messages"], told)
    assert state["messages"][0].additional_kwargs.get("lc_source") == "summarization"
    usage = next(m for m in reversed(state["messages"]) if isinstance(m, AIMessage)).usage_metadata
    assert usage is not None
    assert usage["input_token_details"]["cache_read"] > 0.8 * usage["input_tokens"]


def check(messages: list[Any], told: list[str]) -> None:
    """One summary at most, and that first; each of the last words once and in order; calls and results in pairs."""
    summaries = [i for i, m in enumerate(messages) if m.additional_kwargs.get("lc_source") == "summarization"]
    assert summaries in ([], [0])
    users = [m.text for m in messages[len(summaries) :] if isinstance(m, HumanMessage)]
    assert users == told[len(told) - len(users) :]
    assert summaries or len(users) == len(told)
    called = [call["id"] for m in messages if isinstance(m, AIMessage) for call in m.tool_calls]
    assert [m.tool_call_id for m in messages if m.type == "tool"] == called
