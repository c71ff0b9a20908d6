"""Drives a real engine and records the logits that each first token was sampled from.

Its `main` does one turn of several conversations in a process of its own and then kills itself with SIGKILL, as soon
as the answers have been handed out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from agent_memory_core import (
    AgentMemory,
    ChatResult,
    Delta,
    EngineConfig,
    FirstToken,
    SessionKey,
    TurnProgress,
    TurnQueued,
)
from agent_memory_core.engine.engine import Engine
from agent_memory_core.engine.events import Event, Observers
from agent_memory_core.engine.results import Result
from agent_memory_core.models.loader import LoadedModel
from agent_memory_core.storage.block_store import BlockStore

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


class SteppedEngine(Engine):
    """An engine without a thread: a test steps it, and what its disk has done is taken before each step."""

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, memory_bytes: int, store: BlockStore | None
    ) -> None:
        self.results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self.observers = Observers()
        super().__init__(loaded, config, memory_bytes, store, self.results, self.observers)

    @property
    def busy(self) -> bool:
        """Whether any turn is in flight."""
        return bool(self.turns)

    def step(self) -> bool:
        self._take_results()
        return super().step()

    def flush(self) -> None:
        """Wait until every turn that has ended is on disk, and hand its last delta out."""
        self.disk.flush()
        self._take_results()

    def close(self, *, keep_store: bool = False) -> None:
        super().close(keep_store=keep_store)
        self._take_results()

    def evict(self) -> None:
        """Forget everything in memory that no turn is using."""
        self.pool.discard(list(self.pool._evictable))

    def _take_results(self) -> None:
        while not self.results.empty():
            self.take(self.results.get())


def chunks(engine: SteppedEngine) -> list[tuple[int, int]]:
    """Record which turn gets each prefill chunk, and how long the chunk is."""
    seen: list[tuple[int, int]] = []

    def observe(event: Event) -> None:
        if isinstance(event, TurnProgress):
            seen.append((event.turn.turn_id, event.stop - event.start))

    engine.observers.add(observe)
    return seen


def run(engine: SteppedEngine, until: Callable[[], bool], most: int = 2000) -> int:
    """Step until something holds; return how many steps it took."""
    for steps in range(most):
        if until():
            return steps
        if not engine.step():
            # A disk is read or written meanwhile.
            time.sleep(0.005)
        engine.scheduler.check()
    raise AssertionError(f"nothing happened within {most} steps")


class Driver:
    """One memory with its prompts' ids and last-chunk logits recorded on the way by."""

    def __init__(self, config: EngineConfig) -> None:
        self.memory = AgentMemory(config)
        self.logits: list[bytes] = []
        self.prompts: list[list[int]] = []
        self._engine: Engine = self.engine(lambda engine: engine)
        self.memory.observe(self._observe)

    def engine(self, function: Any) -> Any:
        """Run a function on the engine's thread."""
        return self.memory._thread.call(function).result()

    def _observe(self, event: Event) -> None:
        if isinstance(event, TurnQueued):
            self.prompts.append(list(self._engine.turns[event.turn.turn_id].sequence.token_ids))
        if isinstance(event, FirstToken):
            self.logits.append(bytes(memoryview(event.logits.astype(mx.float32))))

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
