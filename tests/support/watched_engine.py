"""An engine that is stepped by the test, and shows what it evaluates and samples from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from support import families
from support.engine_driver import RecordingSink, SteppedEngine

from agent_memory_core import (
    ChatRequest,
    EngineConfig,
    FirstToken,
    Message,
    SamplingParams,
    SessionKey,
    TurnEvent,
    TurnFinished,
    TurnProgress,
    TurnQueued,
)
from agent_memory_core.engine.events import Event
from agent_memory_core.storage.block_store import BlockStore

BLOCK = 64
MIB = 2**20
Talk = list[Message]


class Watched:
    """An engine, the chunks that it evaluates, the logits it samples first tokens from, and its last live cache."""

    def __init__(self, name: str, store: Path | None, **settings: Any) -> None:
        ours: dict[str, Any] = {"block_tokens": BLOCK, "prefill_chunk": 256, "prefill_chunk_busy": 64}
        config = EngineConfig(model=name, **({"kv_bits": None} | ours | settings))
        self.store = BlockStore(store) if store is not None else None
        self.engine = SteppedEngine(families.loaded(name), config, 64 * MIB, self.store)
        self.chunks: list[list[int]] = []
        self.logits: list[mx.array] = []
        self.prompts: list[list[int]] = []
        self.live: list[Any] = []
        self.engine.observers.add(self._observe)

    def _observe(self, event: Event) -> None:
        if not isinstance(event, TurnEvent):
            return
        turn = self.engine.turns.get(event.turn.turn_id)
        if isinstance(event, TurnQueued):
            assert turn is not None
            self.prompts.append(list(turn.sequence.token_ids))
        elif isinstance(event, TurnProgress):
            assert turn is not None
            self.chunks.append(turn.sequence.token_ids[event.start : event.stop])
        elif isinstance(event, FirstToken):
            self.logits.append(event.logits)
        elif isinstance(event, TurnFinished):
            assert turn is not None
            assert turn.slot is not None
            self.live = turn.slot.cache

    def start(self, talk: Talk, session: str | None = "s", new: int = 8, **sampling: Any) -> RecordingSink:
        sink = RecordingSink()
        params = SamplingParams(max_tokens=new, **sampling)
        self.engine.submit(ChatRequest(tuple(talk), sampling=params), SessionKey(session), sink)
        return sink

    def run(self) -> None:
        for _ in range(5000):
            if not self.engine.busy:
                self.engine.flush()
                return
            if not self.engine.step():
                time.sleep(0.001)  # blocks are being read
            self.engine.scheduler.check()
        raise AssertionError("the engine does not come to an end")

    def turn(self, talk: Talk, session: str | None = "s", new: int = 8, **sampling: Any) -> RecordingSink:
        self.chunks.clear()
        sink = self.start(talk, session, new, **sampling)
        self.run()
        usage = sink.report.usage
        computed = sum(map(len, self.chunks))
        assert computed == usage.prompt_tokens - usage.cache_read, "what is reported is what was skipped"
        return sink

    def evict(self) -> None:
        self.engine.evict()

    def close(self) -> None:
        self.engine.close()
