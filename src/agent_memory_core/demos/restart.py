"""The point in under two minutes: agents that share a brief, are killed, and resume where they were.

A first process tells three agents different facts and is killed with SIGKILL. A second process resumes each
from disk and asks. The same prompts are then run with nothing known, to have something to compare with.
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

from agent_memory_core.errors import AgentMemoryError
from agent_memory_core.memory import AgentMemory
from agent_memory_core.messages import ChatResult, SessionKey

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
    """What one agent's question came to. Times are in seconds."""

    agent: str
    question: str
    answer: str
    expected: str
    prompt_tokens: int
    reused: int
    cold: float
    resumed: float


@dataclass(frozen=True)
class Outcome:
    """The whole demonstration. Bytes are of the store."""

    lines: list[Line]
    bytes_shared: int
    bytes_unshared: int


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
    """Resume each agent from disk and ask; then run the same prompts with nothing known."""
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
    # A namespace of its own: the brief must not be known from the agent before.
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
        AgentMemoryError: a process ended other than as told.
    """
    with tempfile.TemporaryDirectory(prefix="agent-memory-demo-") as temporary:
        folder = Path(temporary) / "caches"
        with console.status("process 1: three agents read a shared brief and are told different facts"):
            histories = _told_and_killed(folder)
        console.print("process 1 was killed with SIGKILL after its last answer.")
        with console.status("process 2: resumes each agent from disk and asks"):
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
    return outcome


def _told_and_killed(folder: Path) -> str:
    command = [sys.executable, "-m", __name__, "tell", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        process.kill()
    if not told:
        raise AgentMemoryError("the first process of the demonstration ended before it had told its facts.")
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
    # The demonstration shows the defaults, whatever the user's own settings are.
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AGENT_MEMORY_", "SEMANTIC_"))
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
    """Save a bar chart of the times; say whether matplotlib was there to do it."""
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
    figure.savefig(picture, dpi=150)
    return True


def main() -> None:
    """One of the two processes: ``tell`` or ``ask`` with the folder of the store."""
    step, folder = sys.argv[1], Path(sys.argv[2])
    if step == "tell":
        tell(folder)
    else:
        print(json.dumps(dataclasses.asdict(ask(folder, json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
