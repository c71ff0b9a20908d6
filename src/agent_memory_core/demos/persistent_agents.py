"""Three agents, two processes: what was told before a ``kill -9`` is known after it.

    python -m agent_memory_core.demos.persistent_agents [FOLDER]

The first process makes three agents, tells each of them a fact, and is killed. The second one finds the agents on disk
and asks each for its fact.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_memory_core import AgentMemory, AgentMemoryError, SessionKey
from agent_memory_core.agents import PersistentAgentManager
from agent_memory_core.demos.restart import BRIEF

FACTS = {
    "tech_specialist": ("technical", "My name is Ada.", "What is my name?", "Ada"),
    "biz_analyst": ("business", "My favourite colour is teal.", "What is my favourite colour?", "teal"),
    "coordinator": (
        "coordinator",
        "The code of the garage is 4821.",
        "What is the code of the garage?",
        "4821",
    ),
}
"""Agent id: its type, what it is told, what it is asked later, and a word of the right answer."""

PROMPT = BRIEF + " Your work there is {role}."


@dataclass(frozen=True)
class Resumed:
    """How one agent went on after the restart."""

    agent_id: str
    history: list[dict[str, str]]
    """What it knew before it was asked again."""
    answer: str
    expected: str
    """A word that the right answer contains."""
    prompt_tokens: int
    reused: int
    """Prompt tokens that were not computed again."""
    resumed: float
    """Seconds to the first token of the answer."""
    cold: float | None
    """The same for a memory that has never read any of it; None where that was not asked for."""


def first_session(folder: Path) -> None:
    """Make the agents, tell them their facts, print their histories, and wait to be killed."""
    manager = PersistentAgentManager(cache_dir=folder, min_free_mb=0)
    for agent_id, (agent_type, fact, _, _) in FACTS.items():
        manager.create_agent(agent_id, agent_type, PROMPT.format(role=agent_type))
        manager.generate(agent_id, fact, max_tokens=40)
    print(
        json.dumps({name: agent.conversation_history for name, agent in manager.agents.items()}), flush=True
    )
    signal.pause()


def second_session(folder: Path, *, compare: bool = True) -> list[Resumed]:
    """Load the agents from disk, and go on with them. An empty memory answers the same, for comparison."""
    with ExitStack() as opened:
        manager = opened.enter_context(PersistentAgentManager(cache_dir=folder, min_free_mb=0))
        blank = opened.enter_context(AgentMemory(cache_dir=None)) if compare else None
        # Loading the model is not what is compared.
        for memory in filter(None, (manager.memory, blank)):
            memory.chat("Hello!", max_tokens=2)
        return [_resumed(manager, blank, agent_id) for agent_id in FACTS]


def _resumed(manager: PersistentAgentManager, blank: AgentMemory | None, agent_id: str) -> Resumed:
    _, _, question, expected = FACTS[agent_id]
    agent = manager.load_agent(agent_id)
    before = agent.conversation_history
    answer = manager.generate(agent_id, question, max_tokens=40)
    report = agent.last_report
    assert report is not None, "the agent has just answered"
    prompt = [{"role": "system", "content": agent.system_prompt}, *agent.conversation_history[:-1]]
    # In a namespace of its own nothing is known from the agent before.
    key = SessionKey(agent_id, namespace=agent_id)
    cold = blank.chat(prompt, key, max_tokens=1).report if blank is not None else None
    return Resumed(
        agent_id=agent_id,
        history=before,
        answer=answer,
        expected=expected,
        prompt_tokens=report.usage.prompt_tokens,
        reused=report.usage.cache_read,
        resumed=report.time_to_first_token,
        cold=cold.time_to_first_token if cold is not None else None,
    )


def run(folder: Path, *, compare: bool = True) -> tuple[dict[str, list[dict[str, str]]], list[Resumed]]:
    """Run both sessions, each in a process; the first is killed with SIGKILL. Return what each had to say.

    Args:
        folder: of the agents.
        compare: whether an empty memory answers the same, which takes most of the time.

    Raises:
        AgentMemoryError: one of the processes failed.
    """
    with subprocess.Popen(_command("first", folder), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        process.kill()
    if not told:
        raise AgentMemoryError("the first session of the demonstration ended too early.")
    step = "second" if compare else "second-alone"
    done = subprocess.run(_command(step, folder), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AgentMemoryError(f"the second session of the demonstration failed:\n{done.stderr}")
    resumed: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return json.loads(told), [Resumed(**line) for line in resumed]


def _command(step: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", __name__ if __name__ != "__main__" else __spec__.name, step, str(folder)]


def _show(folder: Path) -> None:
    print("session 1 makes three agents, tells each a fact, and is killed.")
    _, resumed = run(folder)
    for line in resumed:
        print(
            f"session 2, {line.agent_id}: {line.answer!r}, {line.reused} of {line.prompt_tokens} prompt tokens reused, "
            f"first token after {line.resumed * 1000:.0f} ms"
            + (f", cold after {line.cold * 1000:.0f} ms" if line.cold is not None else "")
        )


def main(arguments: list[str]) -> None:
    """Run the demonstration, or one of its sessions."""
    match arguments:
        case ["first", folder]:
            first_session(Path(folder))
        case ["second" | "second-alone" as step, folder]:
            resumed = second_session(Path(folder), compare=step == "second")
            print(json.dumps([dataclasses.asdict(line) for line in resumed]))
        case [folder]:
            _show(Path(os.path.expanduser(folder)))
        case _:
            with tempfile.TemporaryDirectory(prefix="agent-memory-agents-") as temporary:
                _show(Path(temporary))


if __name__ == "__main__":
    main(sys.argv[1:])
