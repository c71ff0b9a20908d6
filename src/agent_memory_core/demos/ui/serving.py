"""The program of the engine's process.

    python -m agent_memory_core.demos.ui.serving

reads calls from its standard input and answers on its standard output; both are pickled objects of these two processes
and of nobody else. A generator is answered step by step.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Generator
from typing import IO, Any

from agent_memory_core import AgentMemoryError
from agent_memory_core.demos.ui.desk import Desk
from agent_memory_core.demos.ui.engine import Answer, Call, send


def serve() -> None:
    """Answer calls until nobody is there to ask."""
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What libraries print must not get between the answers.
    os.dup2(2, 1)
    with Desk() as desk:
        while True:
            try:
                call: Call = pickle.load(calls)
            except EOFError:
                return
            _answer(desk, call, answers)


def _answer(desk: Any, call: Call, answers: IO[bytes]) -> None:
    try:
        target = desk if call.target == "desk" else getattr(desk, call.target)
        result = getattr(target, call.method)(*call.args, **call.kwargs)
        if isinstance(result, Generator):
            result = _steps(result, answers)
    except AgentMemoryError as error:
        send(answers, Answer("error", (type(error), str(error))))
        return
    send(answers, Answer("end", result))


def _steps(result: Generator[Any, None, Any], answers: IO[bytes]) -> Any:
    while True:
        try:
            send(answers, Answer("step", next(result)))
        except StopIteration as end:
            return end.value


if __name__ == "__main__":
    serve()
