"""Two agents that hand over to each other, killed and restored: warm, and word for word as if nothing had been.

Run as a program it does some runs of the workflow in a process of its own, says what was answered, and then kills
itself with SIGKILL.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentOutput, AgentWorkflow, FunctionAgent
from llama_index.core.memory import Memory
from llama_index.core.workflow import Context
from workflows.context.state_store import UnserializableKeyWarning

from llama_index_agent_memory import MLXPersistentLLM

DESK = "You are a helpful assistant. " + "You welcome people and remember what they say. " * 60
METEO = "You are a weather assistant. " + "You tell people what the weather is like. " * 60
HANDED_OVER = "{to_agent} is here: {reason}"
RUNS = ["Hand off to meteo. What is the weather in Paris?", "Hand off to meteo. What is the weather in Rome?"]


def team(llm: MLXPersistentLLM) -> AgentWorkflow:
    """A desk that hands every question over, and one who answers it."""
    desk = FunctionAgent(
        name="desk",
        description="Welcomes people.",
        system_prompt=DESK,
        llm=llm,
        initial_tool_choice="handoff",
    )
    meteo = FunctionAgent(
        name="meteo", description="Knows the weather.", system_prompt=METEO, llm=llm, can_handoff_to=[]
    )
    return AgentWorkflow(agents=[desk, meteo], root_agent="desk", handoff_output_prompt=HANDED_OVER)


async def work(folder: Path, runs: list[str]) -> list[dict[str, Any]]:
    """Do ``runs``, from where ``folder`` says the workflow was; write there where it is then."""
    llm = MLXPersistentLLM(cache_dir=folder / "caches", max_tokens=80)
    workflow, saved = team(llm), folder / "context.json"
    context: Context[Any] = Context(workflow)
    if saved.exists():
        context = Context.from_dict(workflow, json.loads(saved.read_text()))
    memory = Memory.from_defaults(
        session_id="team", token_limit=100_000, async_database_uri=f"sqlite+aiosqlite:///{folder / 'chat.db'}"
    )
    answers = []
    for text in runs:
        await context.store.set("current_agent_name", "desk")
        handler = workflow.run(text, ctx=context, memory=memory)
        answers += [seen(event) async for event in handler.stream_events() if isinstance(event, AgentOutput)]
        await handler
    with warnings.catch_warnings():
        # The memory is left out of a saved context; it lies in the database.
        warnings.simplefilter("ignore", UnserializableKeyWarning)
        saved.write_text(json.dumps(context.to_dict()))
    return answers


def seen(output: AgentOutput) -> dict[str, Any]:
    """What one call of the model came to."""
    assert isinstance(output.raw, dict)
    return {
        "agent": output.current_agent_name,
        "text": output.response.content,
        "calls": [(call.tool_name, call.tool_kwargs) for call in output.tool_calls],
        "prompt": output.raw["usage"]["prompt_tokens"],
        "cached": output.raw["usage"]["prompt_tokens_details"]["cached_tokens"],
        "tier": output.raw["hit_tier"],
        "session": output.raw["session_id"],
    }


def killed(folder: Path, runs: list[str]) -> list[dict[str, Any]]:
    """The answers of a process that did ``runs`` and was killed."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, str(folder), json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def first_of(agent: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    return next(answer for answer in answers if answer["agent"] == agent)


@pytest.mark.slow
def test_two_agents_go_on_after_a_kill(tmp_path: Path) -> None:
    unbroken = killed(tmp_path / "unbroken", RUNS)
    before = killed(tmp_path / "broken", RUNS[:1])
    after = killed(tmp_path / "broken", RUNS[1:])

    said = ("agent", "text", "calls", "prompt", "session")
    assert [[a[k] for k in said] for a in before + after] == [[a[k] for k in said] for a in unbroken]
    assert {answer["session"] for answer in unbroken} == {"team"}
    assert {answer["agent"] for answer in before} == {"desk", "meteo"}
    for agent in ("desk", "meteo"):
        resumed = first_of(agent, after)
        assert resumed["tier"] == "warm"
        assert resumed["cached"] >= 0.95 * resumed["prompt"]


def main() -> None:
    """Answer, then die as by a power switch."""
    answers = asyncio.run(work(Path(sys.argv[1]), json.loads(sys.argv[2])))
    print(json.dumps(answers), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
