"""What every worker shares: it answers jobs, one JSON line each, and says how long its first token took.

Workers run in environments of other projects, so they import nothing of this one. A worker is an object whose methods
are the jobs: ``{"do": "turn", ...}`` calls ``turn(...)``, and what it returns is the answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def serve(worker: Any) -> None:
    """Answer jobs from standard input until it ends. What others print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        found = getattr(worker, job.pop("do"))(**job)
        print(json.dumps(found), file=answers, flush=True)


class Clock:
    """When the first of a turn's tokens came, and when the last: seconds since the turn was asked for."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.arrivals: list[float] = []

    def token(self) -> None:
        """Note a token."""
        self.arrivals.append(time.perf_counter() - self._started)

    def turn(self, answer: list[int]) -> dict[str, Any]:
        """What is told of a turn."""
        return {"first": self.arrivals[0], "arrivals": self.arrivals, "ids": answer}


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens at the beginning are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
