"""The memory budget in bytes: which blocks are held, and which is evicted next.

A block in the pool is in one of two states:

    held       ref_count > 0: some running sequence reads it; it is never evicted
    evictable  ref_count == 0: it can be found by its hash; the least recently used one is evicted first

Besides blocks the budget covers *reservations*: bytes of the live caches of running turns, which are reserved before
they are allocated; and *live caches* of turns that have ended. The latter are a convenience: beyond their share of the
budget they are dropped before any block is evicted, and within it before a turn is refused its place.
Invariant: bytes of held and evictable blocks + reserved bytes + bytes of live caches <= budget. An evicted block is
simply dropped: what has to survive was written to disk when it was committed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from agent_memory_core.blocks.block import Block, BlockHash
from agent_memory_core.blocks.live_caches import LiveCache, LiveCaches


class BlockPool:
    """All records in memory, under one byte budget.

    Args:
        budget_bytes: most bytes of everything together.
        live_share_bytes: up to so many bytes of live caches, the least recently used block goes before they do.
    """

    def __init__(self, budget_bytes: int, live_share_bytes: int = 0) -> None:
        self.budget = budget_bytes
        self.live = LiveCaches()
        self._live_share = live_share_bytes
        self.evicted = 0
        self._evictable: OrderedDict[BlockHash, Block] = OrderedDict()
        self._held: dict[BlockHash, Block] = {}
        self._starts: dict[BlockHash, dict[BlockHash, None]] = {}
        self.changes = 0
        """How many records came or went: while it stays, so does what can be found here."""
        self._block_bytes = 0
        self._held_bytes = 0
        self._reserved = 0

    def __len__(self) -> int:
        return len(self._evictable) + len(self._held)

    def __contains__(self, key: BlockHash) -> bool:
        return key in self._evictable or key in self._held

    @property
    def used(self) -> int:
        """Bytes of all blocks, reservations and live caches."""
        return self._block_bytes + self._reserved + self.live.nbytes

    @property
    def block_bytes(self) -> int:
        """Bytes of all blocks, held and evictable."""
        return self._block_bytes

    @property
    def reserved(self) -> int:
        """Bytes reserved for live caches."""
        return self._reserved

    def get(self, key: BlockHash) -> Block | None:
        """Find a block without touching its place in the eviction order."""
        return self._held.get(key) or self._evictable.get(key)

    def starting(self, starts: Iterable[BlockHash], most: int) -> list[Block]:
        """Records that have one of these starts, see `block.start_name`; of each the ``most`` that came last."""
        keys = [key for start in starts for key in list(self._starts.get(start, ()))[-most:]]
        return [block for block in map(self.get, keys) if block is not None]

    def put(self, block: Block) -> Block | None:
        """Add an evictable block, evicting others as needed; return the block that now has its name.

        If there is a block with its name already, that one stays: the new one may differ in its last bits, and what
        others read must not change. None means that the budget has no room for it.
        """
        known = self.get(block.hash)
        if known is not None:
            return known
        if not self._make_room(block.nbytes):
            return None
        self._evictable[block.hash] = block
        self._starts.setdefault(block.start, {})[block.hash] = None
        self._block_bytes += block.nbytes
        self.changes += 1
        return block

    def hold(self, block: Block) -> None:
        """Keep a block of the pool from eviction until `release`."""
        assert block.hash in self, "only a block of the pool can be held"
        block.ref_count += 1
        if block.ref_count == 1:
            self._held[block.hash] = self._evictable.pop(block.hash)
            self._held_bytes += block.nbytes

    def release(self, blocks: Iterable[Block]) -> None:
        """Stop holding blocks of one sequence, given in token order: the last of them is evicted first."""
        for block in reversed(list(blocks)):
            assert block.ref_count > 0, "a block was released more often than held"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._evictable[block.hash] = self._held.pop(block.hash)
                self._held_bytes -= block.nbytes

    def touch(self, keys: Iterable[BlockHash]) -> None:
        """Mark evictable blocks of one sequence, given in token order, as just used."""
        for key in reversed(list(keys)):
            if key in self._evictable:
                self._evictable.move_to_end(key)

    def discard(self, keys: Iterable[BlockHash]) -> int:
        """Drop evictable blocks with these names; return how many were dropped."""
        names = set(keys)
        self.live.discard(names)
        dropped = [self._remove_evictable(key) for key in names if key in self._evictable]
        return len(dropped)

    def evict_all(self) -> None:
        """Evict every block that nobody holds, and every live cache."""
        while len(self.live):
            self.live.drop_oldest()
        while self._evictable:
            self._remove_evictable(next(iter(self._evictable)))
            self.evicted += 1

    def has_room_to_live(self, nbytes: int) -> bool:
        """Whether a live cache of so many bytes may be kept: in its share of the budget, or where nothing else is."""
        others = self._block_bytes + self._reserved
        return nbytes <= min(self.available(), max(self._live_share, self.budget - others))

    def keep_live(self, cache: LiveCache) -> None:
        """Keep a live cache for which there is room; older ones go first."""
        assert self.has_room_to_live(cache.nbytes)
        most = max(self._live_share, self.budget - self._block_bytes - self._reserved)
        while len(self.live) and self.live.nbytes + cache.nbytes > most:
            self.live.drop_oldest()
        made = self._make_room(cache.nbytes)
        assert made
        self.live.add(cache)

    def reserve(self, nbytes: int) -> bool:
        """Reserve bytes for a live cache, evicting blocks as needed; return whether there is room."""
        if not self._make_room(nbytes):
            return False
        self._reserved += nbytes
        return True

    def unreserve(self, nbytes: int) -> None:
        """Return reserved bytes to the budget."""
        assert 0 <= nbytes <= self._reserved, "more bytes returned than reserved"
        self._reserved -= nbytes

    def available(self) -> int:
        """Bytes that could be reserved if every evictable block and every live cache were dropped."""
        return self.budget - self._reserved - self._held_bytes

    def check(self) -> None:
        """Assert every invariant of the pool."""
        blocks = [*self._evictable.values(), *self._held.values()]
        assert self._block_bytes == sum(block.nbytes for block in blocks)
        assert self._held_bytes == sum(block.nbytes for block in self._held.values())
        assert self.used <= self.budget
        assert not self._evictable.keys() & self._held.keys()
        assert all(block.ref_count == 0 for block in self._evictable.values())
        assert all(block.ref_count > 0 for block in self._held.values())
        listed = {key for keys in self._starts.values() for key in keys}
        assert listed == self._evictable.keys() | self._held.keys()

    def _make_room(self, nbytes: int) -> bool:
        if nbytes > self.available():
            return False
        while self.used + nbytes > self.budget:
            if len(self.live) and (self.live.nbytes > self._live_share or not self._evictable):
                self.live.drop_oldest()
            else:
                self._remove_evictable(next(iter(self._evictable)))
                self.evicted += 1
        return True

    def _remove_evictable(self, key: BlockHash) -> Block:
        block = self._evictable.pop(key)
        siblings = self._starts[block.start]
        del siblings[key]
        if not siblings:
            del self._starts[block.start]
        self.changes += 1
        self._block_bytes -= block.nbytes
        return block
