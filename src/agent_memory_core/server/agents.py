"""Agents by an id, whose conversation the server keeps, so that a client sends only what is new."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent_memory_core import Delta, SessionInfo
from agent_memory_core.agents import AgentInfo, AgentTurn, PersistentAgentManager
from agent_memory_core.server.host import Host
from agent_memory_core.server.settings import ServerSettings


class Agents:
    """The managers of agents: one for each namespace of each model. No call belongs on the event loop."""

    def __init__(self, host: Host, settings: ServerSettings) -> None:
        self._host = host
        # A turn must not wait for a place that other turns hold.
        self._places = settings.max_in_flight
        self._lock = threading.Lock()
        self._managers: dict[tuple[str, str], PersistentAgentManager] = {}

    def of(self, namespace: str, served: str) -> PersistentAgentManager:
        """The agents of a namespace, on the model that is served by that name."""
        memory = self._host.engine(served)
        with self._lock:
            manager = self._managers.get((namespace, served))
            if manager is None or manager.memory is not memory:
                if manager is not None:
                    manager.close()
                manager = PersistentAgentManager(memory=memory, namespace=namespace, max_agents=self._places)
                self._managers[namespace, served] = manager
            return manager

    def close(self) -> None:
        """Close their books."""
        with self._lock:
            for manager in self._managers.values():
                manager.close()
            self._managers.clear()


@dataclass(frozen=True)
class Recorder:
    """Writes an agent's turn down when its last delta was read."""

    turn: AgentTurn

    async def add(self, delta: Delta) -> None:
        """Take a delta of the answer."""
        if (report := self.turn.add(delta)) is not None:
            await self.turn.afinish(report)

    def give_up(self) -> None:
        """The turn is over; nothing is written down of one that has no last delta."""
        self.turn.give_up()


def described(manager: PersistentAgentManager, agent_id: str | None = None) -> list[dict[str, Any]]:
    """All agents for the wire, the one used last first, or the one of an id."""
    sessions = {info.session_id: info for info in manager.memory.sessions(manager.namespace)}
    agents = [info for info in manager.list_agents() if agent_id in (None, info.agent_id)]
    return [_described(info, sessions) for info in agents]


def _described(info: AgentInfo, sessions: Mapping[str, SessionInfo]) -> dict[str, Any]:
    # The disk budget may have taken what was computed; the conversation stays.
    session = sessions.get(info.agent_id)
    return {
        "agent_id": info.agent_id,
        "agent_type": info.agent_type,
        "model_id": info.model,
        "messages": info.messages,
        "in_memory": info.in_memory,
        "cache_size_tokens": session.tokens if session is not None else 0,
        "file_size_bytes": session.nbytes if session is not None else 0,
        "pinned": session is not None and session.pinned,
        "created": info.created.timestamp(),
        "last_accessed": info.last_access.timestamp(),
    }
