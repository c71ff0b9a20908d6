"""Watches the calls that graphs make of a model, and knows the least that each of them has to reuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent_memory_core import AgentMemory, SessionKey, TurnQueued
from agent_memory_core.blocks.block import common_prefix
from agent_memory_core.blocks.prefix_cache import MIN_BLOCK_PART, MIN_TAIL_PART
from agent_memory_core.engine.engine import Engine
from agent_memory_core.engine.events import Event


@dataclass
class Call:
    """One call of the model: its prompt, and the least it had to reuse."""

    key: SessionKey
    prompt: tuple[int, ...]
    floor: int
    turn: Any

    @property
    def read(self) -> int:
        """Prompt tokens that were not computed."""
        return int(self.turn.sequence.num_cached)

    @property
    def computed(self) -> int:
        """Prompt tokens that were."""
        return len(self.prompt) - self.read


class Watch:
    """Every call of one memory since it was cleared."""

    def __init__(self, memory: AgentMemory) -> None:
        self.memory = memory
        self.calls: list[Call] = []
        self._engine: Engine = memory._thread.call(lambda engine: engine).result()
        memory.observe(self._observe)

    def _observe(self, event: Event) -> None:
        if isinstance(event, TurnQueued):
            turn = self._engine.turns[event.turn.turn_id]
            prompt = tuple(turn.sequence.token_ids)
            block = self._engine.config.block_tokens
            known = [branch.token_ids for branch in _branches(self._engine, turn.key)]
            floor = max((_reusable(ids, prompt, block) for ids in known), default=0)
            self.calls.append(Call(turn.key, prompt, floor, turn))

    def lanes(self, thread_id: str) -> list[str]:
        """The lane of each branch of a session."""
        key = SessionKey(thread_id)
        return self.memory._thread.call(lambda e: [b.lane for b in _branches(e, key)]).result()


def _branches(engine: Engine, key: SessionKey) -> list[Any]:
    if key.session_id is None:
        return []
    return engine.sessions.open(engine.intake.root(key.namespace), (key.namespace, key.session_id)).branches


def _reusable(branch: Sequence[int], prompt: Sequence[int], block: int) -> int:
    """How much of a prompt a branch gives: what they share, but for a part too small to be worth restoring."""
    shared = min(common_prefix(branch, prompt), len(prompt) - 1)
    whole = shared // block * block
    smallest = MIN_TAIL_PART if whole == len(branch) // block * block else MIN_BLOCK_PART
    return shared if shared - whole >= smallest else whole
