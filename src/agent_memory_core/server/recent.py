"""The turns that ended last, one by one: what a page can plot, and what is known of a session's last turn."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from typing import Any

from agent_memory_core import BlocksEvicted, TurnEvent, TurnFinished, TurnReport
from agent_memory_core.server.host import Host

MOST_TURNS = 512
MOST_SESSIONS = 4096

Owner = tuple[str, str]
"""Namespace and session id."""


class RecentTurns:
    """The last `MOST_TURNS` turns of all sessions, and the last one of each of `MOST_SESSIONS` sessions.

    It holds counts and times and not a word of a prompt.
    """

    def __init__(self, host: Host) -> None:
        self._lock = threading.Lock()
        self._turns: deque[dict[str, Any]] = deque(maxlen=MOST_TURNS)
        self._last: OrderedDict[Owner, dict[str, Any]] = OrderedDict()
        self.close = host.observe(self._observe)

    def all(self) -> list[dict[str, Any]]:
        """The turns, the oldest first."""
        with self._lock:
            return list(self._turns)

    def last(self, owner: Owner) -> dict[str, Any] | None:
        """The last turn of a session; None where it had none since the server began."""
        with self._lock:
            return self._last.get(owner)

    def _observe(self, event: TurnEvent | BlocksEvicted) -> None:
        """Runs on the engine's thread."""
        if not isinstance(event, TurnFinished) or event.turn.background:
            return
        key = event.turn.key
        turn = _described(event.report) | {"namespace": key.namespace, "session_id": key.session_id}
        with self._lock:
            self._turns.append(turn)
            if key.session_id is None:
                return
            owner = (key.namespace, key.session_id)
            self._last[owner] = turn
            self._last.move_to_end(owner)
            if len(self._last) > MOST_SESSIONS:
                self._last.popitem(last=False)


def _described(report: TurnReport) -> dict[str, Any]:
    """A turn for the wire; ``ended`` is in seconds since the epoch, other times are in seconds."""
    usage = report.usage
    return {
        "ended": round(time.time(), 3),
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cache_read,
        "completion_tokens": usage.completion_tokens,
        "hit_tier": report.hit_tier,
        "miss_reason": report.miss_reason,
        "time_to_first_token": report.time_to_first_token,
        "total_seconds": report.total_seconds,
    }
