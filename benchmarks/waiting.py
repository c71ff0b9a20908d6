"""How long others wait while a long prompt of a stranger is evaluated.

    turn          a warm turn of another session gets its first token
    stats         `AgentMemory.stats` answers
    sessions      `AgentMemory.sessions` answers
    count_tokens  `AgentMemory.count_tokens` answers
    cancel        the long prompt is withdrawn, until its place is free

Each is measured with nothing else to do and while cold prompts run one after another, in turns.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import assistant, user, write_model
from record import argument_parser, median_of, write_result

from agent_memory_core import AgentMemory, Cancelled

LAYERS, KNOWN, COLD, NEW = 4, 1024, 4096, 32
TARGETS = {
    "turn, busy / idle": "<= 8",
    "stats": "<= 0.05",
    "sessions": "<= 0.05",
    "count_tokens": "<= 0.05",
    "cancel": "<= 0.5",
}
AIMS = {"turn, busy / idle": "<= 3"}
"""What is to be reached; a target is what may not be missed."""
History = list[dict[str, str]]


def main() -> None:
    """Measure in turns and write the result file."""
    parser = argument_parser("waiting", __doc__)
    parser.add_argument("--samples", type=int, default=7, help="how often each is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), LAYERS)
        with AgentMemory(model=model, cache_dir=Path(folder, "store")) as memory:
            memory.chat([user(COLD, seed=1, first=True)], max_tokens=1)
            talk = Talk(memory)
            samples = [measured(memory, talk, number) for number in range(options.samples)]
    settings = {"layers": LAYERS, "known": KNOWN, "cold": COLD, "new": NEW, "targets": TARGETS, "aims": AIMS}
    write_result(options.out, settings, summary(samples))


class Talk:
    """A session that goes on by short turns."""

    def __init__(self, memory: AgentMemory) -> None:
        self._memory = memory
        self._history: History = [user(KNOWN, seed=2, first=True)]
        self._turns = 0
        self.turn()

    def turn(self) -> float:
        """Say something; return the seconds to the first token."""
        answer = self._memory.chat(self._history, session="talk", max_tokens=8, temperature=0)
        self._turns += 1
        self._history += [assistant(answer.text), user(NEW, seed=100 + self._turns, first=False)]
        return answer.report.time_to_first_token


def measured(memory: AgentMemory, talk: Talk, number: int) -> dict[str, float]:
    """One round: everything idle, then everything while a prompt is evaluated."""
    found = {"turn, idle": talk.turn()}
    with Cold(memory, number):
        found["turn, busy"] = talk.turn()
    questions: dict[str, Callable[[], Any]] = {
        "stats": memory.stats,
        "sessions": memory.sessions,
        "count_tokens": lambda: memory.count_tokens("a short question"),
    }
    with Cold(memory, 1000 + number):
        for name, question in questions.items():
            started = time.perf_counter()
            question()
            found[name] = time.perf_counter() - started
    return found | {"cancel": withdrawn(memory, number)}


class Cold:
    """While it is entered, a long prompt is evaluated of which nothing is known."""

    def __init__(self, memory: AgentMemory, number: int) -> None:
        self._memory = memory
        request = [user(COLD, seed=10_000 + number, first=True)]
        self._stream = memory.chat(request, session=f"cold {number}", stream=True, max_tokens=1)
        self._reader = threading.Thread(target=self._read)

    def _read(self) -> None:
        try:
            list(self._stream)
        except Cancelled:
            return

    def __enter__(self) -> Cold:
        self._reader.start()
        while not self._memory.stats().running:
            time.sleep(0.001)
        # Somewhere inside a chunk.
        time.sleep(0.2)
        assert self._memory.stats().running, "the prompt is too short for this machine"
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._reader.join()
        while self._memory.stats().running:
            time.sleep(0.001)


def withdrawn(memory: AgentMemory, number: int) -> float:
    """Seconds from withdrawing a long prompt until its place is free."""
    cold = Cold(memory, 2000 + number)
    cold.__enter__()
    started = time.perf_counter()
    cold.__exit__()
    return time.perf_counter() - started


def summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Median seconds of everything, and the worst."""
    medians = {name: median_of([sample[name] for sample in samples]) for name in samples[0]}
    worst = {name: round(max(sample[name] for sample in samples), 6) for name in samples[0]}
    ratio = median_of([sample["turn, busy"] / sample["turn, idle"] for sample in samples])
    return {
        "medians": medians,
        "worst": worst,
        "ratios": {"turn, busy / idle": ratio}
        | {name: medians[name] for name in ("stats", "sessions", "count_tokens", "cancel")},
        "samples": samples,
    }


if __name__ == "__main__":
    main()
