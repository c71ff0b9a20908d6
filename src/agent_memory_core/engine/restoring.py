"""What is stored of a prompt goes into a live cache: blocks from disk into the pool, from the pool onto the model."""

from __future__ import annotations

import time
from typing import Any

from agent_memory_core.blocks.block import Block
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.live_caches import LiveCache
from agent_memory_core.engine.model_runner import ModelRunner
from agent_memory_core.engine.persistence import Persistence
from agent_memory_core.engine.results import Loaded
from agent_memory_core.engine.scheduler import Scheduler
from agent_memory_core.engine.sequence import Sequence
from agent_memory_core.engine.turn import Turn
from agent_memory_core.kv.records import KvBlocks
from agent_memory_core.storage.record import Record


class Restoring:
    """Restores the admitted turns of one engine. Both calls say whether the turn is ready for its first chunk."""

    def __init__(
        self,
        blocks: KvBlocks,
        pool: BlockPool,
        scheduler: Scheduler,
        runner: ModelRunner,
        disk: Persistence,
        prefill_chunk: int,
    ) -> None:
        self._blocks = blocks
        self._pool = pool
        self._scheduler = scheduler
        self._runner = runner
        self._disk = disk
        self._prefill_chunk = prefill_chunk

    def begin(self, turn: Turn) -> bool:
        """Restore an admitted turn, or ask the disk for what is missing."""
        turn.restore_started = time.perf_counter()
        return self._load(turn)

    def loaded(self, turn: Turn, result: Loaded) -> bool:
        """Restore a turn for which the disk has answered, or ask it again for what another match needs.

        What has come so far is decoded while the disk reads on.
        """
        sequence = turn.sequence
        found = {block.hash: block for block in (self._usable(sequence, x) for x in result.blocks) if block}
        lost = self._scheduler.loaded(sequence, found)
        if not result.is_last:
            assert turn.restoration is not None
            turn.restoration.advance()
            return False
        if lost:
            # The first one is known to be lost; those after it were not even looked at.
            turn.unreadable.add(lost[0])
            self._scheduler.rematch(sequence, turn.unreadable)
            return self._load(turn)
        self._restore(turn)
        return True

    def _load(self, turn: Turn) -> bool:
        sequence = turn.sequence
        if (live := self._pool.live.find(sequence.root, sequence.match)) is not None:
            self._resume(turn, live)
            return True
        turn.restoration = self._blocks.restoring(sequence.match, self._room(sequence))
        missing = [hit.key for hit in sequence.match.missing]
        if missing:
            turn.tier = "warm"
            self._disk.load(turn.seq_id, sequence.root, missing)
            turn.restoration.advance()
            return False
        self._restore(turn)
        return True

    def _usable(self, sequence: Sequence, loaded: Record[Any]) -> Block | None:
        """The block for the pool, if its arrays have the right form."""
        tokens = self._tokens_of(sequence, loaded)
        if not self._blocks.fits(loaded.tensors, len(tokens), loaded.kind):
            return None
        return Block(loaded.key, loaded.parent, tokens, loaded.nbytes, loaded.tensors, loaded.kind)

    def _tokens_of(self, sequence: Sequence, loaded: Record[Any]) -> tuple[int, ...]:
        if loaded.key in sequence.hashes:
            # A catalog that was rebuilt from the files has lost the ids; the name alone proves them.
            start, stop = sequence.block_range(sequence.hashes.index(loaded.key))
            return tuple(sequence.token_ids[start:stop])
        return loaded.tokens

    def _room(self, sequence: Sequence) -> int:
        return min(sequence.remaining + 1, self._prefill_chunk)

    def _restore(self, turn: Turn) -> None:
        assert turn.restoration is not None
        self._start(turn, turn.restoration.finish())
        turn.restoration = None

    def _resume(self, turn: Turn, live: LiveCache) -> None:
        """Go on with the live cache of an earlier turn, which is no longer at hand for others then."""
        match = turn.sequence.match
        cache = self._blocks.resume_live(live, match)
        if cache is live.kv:
            self._pool.live.remove(live)
        self._start(turn, cache)

    def _start(self, turn: Turn, cache: list[Any]) -> None:
        sequence = turn.sequence
        if sequence.match.tokens and turn.tier == "none":
            turn.tier = "hot"
        self._scheduler.restored(sequence)
        turn.slot = self._runner.slot(
            sequence.seq_id, turn.request.sampling, cache, sequence.num_cached, turn.processors
        )
        turn.restore_seconds = time.perf_counter() - turn.restore_started if sequence.num_cached else 0.0
