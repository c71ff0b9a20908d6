"""What is kept of a turn: full blocks, the window records near places where it can be resumed, tails, its branch.

Everything is cut out of the live cache while it is there, and put into the pool; nothing here writes to disk. Which
records a place needs is for the model's `ResumePolicy` to say.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly
from typing import Any

from agent_memory_core.blocks.block import Block, BlockHash, record_hash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.blocks.live_caches import LiveCache
from agent_memory_core.engine.persistence import Persistence
from agent_memory_core.engine.turn import Turn
from agent_memory_core.kv.records import KvBlocks
from agent_memory_core.text.token_text import TokenText


class KvRetention:
    """Keeps the KV of one engine's turns. The disk tells what other processes have stored meanwhile."""

    def __init__(self, blocks: KvBlocks, pool: BlockPool, disk: Persistence, block_tokens: int) -> None:
        self._blocks = blocks
        self._policy = blocks.resume
        self._pool = pool
        self._disk = disk
        self._block_tokens = block_tokens

    # -- out of a live cache ------------------------------------------------------------------------------

    def seal(self, turn: Turn, cache: list[Any], first: int, last: int) -> list[Block]:
        """Encode full blocks ``first`` up to ``last``, and return those that are not stored yet."""
        blocks = self._blocks.seal(turn.sequence, cache, first, last)
        if self._policy.has_windows:
            self._take_windows(turn, cache, first, last)
        stored = self._stored([block.hash for block in blocks])
        return [block for block in blocks if block.hash not in stored]

    def completes_window(self, turn: Turn) -> bool:
        """Whether the last decoded token completed a block whose window record has to be taken now.

        The first decode step feeds two tokens, so the block may have been complete one token ago.
        """
        if not self._policy.has_windows or not turn.sequence.hashes:
            return False
        is_new = len(turn.sequence.hashes) - 1 not in turn.windows
        return is_new and len(turn.sequence.token_ids) % self._block_tokens <= 1

    def take_window(self, turn: Turn, cache: list[Any]) -> None:
        """Take the window record of the block that was completed last."""
        last = len(turn.sequence.hashes)
        self._take_windows(turn, cache, last - 1, last)

    def _take_windows(self, turn: Turn, cache: list[Any], first: int, last: int) -> None:
        """Take the window records of blocks ``first`` up to ``last``, and forget those that no place needs any more."""
        sequence, end = turn.sequence, last * self._block_tokens
        needed = self._policy.windows_near((*turn.checkpoints, end))
        new = [index for index in range(first, last) if index in needed and index not in turn.windows]
        names = {index: record_hash("window", sequence.hashes[index]) for index in new}
        stored = self._stored(list(names.values()))
        new = [index for index in new if names[index] not in stored and names[index] not in self._pool]
        turn.windows |= dict(zip(new, self._blocks.windows(sequence, cache, new), strict=True))
        turn.windows = {index: record for index, record in turn.windows.items() if index in needed}
        # Put into the pool at once: a turn that waits for its first chunk may begin as this prompt does.
        self._retain_windows(turn, [checkpoint for checkpoint in turn.checkpoints if checkpoint <= end])

    def checkpoint(self, turn: Turn, cache: list[Any], position: int) -> Block | None:
        """Keep what it takes, besides full blocks, to resume after ``position`` tokens; return the tail."""
        assert turn.slot is not None
        earlier = (checkpoint for checkpoint in turn.checkpoints if checkpoint < position)
        self._retain_windows(turn, [*earlier, position])
        tail = self._blocks.tail(turn.sequence, cache, position, turn.slot.fed)
        if tail is not None and tail.kind == "tail":
            self._retain(turn, tail)
        return tail

    def keep_live(self, turn: Turn, cache: list[Any], tail: Block | None) -> None:
        """Keep the live cache of a turn that has ended, brought into its stored form, if memory has room for it."""
        sequence = turn.sequence
        length, first = sequence.num_computed, len(sequence.match.blocks)
        nbytes = self._blocks.live_bytes(length)
        is_forgotten = turn.session is not None and turn.session.forgotten
        stays = self._blocks.layout.stays_live and length > 0 and not is_forgotten
        if not stays or not self._pool.has_room_to_live(nbytes):
            return
        names = tuple(sequence.hashes[: length // self._block_tokens])
        blocks = [block for block in map(self._pool.get, names[first:]) if block is not None]
        if len(blocks) < len(names) - first or (tail is not None and tail.kind != "tail"):
            return
        self._blocks.settle(cache, blocks, first * self._block_tokens, length)
        end = tail.hash if tail is not None else None
        self._pool.keep_live(LiveCache(sequence.root, names, end, length, nbytes, cache))

    def _retain_windows(self, turn: Turn, places: ReadOnly[int]) -> None:
        for index in sorted(self._policy.windows_near(places) & turn.windows.keys()):
            self._retain(turn, turn.windows[index])

    def _retain(self, turn: Turn, record: Block) -> None:
        turn.retained[record.hash] = self._pool.put(record) or record

    def _stored(self, names: ReadOnly[BlockHash]) -> set[BlockHash]:
        """Records that somebody stored while this turn computed them: those are used, and not stored again."""
        return self._disk.stored(names) if names else set()

    # -- into a branch ------------------------------------------------------------------------------------

    def dependencies(self, turn: Turn) -> frozenset[BlockHash]:
        """The records, besides blocks and its tail, that a branch needs to be resumed at its end and checkpoints."""
        if not self._policy.needs_checkpoints:
            return frozenset()
        sequence = turn.sequence
        checkpoints = [checkpoint for checkpoint in turn.checkpoints if checkpoint <= sequence.num_computed]
        needed = self._policy.windows_near((*checkpoints, sequence.num_computed))
        windows = {record_hash("window", sequence.hashes[i]) for i in needed if i < len(sequence.hashes)}
        if not self._policy.stops_at_checkpoints:
            return frozenset(windows)
        return frozenset(windows.union(sequence.tail_at(checkpoint) for checkpoint in checkpoints))

    def exclusive_records(self, branch: Branch[TokenText]) -> set[BlockHash]:
        """Records that nobody but this branch can use, unless another branch names them too.

        The tail of a model that can be resumed at any token is not one of them: every prompt may continue it.
        """
        if self._policy.at_any_token:
            return set()
        return set(branch.dependencies) | ({branch.tail} if branch.tail is not None else set())

    def unsaved(self, turn: Turn, branch: Branch[TokenText], tail: Block | None) -> list[Block]:
        """What the disk lacks of a turn: its blocks, those dependencies of its branch that memory holds, its tail."""
        in_memory = [turn.retained.get(key) or self._pool.get(key) for key in sorted(branch.dependencies)]
        found = {block.hash: block for block in in_memory if block is not None and block is not tail}
        stored = self._stored(list(found))
        blocks = {block.hash: block for block in turn.sequence.unsaved}
        missing = [block for key, block in found.items() if key not in stored and key not in blocks]
        return [*blocks.values(), *missing, *([tail] if tail is not None else [])]

    def ends_in_token_tail(self, root: BlockHash, branch: Branch[TokenText]) -> bool:
        """Whether a branch cannot be resumed at its end, because its answer was cut where its layers could not be."""
        full = len(branch.hashes)
        rest = branch.token_ids[full * self._block_tokens :]
        return branch.tail == record_hash("token_tail", branch.hashes[-1] if full else root, rest)
