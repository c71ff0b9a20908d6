"""A team of agents killed between two steps goes on in a new process: as warm, and with the same answers.

Run as a program it runs the team's graph in one thread from where its checkpoints say it is, and kills itself with
SIGKILL when the team has said so much, before the next one speaks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, MessagesState, StateGraph

from langchain_agent_memory import ChatMLXPersistent

BRIEF = "You are one of a team. " + "Be polite to everybody and think before you speak. " * 50
TEAM = ("planner", "writer", "critic")
QUESTIONS = ("My name is Ada.", "I live in Rome.", "What is my name?")
THREAD: RunnableConfig = {"configurable": {"thread_id": "team"}}


def member(llm: ChatMLXPersistent, name: str, kill_at: int) -> Any:
    """A node that answers as one of the team: its own words are the assistant's, all others' a user's."""

    def view(message: BaseMessage) -> BaseMessage:
        if message.name == name:
            return AIMessage(message.text)
        return HumanMessage(f"{message.name or 'user'}: {message.text}")

    def node(state: MessagesState) -> dict[str, Any]:
        done = sum(isinstance(message, AIMessage) for message in state["messages"])
        if kill_at and done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        prompt = [SystemMessage(f"{BRIEF}You are the {name}."), *map(view, state["messages"])]
        answer = llm.invoke(prompt)
        assert answer.usage_metadata is not None
        said = {
            "name": name,
            "text": answer.text,
            "prompt": answer.usage_metadata["input_tokens"],
            "read": answer.usage_metadata["input_token_details"]["cache_read"],
            "tier": answer.response_metadata["hit_tier"],
        }
        print(json.dumps(said), flush=True)
        asked = QUESTIONS[done // 3 + 1 : done // 3 + 2] if done % 3 == 2 else ()
        return {"messages": [AIMessage(answer.text, name=name), *map(HumanMessage, asked)]}

    return node


def team(llm: ChatMLXPersistent, saver: SqliteSaver, kill_at: int) -> Any:
    """Planner, writer and critic answer one after the other, question after question."""
    graph = StateGraph(MessagesState)
    for name, after in zip(TEAM, (*TEAM[1:], None), strict=True):
        graph.add_node(name, member(llm, name, kill_at))
        if after is not None:
            graph.add_edge(name, after)
    graph.add_edge(START, TEAM[0])
    graph.add_conditional_edges(
        TEAM[-1], lambda state: END if state["messages"][-1].name else TEAM[0], [TEAM[0], END]
    )
    return graph.compile(checkpointer=saver)


def main(folder: Path, kill_at: int) -> None:
    """Begin, or go on."""
    llm = ChatMLXPersistent(cache_dir=folder / "caches", kv_bits=None, temperature=0, max_tokens=12)
    with SqliteSaver.from_conn_string(str(folder / "checkpoints.db")) as saver:
        graph = team(llm, saver, kill_at)
        begun = graph.get_state(THREAD).values.get("messages")
        asked = None if begun else {"messages": [HumanMessage(QUESTIONS[0])]}
        graph.invoke(asked, THREAD, durability="sync")
    llm.memory.close()


def run(folder: Path, kill_at: int = 0) -> list[dict[str, Any]]:
    """One process: what the agents said in it."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, str(folder), str(kill_at)]
    environment = {**os.environ, "AGENT_MEMORY_MIN_FREE_MB": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.heavy
def test_a_killed_team_goes_on_as_warm_and_as_it_would_have(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    assert len(whole) == len(QUESTIONS) * len(TEAM)
    # After the first round, and in the middle of the second.
    processes = [run(tmp_path / "killed", 3), run(tmp_path / "killed", 5), run(tmp_path / "killed")]
    assert [len(said) for said in processes] == [3, 2, 4]
    said = [answer for process in processes for answer in process]
    assert [(a["name"], a["text"]) for a in said] == [(a["name"], a["text"]) for a in whole]
    assert len({a["text"] for a in said}) > 1
    for process in processes[1:]:
        assert process[0]["tier"] == "warm"
        for answer in process:
            assert answer["read"] >= 0.9 * answer["prompt"]
    # A restart costs no token.
    assert [a["read"] for a in said] == [a["read"] for a in whole]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
