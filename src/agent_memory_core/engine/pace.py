"""How many tokens one chunk of a prompt may have, so that nobody waits long behind it.

Whoever arrives while a prompt is evaluated waits for the chunk in progress. How long that takes depends on the model
and the machine, so the first chunks are timed. What was found is recorded and never changed afterwards: where a prompt
is cut decides the last bits of its logits, and a session must give the same ones after a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from agent_memory_core.errors import StoreError
from agent_memory_core.storage.catalog import Catalog

log = logging.getLogger("agent_memory")

CHUNK_SECONDS: Final = 0.25
"""How long a chunk should take at most."""
FIRST_TOKENS: Final = 256
"""Tokens of a chunk until its speed is known."""
MOST_TOKENS: Final = 2048
LEAST_TOKENS: Final = 32
SAMPLES: Final = 3
"""Chunks that are timed. The fastest one counts, because other work on the machine only makes them slower."""
_HOPELESS: Final = 4
"""A chunk that took so many times as long as it should settles the matter by itself."""


class PrefillPace:
    """The size of chunks for one model on one machine.

    Args:
        key: what the size holds for.
        catalog: where it is recorded; None keeps it for this engine only.
        later: runs what writes to the disk.
    """

    def __init__(
        self, key: str, catalog: Catalog | None, later: Callable[[Callable[[], None]], None]
    ) -> None:
        self._key, self._catalog, self._later = key, catalog, later
        self._speeds: list[float] = []
        self._is_first = True
        recorded = catalog.note(key) if catalog is not None else None
        self._tokens = _read(recorded) if recorded is not None else None

    @property
    def tokens(self) -> int:
        """Most tokens of a chunk."""
        return self._tokens or FIRST_TOKENS

    def took(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens was evaluated in so many seconds."""
        first, self._is_first = self._is_first, False
        # The first chunk also loads kernels, and short ones say little about long ones.
        if self._tokens is not None or first or tokens < FIRST_TOKENS // 2:
            return
        self._speeds.append(seconds / tokens)
        fastest = min(self._speeds)
        if len(self._speeds) >= SAMPLES or fastest * FIRST_TOKENS > _HOPELESS * CHUNK_SECONDS:
            size = self._tokens = tokens_in_time(fastest)
            self._later(lambda: self._write(size))

    def _write(self, size: int) -> None:
        if self._catalog is not None:
            try:
                self._catalog.write_note(self._key, str(size))
            except StoreError as error:
                log.warning("the size of a chunk could not be recorded: %s", error)


def tokens_in_time(seconds_per_token: float) -> int:
    """The greatest power of two of tokens that takes no longer than a chunk should, within its limits."""
    size = LEAST_TOKENS
    while size < MOST_TOKENS and 2 * size * seconds_per_token <= CHUNK_SECONDS:
        size *= 2
    return size


def _read(recorded: str) -> int | None:
    """A recorded size; None if it cannot be read, as if it had never been recorded."""
    if recorded.isdecimal() and LEAST_TOKENS <= int(recorded) <= MOST_TOKENS:
        return int(recorded)
    log.warning("the recorded size of a chunk cannot be read, so it is measured again: %r", recorded)
    return None
