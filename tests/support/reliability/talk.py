"""Conversations whose every answer is known: any turn of them can be taken at any time, by any process.

The models have random weights, whose greedy answers depend on every token before them. One of each kind of layer:
``append`` keeps all keys and values, ``window`` mostly the last ones, ``state`` a state of fixed size.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import families

from agent_memory_core import AgentMemory, Message, TurnReport

MODELS = {"append": "llama", "window": "gemma3", "state": "mamba2"}
SESSIONS = ("ada", "tom", "mia")
TURNS = 4
BLOCK = 64

Tell = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Talks:
    """The folder of a model, and its answers in every session."""

    kind: str
    model: str
    answers: dict[str, list[tuple[int, ...]]]
    """By session: the tokens of each answer, as a memory that keeps nothing gives them."""

    def prompt(self, session: str, turn: int) -> list[Message]:
        """What is asked in a turn of a session."""
        messages: list[Message] = []
        for number in range(turn + 1):
            messages.append(Message("user", f"{session} asks for the {number}th time. " * 12))
            if number < turn:
                # What a random model spells would be other tokens when it is read as a text.
                messages.append(Message("assistant", f"That is {number} for {session}."))
        return messages

    def take(self, memory: AgentMemory, session: str, turn: int) -> tuple[bool, TurnReport]:
        """Take a turn; return whether its answer is right, and its report."""
        result = memory.chat(self.prompt(session, turn), session, max_tokens=4, temperature=0)
        return result.token_ids == self.answers[session][turn], result.report


def open_memory(talks: Talks, folder: Path | None, **settings: Any) -> AgentMemory:
    """A memory of the talks' model, without rounding of keys and values, so that all ways give the same bits."""
    settings = {"kv_bits": None, "min_free_mb": 0, "block_tokens": BLOCK, "memory_budget_mb": 64, **settings}
    return AgentMemory(model=talks.model, cache_dir=folder, **settings)


def talks_of(kind: str, folder: Path) -> Talks:
    """Write the model of a kind into a folder, and learn its answers. Both are done in another process."""

    def learn(tell: Tell) -> None:
        talks = Talks(kind, families.write(folder / kind, MODELS[kind]), {name: [] for name in SESSIONS})
        with open_memory(talks, None) as memory:
            for session in SESSIONS:
                for turn in range(TURNS):
                    result = memory.chat(talks.prompt(session, turn), max_tokens=4, temperature=0)
                    talks.answers[session].append(result.token_ids)
        tell([talks.model, talks.answers])

    ((model, answers),) = Child(learn).result()
    known = {name: [tuple(ids) for ids in found] for name, found in answers.items()}
    return Talks(kind, model, known)


class Child:
    """A process forked from this one, in which no engine has run, that tells things by lines of JSON."""

    def __init__(self, work: Callable[[Tell], None]) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            _run(work, writer)
        os.close(writer)
        self._reader = reader
        self._rest = b""

    def lines(self) -> Iterator[Any]:
        """What it tells, until it ends. A line that it did not finish was not told."""
        while part := os.read(self._reader, 65536):
            *whole, self._rest = (self._rest + part).split(b"\n")
            yield from map(json.loads, whole)

    def next(self) -> Any:
        """The next thing that it tells; None where it has ended."""
        while b"\n" not in self._rest:
            part = os.read(self._reader, 65536)
            if not part:
                return None
            self._rest += part
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def rest(self) -> list[Any]:
        """All that it tells until it ends."""
        found = []
        while (told := self.next()) is not None:
            found.append(told)
        return found

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, 9)

    def wait(self) -> int:
        """Wait for its end; return its exit status, or minus the signal that ended it."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._reader)
        return status

    def result(self) -> list[Any]:
        """All that it tells; it must end well."""
        found = self.rest()
        status = self.wait()
        assert status == 0, f"a process ended with {status}"
        return found


def _run(work: Callable[[Tell], None], writer: int) -> None:
    def tell(thing: Any) -> None:
        os.write(writer, json.dumps(thing).encode() + b"\n")

    status = 1
    try:
        work(tell)
        status = 0
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)
