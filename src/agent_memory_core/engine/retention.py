"""What outlasts a turn: full blocks, the window records near the places where it can be resumed, tails, its branch.

Everything is taken out of the live cache while it is there and put into the pool; nothing here writes to disk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence as ReadOnly
from typing import Any

from agent_memory_core.blocks.block import Block, BlockHash, record_hash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.engine.turn import Turn
from agent_memory_core.kv.records import KvBlocks
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.text.token_text import TokenText


class Keeper:
    """Keeps the turns of one engine. ``catalog`` says what others have stored meanwhile."""

    def __init__(self, blocks: KvBlocks, pool: BlockPool, catalog: Catalog | None, block_tokens: int) -> None:
        self._blocks = blocks
        self._resume = blocks.resume
        self._pool = pool
        self._catalog = catalog
        self._block_tokens = block_tokens

    # -- out of a live cache ------------------------------------------------------------------------------

    def seal(self, turn: Turn, cache: list[Any], first: int, last: int) -> list[Block]:
        """Encode full blocks ``first`` up to ``last``, and return those that nobody has stored."""
        blocks = self._blocks.seal(turn.sequence, cache, first, last)
        if self._resume.window:
            self._take_windows(turn, cache, first, last)
        stored = self._stored([block.hash for block in blocks])
        return [block for block in blocks if block.hash not in stored]

    def passes_block(self, turn: Turn) -> bool:
        """Whether a decoded token completed a block whose window record has to be taken before it is gone.

        A first step feeds two tokens, so the block may have been complete one token ago.
        """
        sequence = turn.sequence
        is_new = bool(sequence.hashes) and len(sequence.hashes) - 1 not in turn.windows
        return bool(self._resume.window) and is_new and len(sequence.token_ids) % self._block_tokens <= 1

    def take_window(self, turn: Turn, cache: list[Any]) -> None:
        """Take the window record of the block that was completed last."""
        last = len(turn.sequence.hashes)
        self._take_windows(turn, cache, last - 1, last)

    def _take_windows(self, turn: Turn, cache: list[Any], first: int, last: int) -> None:
        """Take the window records of blocks ``first`` up to ``last``, and let go of those no longer wanted."""
        sequence = turn.sequence
        wanted = self._near((*turn.checkpoints, last * self._block_tokens))
        new = [index for index in range(first, last) if index in wanted and index not in turn.windows]
        names = {index: record_hash("window", sequence.hashes[index]) for index in new}
        known = self._stored(list(names.values()))
        new = [index for index in new if names[index] not in known and names[index] not in self._pool]
        made = self._blocks.windows(sequence, cache, new)
        turn.windows |= dict(zip(new, made, strict=True))
        turn.windows = {index: record for index, record in turn.windows.items() if index in wanted}
        # What waits for its first chunk may begin as this prompt does.
        self._keep_windows(
            turn, [checkpoint for checkpoint in turn.checkpoints if checkpoint <= last * self._block_tokens]
        )

    def checkpoint(self, turn: Turn, cache: list[Any], position: int) -> Block | None:
        """Keep what it takes to resume after ``position`` tokens beside full blocks; return the tail."""
        assert turn.slot is not None
        self._keep_windows(
            turn, [*(checkpoint for checkpoint in turn.checkpoints if checkpoint < position), position]
        )
        tail = self._blocks.tail(turn.sequence, cache, position, turn.slot.fed)
        if tail is not None and tail.kind == "tail":
            turn.kept[tail.hash] = self._pool.put(tail) or tail
        return tail

    def _keep_windows(self, turn: Turn, places: Collection[int]) -> None:
        near = self._near(places)
        for record in [record for index, record in turn.windows.items() if index in near]:
            turn.kept[record.hash] = self._pool.put(record) or record

    def _near(self, places: Collection[int]) -> set[int]:
        """The blocks that hold the windows before these places."""
        return {index for place in places for index in self._resume.window_blocks(place)}

    def _stored(self, names: ReadOnly[BlockHash]) -> set[BlockHash]:
        """Records that somebody stored while a turn computed them: theirs are the ones that count."""
        return self._catalog.records.stored(names) if self._catalog is not None else set()

    # -- into a branch ------------------------------------------------------------------------------------

    def dependencies(self, turn: Turn) -> frozenset[BlockHash]:
        """What it takes to resume a branch at its end and at the turn's checkpoints, beside blocks and tail."""
        if self._resume.at_any_token or self._resume.unsupported:
            return frozenset()
        sequence, size = turn.sequence, self._block_tokens
        checkpoints = [checkpoint for checkpoint in turn.checkpoints if checkpoint <= sequence.num_computed]
        near = self._near((*checkpoints, sequence.num_computed))
        windows = {record_hash("window", sequence.hashes[i]) for i in near if i < len(sequence.hashes)}
        spans = [
            (checkpoint // size, checkpoint) for checkpoint in checkpoints if not self._resume.inside_block
        ]
        tails = {
            record_hash("tail", sequence.parent_of(full), sequence.token_ids[full * size : checkpoint])
            for full, checkpoint in spans
        }
        return frozenset(windows | tails)

    def own(self, branch: Branch[TokenText]) -> set[BlockHash]:
        """Records that only a branch's own places need. A tail of layers that keep every token is of use to all."""
        if self._resume.at_any_token:
            return set()
        return set(branch.dependencies) | ({branch.tail} if branch.tail is not None else set())

    def unsaved(self, turn: Turn, branch: Branch[TokenText], tail: Block | None) -> list[Block]:
        """What the disk lacks of a turn: its blocks, its branch's dependencies that memory holds, its tail."""
        held = [turn.kept.get(key) or self._pool.get(key) for key in sorted(branch.dependencies)]
        found = {block.hash: block for block in held if block is not None and block is not tail}
        stored = self._stored(list(found))
        blocks = {block.hash: block for block in turn.sequence.unsaved}
        missing = [block for key, block in found.items() if key not in stored and key not in blocks]
        return [*blocks.values(), *missing, *([tail] if tail is not None else [])]

    def ends_in_token_tail(self, root: BlockHash, branch: Branch[TokenText]) -> bool:
        """Whether a branch's last answer was cut where its layers could not be, so that its end cannot be resumed."""
        full = len(branch.hashes)
        rest = branch.token_ids[full * self._block_tokens :]
        return branch.tail == record_hash("token_tail", branch.hashes[-1] if full else root, rest)
