"""Two agents of one workflow that hand over to each other, killed after a handoff and restored: warm, and word for
word as if nothing had been.

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
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentOutput, AgentWorkflow, FunctionAgent
from llama_index.core.memory import Memory
from llama_index.core.workflow import Context

from llama_index_agent_memory import MLXPersistentLLM

# Long beside what is said between two calls of an agent: the share that is reused is of the whole prompt.
TOM = "You are a helpful assistant. " + " ".join(f"Rule {i} is to be kind." for i in range(220))
MIA = "You are a helpful assistant. " + " ".join(f"Fact {i} is old." for i in range(220))
# Who is asked, who answers: the context knows whose turn it is, and the tool alone changes it.
RUNS = ["Hand off to Mia.", "Hand off to Tom.", "Hand off to Mia."]
AGENTS = ["Tom", "Mia", "Mia", "Tom", "Tom", "Mia"]


def team(llm: MLXPersistentLLM) -> AgentWorkflow:
    """Two agents with one conversation, each with instructions of its own, who pass on what they are asked."""
    tom, mia = (
        FunctionAgent(
            name=name,
            description="Helps.",
            system_prompt=prompt,
            llm=llm,
            initial_tool_choice="handoff",
            allow_parallel_tool_calls=False,
        )
        for name, prompt in (("Tom", TOM), ("Mia", MIA))
    )
    # In the words of LlamaIndex itself, so small a model would hand off again instead of answering.
    told = "The agent is {to_agent}. {reason}"
    return AgentWorkflow(agents=[tom, mia], root_agent="Tom", handoff_output_prompt=told)


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
        handler = workflow.run(text, ctx=context, memory=memory)
        answers += [seen(event) async for event in handler.stream_events() if isinstance(event, AgentOutput)]
        await handler
    # The memory is left out of it, and lies in its database.
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


@pytest.mark.heavy
def test_two_agents_go_on_after_a_handoff_and_a_kill(tmp_path: Path) -> None:
    unbroken = killed(tmp_path / "unbroken", RUNS)
    before = killed(tmp_path / "broken", RUNS[:1])
    after = killed(tmp_path / "broken", RUNS[1:])

    said = ("agent", "text", "calls", "prompt", "session")
    assert [[a[k] for k in said] for a in before + after] == [[a[k] for k in said] for a in unbroken]
    assert [answer["agent"] for answer in unbroken] == AGENTS
    for asked, answered in zip(unbroken[::2], unbroken[1::2], strict=True):
        ((tool, arguments),) = asked["calls"]
        assert (tool, arguments["to_agent"]) == ("handoff", answered["agent"])
        assert not answered["calls"]
        assert answered["text"]
    assert {answer["session"] for answer in unbroken} == {"team"}
    for resumed in after[:2]:  # the next call of each agent
        assert resumed["tier"] == "warm"
        assert resumed["cached"] >= 0.95 * resumed["prompt"]


def main() -> None:
    """Answer, then die as by a power switch."""
    answers = asyncio.run(work(Path(sys.argv[1]), json.loads(sys.argv[2])))
    print(json.dumps(answers), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
