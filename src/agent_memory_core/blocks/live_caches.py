"""Live caches of turns that have ended, kept so that the next turn of a branch need not restore them.

Pure books: what a live cache is, only the package ``kv`` knows. A cache that is kept holds exactly the bits that
restoring its records would give, so whether one is at hand changes the time of a turn and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from agent_memory_core.blocks.block import BlockHash
from agent_memory_core.blocks.match import Match


@dataclass(frozen=True, slots=True, eq=False)
class LiveCache:
    """The keys and values of one branch's tokens in the form in which the model uses them."""

    root: BlockHash
    """The root of its chain."""
    names: tuple[BlockHash, ...]
    """Names of its full blocks."""
    tail: BlockHash | None
    """Name of the tail after them; None if there is none."""
    tokens: int
    """How many tokens it holds."""
    nbytes: int
    """Bytes of its buffers."""
    kv: Any = field(repr=False)
    """The cache itself."""

    def holds(self, root: BlockHash, match: Match) -> bool:
        """Whether its first tokens are made of the records of a match, so that they have the same bits."""
        count, end = len(match.blocks), match.end
        if self.root != root or len(self.names) < count:
            return False
        if count and self.names[count - 1] != match.blocks[-1].key:
            return False
        return end is None or end.key == (self.names[count] if count < len(self.names) else self.tail)


class LiveCaches:
    """The live caches at hand, the one that was used last at the end."""

    def __init__(self) -> None:
        self._caches: list[LiveCache] = []
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._caches)

    def add(self, cache: LiveCache) -> None:
        """Keep a cache."""
        self._caches.append(cache)
        self.nbytes += cache.nbytes

    def find(self, root: BlockHash, match: Match) -> LiveCache | None:
        """A cache that begins with what was matched; preferably one that holds nothing more."""
        found = [cache for cache in self._caches if cache.holds(root, match)]
        exact = [cache for cache in found if cache.tokens == match.tokens]
        return next(iter([*exact, *found]), None)

    def remove(self, cache: LiveCache) -> None:
        """Let go of a cache."""
        self._caches.remove(cache)
        self.nbytes -= cache.nbytes

    def drop_oldest(self) -> None:
        """Let go of the cache that was used least recently."""
        self.remove(self._caches[0])

    def discard(self, keys: Collection[BlockHash]) -> None:
        """Let go of the caches that hold something of the records with these names."""
        for cache in list(self._caches):
            if cache.tail in keys or any(name in keys for name in cache.names):
                self.remove(cache)
