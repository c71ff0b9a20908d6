"""Messages and reports, as every framework's adapter has them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import Message, TurnReport

logger = logging.getLogger("agent_memory")


def joined(parts: Iterable[tuple[str, bool]], joint: str) -> tuple[str, tuple[int, ...]]:
    """A message's content and its cache points, from texts, each with whether a cache point follows it."""
    text, points = "", []
    for part, is_marked in parts:
        if part:
            text += (joint if text else "") + part
        if is_marked and text:
            points.append(len(text))
    return text, tuple(dict.fromkeys(points))


def merge_leading_systems(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return ``messages`` with the leading system messages as one: most chat templates read the first one only.

    Raises:
        InvalidRequest: there are no messages.
    """
    if not messages:
        raise InvalidRequest("messages=[] is not valid: at least one message.")
    count = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    if count < 2:
        return tuple(messages)
    text, points = "", []
    for message in messages[:count]:
        text += ("\n\n" if text and message.content else "") + message.content
        points += [len(text) - len(message.content) + point for point in message.cache_points]
    return (Message("system", text, name=messages[0].name, cache_points=tuple(points)), *messages[count:])


def unreadable_part(kind: object) -> str:
    """What stands in a tool's result in the place of something that a text model cannot read; logs a warning.

    It is the same every time, so that the prompt is.
    """
    logger.warning("a tool's result holds a part of type %r, which this model cannot read", kind)
    return f"[a part of type {kind} that cannot be shown]"


def measurements(report: TurnReport) -> dict[str, Any]:
    """What an answer's metadata tells of its turn, in every framework. Times are in milliseconds."""
    return {
        "finish_reason": report.finish_reason,
        "hit_tier": report.hit_tier,
        "miss_reason": report.miss_reason,
        "restore_ms": round(report.restore_seconds * 1000, 3),
        "ttft_ms": round(report.time_to_first_token * 1000, 3),
        "session_id": report.session_id,
        "branch_id": report.branch_id,
        "persisted": report.persisted,
        "save_error": report.save_error or None,
        "lane": report.lane,
        "miss": dataclasses.asdict(report.miss) if report.miss else None,
    }
