"""The engine of the pages, in a process of its own, so that a page can kill it with SIGKILL and go on."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Generator
from typing import IO, Any, NamedTuple

from agent_memory_core import AgentMemoryError

PROGRAM = f"{__package__}.serving"
"""What the process runs."""


class Call(NamedTuple):
    """A method of one of the things that a `Desk` has."""

    target: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Answer(NamedTuple):
    """What a call came to: "step" as often as a generator gives one, then "end" or "error"."""

    kind: str
    value: Any


class Remote:
    """The methods of one thing in the engine's process, to be called as if it were here."""

    def __init__(self, engine: Engine, target: str) -> None:
        self._engine, self._target = engine, target

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._engine.call(Call(self._target, method, args, kwargs))

        return call

    def steps(self, method: str, *args: Any, **kwargs: Any) -> Generator[Any, None, Any]:
        """The steps of a method that is a generator, and what it returns."""
        return self._engine.steps(Call(self._target, method, args, kwargs))


class Engine:
    """Starts the process when it is called, and again when it was killed. One call after another."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        """How often the process was started."""
        self.memory, self.service = Remote(self, "memory"), Remote(self, "service")
        self.manager, self.desk = Remote(self, "manager"), Remote(self, "desk")

    @property
    def pid(self) -> int | None:
        """The process that runs; None where there is none."""
        alive = self._process is not None and self._process.poll() is None
        return self._process.pid if self._process is not None and alive else None

    def call(self, call: Call) -> Any:
        """The result of a call; for a generator, what it returned.

        Raises:
            AgentMemoryError: what the call raised, or that the process has ended.
        """
        steps = self.steps(call)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    def steps(self, call: Call) -> Generator[Any, None, Any]:
        """The steps of a call as they come. Who does not read them to the end waits for it all the same."""
        with self._lock:
            process = self._started()
            send(process.stdin, call)
            answer = self._next(process)
            try:
                while answer.kind == "step":
                    yield answer.value
                    answer = self._next(process)
            finally:
                while answer.kind == "step":
                    answer = self._next(process)
            if answer.kind == "error":
                kind, message = answer.value
                raise kind(message)
            return answer.value

    def kill(self) -> None:
        """Kill the process with SIGKILL: it is told nothing and writes nothing more."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()
                self._process = None

    def close(self) -> None:
        """End the process in order."""
        with self._lock:
            if self._process is not None:
                self._process.communicate()
                self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self.starts += 1
        return self._process

    def _next(self, process: subprocess.Popen[bytes]) -> Answer:
        assert process.stdout is not None
        try:
            answer: Answer = pickle.load(process.stdout)
        except EOFError:
            # Its pipe is closed a moment before it is known to have ended.
            process.wait()
            return Answer(
                "error", (AgentMemoryError, "The engine's process has ended. Its errors are in the terminal.")
            )
        return answer


def send(pipe: IO[bytes] | None, value: Call | Answer) -> None:
    """Write one object."""
    assert pipe is not None
    pickle.dump(value, pipe)
    pipe.flush()
