"""A demonstration in under two minutes: agents that share a brief are killed, and continue where they were.

A first process tells three agents different facts and is killed with SIGKILL. A second process resumes each agent
from disk and asks for its fact. Then the same prompts are run with an empty memory, for comparison.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from agent_memory_core import AgentMemory, AgentMemoryError, ChatResult, InvalidSetting, SessionKey

BRIEF = (
    "You are a helpful assistant. You belong to the crew of a small ship that sails from port to port. "
    + " ".join(
        f"In the {place} there is a {thing} for the {who}, and next to it stands a {other}."
        for place, thing, who, other in zip(
            ("kitchen garden library workshop cabin office tower cellar station market " * 3).split(),
            ("table lamp desk hammer window map mirror basket clock engine kettle rope " * 3).split(),
            ("cook guard teacher doctor driver painter sailor baker farmer singer tailor " * 3).split(),
            ("chair bottle candle drum ladder needle violin umbrella pencil camera vase " * 3).split(),
            strict=False,
        )
    )
    + " Answer briefly."
)
FACTS = {
    "navigator": ("My name is Ada.", "What is my name?", "Ada"),
    "cook": ("My favourite colour is teal.", "What is my favourite colour?", "teal"),
    "engineer": ("The code of the garage is 4821.", "What is the code of the garage?", "4821"),
}


@dataclass(frozen=True)
class Line:
    """What was measured when one agent was asked."""

    agent: str
    question: str
    answer: str
    expected: str
    """A word that the right answer contains."""
    prompt_tokens: int
    reused: int
    """How many of the prompt's tokens were not computed again."""
    cold: float
    """Seconds to the first token with an empty memory."""
    resumed: float
    """Seconds to the first token from disk."""


@dataclass(frozen=True)
class Outcome:
    """What the whole demonstration measured."""

    lines: list[Line]
    bytes_shared: int
    """Bytes on disk."""
    bytes_unshared: int
    """Bytes on disk if each agent stored the brief for itself."""


def tell(folder: Path) -> None:
    """Tell each agent its fact, print the conversations, then wait to be killed."""
    memory = AgentMemory(cache_dir=folder, min_free_mb=0)
    histories = {}
    for agent, (fact, _, _) in FACTS.items():
        history = [{"role": "system", "content": BRIEF}, {"role": "user", "content": fact}]
        answer = memory.chat(history, session=agent, max_tokens=40)
        histories[agent] = [*history, {"role": "assistant", "content": answer.text}]
    print(json.dumps(histories), flush=True)
    signal.pause()


def ask(folder: Path, histories: dict[str, list[dict[str, str]]]) -> Outcome:
    """Resume each agent from disk and ask; then run the same prompts with an empty memory."""
    lines = []
    with AgentMemory(cache_dir=folder, min_free_mb=0) as memory, AgentMemory(cache_dir=None) as blank:
        for each in (memory, blank):
            each.chat("Hello!", max_tokens=2)
        for agent, (_, question, expected) in FACTS.items():
            history = [*histories[agent], {"role": "user", "content": question}]
            warm = memory.chat(history, session=agent, max_tokens=40)
            cold = _cold(blank, history, agent)
            lines.append(_line(agent, question, expected, warm, cold))
        sessions = memory.sessions()
        return Outcome(lines, memory.stats().store.bytes, sum(s.nbytes for s in sessions))


def _cold(blank: AgentMemory, history: list[dict[str, str]], agent: str) -> ChatResult:
    # Each agent has its own namespace here, so that the brief is not known from the agent before.
    return blank.chat(history, session=SessionKey(agent, namespace=agent), max_tokens=40)


def _line(agent: str, question: str, expected: str, warm: ChatResult, cold: ChatResult) -> Line:
    usage = warm.report.usage
    return Line(
        agent=agent,
        question=question,
        answer=warm.text,
        expected=expected,
        prompt_tokens=usage.prompt_tokens,
        reused=usage.cache_read,
        cold=cold.report.time_to_first_token,
        resumed=warm.report.time_to_first_token,
    )


