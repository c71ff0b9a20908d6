"""What the engine's process holds for the pages: a memory, its sessions of agents, and a manager of models."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import cached_property, partial
from typing import NamedTuple, Self

from agent_memory_core import AgentMemory, BlocksEvicted, SessionInfo, SessionKey, TurnEvent, TurnFinished
from agent_memory_core.coordination import (
    CoordinationService,
    Step,
    Transcript,
    load_scenario,
    route,
    stream_phase,
)
from agent_memory_core.coordination.scenario import Routing
from agent_memory_core.manager import ManagerConfig, ModelConfig, ModelManager
from agent_memory_core.manager.events import EVENTS

CONFIG_VARIABLE = "AGENT_MEMORY_MANAGER_CONFIG"
"""The same as of `agent-memory manager`."""

ROOM = 160
"""MiB for the models where no configuration is given: two of them fit, and a third one makes one of them leave."""

MODELS = tuple(
    ModelConfig(
        name=name,
        type="mlx",
        path="tiny-chat",
        memory_priority=priority,
        context_length=context,
        max_idle_time=None,
        parameters={"memory_budget_mb": 64},
    )
    for name, priority, context in (("planner", 1, 8192), ("writer", 3, 4096), ("critic", 5, 2048))
)
"""The embedded model three times, each with an engine of its own."""


class Stored(NamedTuple):
    """A session on disk."""

    info: SessionInfo
    tier: str
    """Where the known tokens of its last turn came from; "disk" where this process had no turn of it."""


class Happened(NamedTuple):
    """Something that became of a model."""

    when: float
    """Seconds since the epoch."""
    event: str
    model: str


class Desk:
    """Each thing is opened when it is asked for first, and closed at the end."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._tiers: dict[tuple[str, str], str] = {}
        self._happened: deque[Happened] = deque(maxlen=20)

    @cached_property
    def memory(self) -> AgentMemory:
        """The memory, with the settings of the environment; its model is loaded, so that no turn waits for that."""
        memory = self._open.enter_context(AgentMemory())
        memory.observe(self._seen)
        memory.load()
        return memory

    @cached_property
    def service(self) -> CoordinationService:
        """Sessions of agents on the memory."""
        return self._open.enter_context(CoordinationService(self.memory))

    @cached_property
    def manager(self) -> ModelManager:
        """The manager of the configuration that the environment names, or of `MODELS`."""
        path = os.environ.get(CONFIG_VARIABLE)
        config = ManagerConfig.from_file(path) if path else ManagerConfig(max_memory_mb=ROOM, models=MODELS)
        manager = self._open.enter_context(ModelManager(config))
        for event in EVENTS:
            manager.register_callback(event, self._noting(event))
        return manager

    # What pages ask that is no single call of these -----------------------------------------------------------

    def phase(self, name: str, run: Transcript, prefix: str) -> Generator[Step, None, Transcript]:
        """The next phase of a scenario, as it happens; see `stream_phase`."""
        scenario = load_scenario(name)
        if not run.phases:
            self.service.delete_persistent(prefix)
        return stream_phase(scenario, self.service, scenario.phases[len(run.phases)], run, prefix=prefix)

    def routed(self, session_id: str, routing: Routing, question: str) -> tuple[str, str]:
        """Who answers a question by the router's choice, and what; see `route`."""
        return route(self.service, session_id, routing, question)

    def stored(self) -> list[Stored]:
        """The sessions on disk, the most recently used first."""
        return [
            Stored(info, self._tiers.get((info.namespace, info.session_id), "disk"))
            for info in self.memory.sessions()
        ]

    def cold(self, session_id: str, agent_id: str) -> float:
        """Seconds to the first token of an agent's last prompt where nothing of it is known."""
        prompt = self.service.last_prompt(session_id, agent_id)
        # A namespace shares nothing with others, and without a session nothing is stored.
        key = SessionKey(None, namespace=f"cold-{time.time_ns()}")
        return self.memory.chat(prompt, key, max_tokens=1).report.time_to_first_token

    def happened(self) -> list[Happened]:
        """What became of models, the latest first."""
        return list(reversed(self._happened))

    def ask_model(self, name: str, words: str) -> str:
        """The answer of a managed model, which is loaded for it."""
        messages = [{"role": "user", "content": words}]
        return str(self.manager.get_model(name).chat(messages, session="page", max_tokens=48).text)

    def load_model(self, name: str) -> None:
        """Load a managed model."""
        self.manager.get_model(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _seen(self, event: TurnEvent | BlocksEvicted) -> None:
        if isinstance(event, TurnFinished) and event.turn.key.session_id is not None:
            self._tiers[event.turn.key.namespace, event.turn.key.session_id] = event.report.hit_tier

    def _noting(self, event: str) -> Callable[[str], object]:
        return partial(self._note, event)

    def _note(self, event: str, name: str) -> None:
        self._happened.append(Happened(time.time(), event, name))
