"""Sessions in which agents talk, for HTTP: a service for each namespace, and what its results are on the wire."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from agent_memory_core import AgentMemory, InvalidSetting
from agent_memory_core.coordination import (
    CoordinationService,
    Decision,
    Event,
    SessionSpec,
    SessionStatus,
    Step,
    Token,
    TurnStart,
)
from agent_memory_core.server.errors import UNSUPPORTED, ApiError
from agent_memory_core.server.host import Host
from agent_memory_core.server.settings import ServerSettings


class Talks:
    """The services of a server, one for each namespace. They are opened when they are asked for first."""

    def __init__(self, host: Host, settings: ServerSettings) -> None:
        self._host, self._path = host, settings.coordination_path
        self._lock = threading.Lock()
        self._engines: dict[str, AgentMemory] = {}
        self._services: dict[str, CoordinationService] = {}

    def service(self, namespace: str) -> CoordinationService:
        """The service of a namespace, on the models that are served now. It may wait for a disk.

        Raises:
            ApiError: what agents say may not be written down as it is.
        """
        with self._lock:
            # The first is the one of agents that name no model.
            engines = {name: self._host.engine(name) for name in self._host.names()}
            if list(engines.items()) != list(self._engines.items()):
                self._close()
                self._engines = engines
            if namespace not in self._services:
                self._services[namespace] = self._opened(namespace)
            return self._services[namespace]

    def _opened(self, namespace: str) -> CoordinationService:
        first = next(iter(self._engines.values()))
        try:
            return CoordinationService(first, self._path, namespace, self._engines)
        except InvalidSetting as error:
            raise ApiError(
                UNSUPPORTED,
                "The store is encrypted, and the file of these sessions would not be: start the server with "
                "coordination_path, a file where what agents say may lie as it is.",
            ) from error

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        for service in self._services.values():
            service.close()
        self._services.clear()


# On the wire ----------------------------------------------------------------------------------------------------


def status_body(status: SessionStatus) -> dict[str, Any]:
    """A session and where it stands."""
    spec = status.spec
    return {
        "session_id": status.session_id,
        "topology": spec.topology,
        "debate_format": spec.debate_format,
        "decision_mode": spec.decision_mode,
        "max_turns": spec.max_turns,
        "persistent_cache_prefix": spec.persistent_cache_prefix,
        "current_turn": status.turn,
        "is_active": status.is_active,
        "next_speaker": status.next_speaker,
        "question": status.question,
        "created": status.created,
        "agent_states": [
            {
                "agent_id": agent.agent_id,
                "display_name": agent.name,
                "role": agent.role,
                "lifecycle": agent.lifecycle,
                "message_count": agent.message_count,
            }
            for agent in status.agents
        ],
    }


def message_body(spec: SessionSpec, event: Event) -> dict[str, Any]:
    """Something that was said."""
    names = {agent.agent_id: agent.name for agent in spec.agents}
    return {
        "message_id": event.event_id,
        "sender_id": event.sender_id,
        "sender_name": names.get(event.sender_id, event.sender_id),
        "content": event.content,
        "turn_number": event.turn,
        "channel_type": event.kind,
        "visible_to": sorted(event.visible_to),
        "is_interrupted": event.interrupted,
    }


def messages_body(status: SessionStatus, events: Sequence[Event]) -> list[dict[str, Any]]:
    """All that was said."""
    return [message_body(status.spec, event) for event in events]


def decision_body(decision: Decision) -> dict[str, Any]:
    """What was decided."""
    body = asdict(decision)
    body["ballots"] = [asdict(ballot) | {"choice": ballot.choice} for ballot in decision.ballots]
    return body


def step_event(spec: SessionSpec, step: Step) -> tuple[str, dict[str, Any]]:
    """The name and the data of a streamed step."""
    if isinstance(step, TurnStart):
        return "turn_start", {"agent_id": step.agent_id, "turn_number": step.turn}
    if isinstance(step, Token):
        return "token", {"agent_id": step.agent_id, "text": step.text, "accumulated": step.accumulated}
    return "turn_complete", {"message": message_body(spec, step.event)}