def run(console: Console, picture: Path) -> Outcome:
    """Run both processes, print the table and save the picture.

    Raises:
        AgentMemoryError: one of the processes failed.
        InvalidSetting: the picture cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="agent-memory-demo-") as temporary:
        folder = Path(temporary) / "caches"
        with console.status("process 1: three agents read the same brief, and each is told another fact"):
            histories = _told_and_killed(folder)
        console.print("process 1 was killed with SIGKILL after its last answer.")
        with console.status("process 2: each agent continues from disk and is asked for its fact"):
            outcome = _asked(folder, histories)
    console.print(_table(outcome))
    saved = outcome.bytes_unshared / max(1, outcome.bytes_shared)
    console.print("cold and resumed: milliseconds to the first token of the answer", style="dim")
    console.print(
        f"on disk: {outcome.bytes_shared / 2**20:.2f} MiB; without sharing the brief "
        f"{outcome.bytes_unshared / 2**20:.2f} MiB, {saved:.1f} times as much"
    )
    if draw(outcome, picture):
        console.print(f"the same as a picture: {picture.resolve()}", soft_wrap=True)
    console.print(
        "agents that talk and remember, in a browser: agent-memory ui (extra ui)", style="dim", soft_wrap=True
    )
    return outcome


def _told_and_killed(folder: Path) -> str:
    command = [sys.executable, "-m", __name__, "tell", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        process.kill()
    if not told:
        raise AgentMemoryError("the first process of the demonstration ended too early.")
    return told


def _asked(folder: Path, histories: str) -> Outcome:
    command = [sys.executable, "-m", __name__, "ask", str(folder)]
    done = subprocess.run(
        command, input=histories, capture_output=True, text=True, check=False, env=_environment()
    )
    if done.returncode != 0:
        raise AgentMemoryError(f"the second process of the demonstration failed:\n{done.stderr}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Outcome([Line(**line) for line in told["lines"]], told["bytes_shared"], told["bytes_unshared"])


def _environment() -> dict[str, str]:
    # The demonstration shows the defaults, whatever the user's own settings are. Which library multiplies matrices is
    # no setting but a property of the machine.
    return {
        name: value
        for name, value in os.environ.items()
        if name == "AGENT_MEMORY_OPENBLAS" or not name.startswith(("AGENT_MEMORY_", "SEMANTIC_"))
    }


def _table(outcome: Outcome) -> Table:
    table = Table(title="after the restart", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("agent")
    table.add_column("answer")
    for name in ("prompt\ntokens", "tokens\nreused", "cold\nms", "resumed\nms", "times\nfaster"):
        table.add_column(name, justify="right")
    for line in outcome.lines:
        table.add_row(
            line.agent,
            line.answer,
            str(line.prompt_tokens),
            str(line.reused),
            f"{line.cold * 1000:.0f}",
            f"{line.resumed * 1000:.0f}",
            f"{line.cold / line.resumed:.0f}",
        )
    return table


def draw(outcome: Outcome, picture: Path) -> bool:
    """Save a bar chart of the times; return False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(outcome.lines))
    cold = axes.bar([p - 0.2 for p in places], [x.cold * 1000 for x in outcome.lines], 0.4, label="cold")
    warm = axes.bar(
        [p + 0.2 for p in places], [x.resumed * 1000 for x in outcome.lines], 0.4, label="resumed"
    )
    for bars in (cold, warm):
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(
        list(places), [f"{x.agent}\n{x.reused} of {x.prompt_tokens} tokens reused" for x in outcome.lines]
    )
    axes.set_ylabel("time to first token, ms")
    axes.set_yscale("log")
    axes.set_title("Three agents after kill -9 and a new process")
    axes.margins(y=0.15)
    figure.legend(loc="outside upper right")
    try:
        figure.savefig(picture, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidSetting(
            f"the picture cannot be written to {picture}: {error}. Give another --picture."
        ) from error
    return True


def main() -> None:
    """Run one of the two processes: ``tell`` or ``ask``, with the folder of the store. An error is one sentence."""
    step, folder = sys.argv[1], Path(sys.argv[2])
    try:
        if step == "tell":
            tell(folder)
        else:
            print(json.dumps(dataclasses.asdict(ask(folder, json.load(sys.stdin)))))
    except AgentMemoryError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
