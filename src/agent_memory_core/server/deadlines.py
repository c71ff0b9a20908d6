"""How long an answer may take: what its client asks for, within what the settings allow."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Mapping
from typing import TypeVar

from agent_memory_core.server.errors import INVALID, TIMEOUT, ApiError
from agent_memory_core.server.settings import WHOLE_SECONDS, ServerSettings

T = TypeVar("T")


def time_limit(headers: Mapping[str, str], settings: ServerSettings, *, stream: bool) -> float | None:
    """The seconds that an answer gets; None is no limit. ``headers`` have lower-case names.

    Whoever waits for a whole answer sees nothing of it until its end, so one that never ends has to be given up.

    Raises:
        ApiError: the client's seconds are no number above zero.
    """
    limits = [seconds for seconds in (_asked(headers), settings.timeout) if seconds is not None]
    return min(limits, default=None if stream else WHOLE_SECONDS)


async def within(seconds: float | None, work: Awaitable[T]) -> T:
    """The result of ``work``, which is given up after so many seconds.

    Raises:
        ApiError: they were not enough.
    """
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as late:
        raise ApiError(
            TIMEOUT,
            f"There was no answer within {seconds:g} seconds: allow more, or ask again, which goes on from what was "
            "computed.",
        ) from late


def _asked(headers: Mapping[str, str]) -> float | None:
    given = headers.get("x-request-timeout")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ApiError(INVALID, f"X-Request-Timeout={given!r} is not valid: seconds above 0.")
    return seconds
