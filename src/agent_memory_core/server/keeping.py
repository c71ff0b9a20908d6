"""How long a model stays in memory after its last turn: what the settings say, or that turn's request.

Requests say it as clients of other local servers do: `ttl` in seconds, or `keep_alive` in seconds or as "10m".
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress

from agent_memory_core.server.errors import INVALID, ApiError

FIELDS = ("keep_alive", "ttl")
"""The fields of requests; where both are there, the first one counts."""

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}


def kept_for(body: Mapping[str, object]) -> float | None:
    """The seconds for which a request wants its model kept, infinity for ever; None where it does not say it.

    Raises:
        ApiError: they cannot be read.
    """
    name = next((name for name in FIELDS if body.get(name) is not None), None)
    if name is None:
        return None
    seconds = _seconds(body[name])
    if seconds is None:
        message = (
            f'{name}={body[name]!r} is not valid: seconds, or a time such as "10m"; below 0 is for ever.'
        )
        raise ApiError(INVALID, message, param=name)
    return math.inf if seconds < 0 else seconds


def _seconds(value: object) -> float | None:
    if isinstance(value, str):
        return _of_text(value.strip())
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return float(value)


def _of_text(text: str) -> float | None:
    """The seconds of a text; its parts add up."""
    size = text.removeprefix("-")
    if re.fullmatch(r"\d+(\.\d+)?", size):
        return float(text)
    if not re.fullmatch(f"(?:{_PART.pattern})+", size):
        return None
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(size))
    return -seconds if size != text else seconds


class Keeping:
    """For how long each model stays."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}
        self._is_asked = asyncio.Event()

    def ended(self, model: str, seconds: float | None) -> None:
        """A turn of a model has ended, whose request wanted it kept for so long; None leaves it to the settings."""
        self._asked.pop(model, None)
        if seconds is not None:
            self._asked[model] = seconds
            self._is_asked.set()

    def freed(self, model: str) -> None:
        """A model is not in memory any more; the next turn says anew how long it stays."""
        self._asked.pop(model, None)

    async def asked(self, seconds: float) -> None:
        """Wait until a request has wanted something, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_asked.wait()
        self._is_asked.clear()

    def limits(self, models: Iterable[str], usual: float | None) -> dict[str, float]:
        """The seconds without a turn after which each model is freed, of those that are freed some time."""
        limits = {model: self._asked.get(model, math.inf if usual is None else usual) for model in models}
        return {model: seconds for model, seconds in limits.items() if seconds < math.inf}
