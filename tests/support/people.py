"""Agents for tests of coordination, and what their turns may cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agent_memory_core import AgentMemory
from agent_memory_core.coordination import Book, view

FRAME = 24
"""Tokens that a chat template may put around a user message, its answer's beginning included."""


def people(*names: str, **more: Any) -> list[dict[str, Any]]:
    """Agents of these ids, with equal other fields."""
    return [{"agent_id": name, **more} for name in names]


def tokens_heard(memory: AgentMemory, book: Book) -> list[int]:
    """For each turn, the tokens of what the agent had heard since its last one and of its cue."""
    found = []
    for once in book.spoken:
        before = tuple(other for other in book.spoken if other.seq < once.seq)
        then = replace(book, events=book.events[: once.upto], spoken=before)
        user = f"{view(then, once.agent_id).waiting}\n\n{once.cue}"
        found.append(len(memory.encode(user)))
    return found
