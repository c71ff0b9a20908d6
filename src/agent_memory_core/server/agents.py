"""Agents by an id: a system prompt and a conversation that the server keeps, so that a client sends only what is new.

An agent is a session on disk and the text of its conversation beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

from agent_memory_core import ChatHistory, ChatRequest, Message, SessionInfo, SessionKey
from agent_memory_core.server.errors import BUSY, NOT_FOUND, UNSUPPORTED, ApiError
from agent_memory_core.server.host import Host

PREFIX = "agent:"
"""How the session ids of agents begin, so that no session of a chat is taken for one."""

DEFAULT_PROMPT = "You are a helpful assistant."

Owner = tuple[str, str]
"""A namespace and an agent's id."""


def session_id(owner: Owner) -> str:
    """The session of an agent."""
    return PREFIX + owner[1]


def as_messages(history: Sequence[dict[str, str]]) -> tuple[Message, ...]:
    """A conversation for the model."""
    return tuple(Message(entry["role"], entry["content"]) for entry in history)


class Agents:
    """The agents of a server. Every call but `turn_of` may wait for a disk, so none belongs on the event loop."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._turns: WeakValueDictionary[Owner, asyncio.Lock] = WeakValueDictionary()

    def turn_of(self, owner: Owner) -> asyncio.Lock:
        """Held while an agent answers: each of its turns begins where the one before has ended."""
        return self._turns.setdefault(owner, asyncio.Lock())

    def create(self, owner: Owner, system_prompt: str, *, pinned: bool) -> None:
        """Make an agent and compute its system prompt.

        Raises:
            ApiError: there is one with this id, or the server keeps nothing on disk.
            AgentMemoryError: the id or the prompt cannot be used.
        """
        history = self._history(owner)
        if history.read():
            raise ApiError(
                BUSY, f"There is an agent {owner[1]!r} already: choose another id.", param="agent_id"
            )
        text = [{"role": "system", "content": system_prompt}]
        self._prewarm(owner, text)
        history.write(text)
        if pinned:
            self._host.memory.pin(session_id(owner), owner[0])

    def read(self, owner: Owner) -> list[dict[str, str]]:
        """The conversation of an agent.

        Raises:
            ApiError: there is no such agent.
        """
        history = self._history(owner).read()
        if not history:
            raise ApiError(NOT_FOUND, f"There is no agent {owner[1]!r}: create it first.")
        return history

    def write(self, owner: Owner, history: list[dict[str, str]]) -> None:
        """Replace the conversation of an agent."""
        self._history(owner).write(history)

    def all_of(self, namespace: str) -> list[SessionInfo]:
        """The agents of a namespace, the most recently used first."""
        found = self._host.memory.sessions(namespace)
        return [info for info in found if info.session_id.startswith(PREFIX)]

    def info(self, owner: Owner) -> dict[str, Any]:
        """What is known of an agent. Raises as `read` does."""
        self.read(owner)
        known = [info for info in self.all_of(owner[0]) if info.session_id == session_id(owner)]
        # The disk budget may have taken what was computed; the conversation stays.
        return described(known[0]) if known else {"agent_id": owner[1], "cache_size_tokens": 0}

    def fork(self, owner: Owner, new_id: str) -> None:
        """Make an agent that knows what another one knows; nothing is computed or copied but the text."""
        text = self.read(owner)
        other = (owner[0], new_id)
        if self._history(other).read():
            raise ApiError(BUSY, f"There is an agent {new_id!r} already: choose another id.", param="new_id")
        self._host.memory.flush()
        self._host.memory.fork(session_id(owner), session_id(other), owner[0])
        self._history(other).write(text)

    def prewarm(self, owner: Owner) -> dict[str, int]:
        """Bring an agent back into memory before it is asked."""
        return self._prewarm(owner, self.read(owner))

    def release(self, owner: Owner) -> None:
        """Drop an agent from memory; it is read back from disk at its next turn."""
        self.read(owner)
        self._host.memory.release(session_id(owner), owner[0])

    def delete(self, owner: Owner) -> None:
        """Delete an agent for good."""
        self.read(owner)
        self._host.memory.forget(session_id(owner), owner[0])
        self._history(owner).delete()

    def _prewarm(self, owner: Owner, history: list[dict[str, str]]) -> dict[str, int]:
        request = ChatRequest(messages=as_messages(history))
        report = self._host.memory.prewarm(request, SessionKey(session_id(owner), namespace=owner[0]))
        return {"prompt_tokens": report.usage.prompt_tokens, "cached_tokens": report.usage.cache_read}

    def _history(self, owner: Owner) -> ChatHistory:
        history = self._host.memory.history(session_id(owner), owner[0])
        if history is None:
            raise ApiError(UNSUPPORTED, "Agents are kept on disk: start the server with a cache_dir.")
        return history


def described(info: SessionInfo) -> dict[str, Any]:
    """An agent for the wire."""
    return {
        "agent_id": info.session_id.removeprefix(PREFIX),
        "model_id": info.model,
        "cache_size_tokens": info.tokens,
        "file_size_bytes": info.nbytes,
        "pinned": info.pinned,
        "created": info.created,
        "last_accessed": info.last_use,
    }
