"""Drives a real engine and records the logits that each first token was sampled from.

Run as a program it does one turn of several conversations in a process of its own and then kills itself with
SIGKILL, as soon as the answers have been handed out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from agent_memory_core import AgentMemory, ChatResult, Delta, EngineConfig, SessionKey
from agent_memory_core.engine.engine import Engine

History = list[dict[str, str]]


@dataclass
class Seen:
    """One turn, as far as it must not depend on where the KV lay."""

    token_ids: list[int]
    logits: str
    prompt_tokens: int
    cache_read: int
    text: str
    tier: str


class RecordingSink:
    """A sink that keeps what it is given, for engines that are driven by hand."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.error: Exception | None = None

    def deliver(self, delta: Delta) -> None:
        self.deltas.append(delta)

    def fail(self, error: Exception) -> None:
        self.error = error

    @property
    def report(self) -> Any:
        """What the turn came to, None while it has not ended."""
        return self.deltas[-1].report if self.deltas else None

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


def chunks(engine: Engine) -> list[tuple[int, int]]:
    """Record which sequence gets each prefill chunk, and how long the chunk is."""
    seen: list[tuple[int, int]] = []
    prefill = engine.runner.prefill

    def recorded(row: Any, ids: Any, *, logits: bool) -> Any:
        seen.append((row.seq_id, len(ids)))
        return prefill(row, ids, logits=logits)

    engine.runner.prefill = recorded  # type: ignore[method-assign, assignment]
    return seen


def run(engine: Engine, until: Callable[[], bool], most: int = 2000) -> int:
    """Step until something holds; return how many steps it took."""
    for steps in range(most):
        if until():
            return steps
        engine.step()
        engine.scheduler.check()
    raise AssertionError(f"nothing happened within {most} steps")


class Driver:
    """One memory with its prompts' ids and last-chunk logits recorded on the way by."""

    def __init__(self, config: EngineConfig) -> None:
        self.memory = AgentMemory(config)
        self.logits: list[bytes] = []
        self.prompts: list[list[int]] = []
        self.engine(self._listen)

    def engine(self, function: Any) -> Any:
        """Run a function on the engine's thread."""
        return self.memory._thread.call(function).result()

    def _listen(self, engine: Engine) -> None:
        prefill = engine.runner.prefill

        def recorded(row: Any, ids: Any, *, logits: bool) -> mx.array | None:
            found = prefill(row, ids, logits=logits)
            if found is not None:
                self.logits.append(bytes(memoryview(found.astype(mx.float32))))  # type: ignore[arg-type]
            return found

        add = engine.scheduler.add

        def added(sequence: Any) -> None:
            self.prompts.append(list(sequence.token_ids))
            add(sequence)

        engine.runner.prefill = recorded  # type: ignore[method-assign, assignment]
        engine.scheduler.add = added  # type: ignore[method-assign]

    def turn(
        self, history: History, session: SessionKey | str | None, max_tokens: int = 8, **more: Any
    ) -> Seen:
        """One greedy turn; the answer is not added to ``history``."""
        result: ChatResult = self.memory.chat(history, session=session, max_tokens=max_tokens, **more)
        usage = result.report.usage
        return Seen(
            list(result.token_ids),
            hashlib.sha256(self.logits[-1]).hexdigest(),
            usage.prompt_tokens,
            usage.cache_read,
            result.text,
            result.report.hit_tier,
        )

    def evict(self) -> None:
        """Forget everything in memory that no turn is using."""
        self.engine(lambda engine: engine.pool.discard(list(engine.pool._evictable)))


def main() -> None:
    """Read jobs as JSON, answer each, then die as by a power switch."""
    jobs = json.loads(base64.b64decode(sys.argv[1]))
    answers = []
    for job in jobs:
        config = EngineConfig(**(job["config"] | {"cache_dir": Path(job["config"]["cache_dir"])}))
        seen = Driver(config).turn(job["history"], job["session"])
        answers.append(vars(seen))
    print(json.dumps(answers), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
