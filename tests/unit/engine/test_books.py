"""The books under a state machine: a whole engine's life without a model, a file or a clock.

Every rule is one thing that can happen to the pool, the prefix cache and the scheduler together; the invariants
hold after each of them. The tier is a dictionary, a block's KV is the tokens it stands for.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent_memory_core.blocks.block import Block, BlockHash, RecordKind, record_hash, root_hash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.match import Match
from agent_memory_core.blocks.prefix_cache import PrefixCache
from agent_memory_core.blocks.resume_policy import EveryToken, LastTokens, ResumePolicy, WholeState
from agent_memory_core.engine.scheduler import Chunk, Limits, Scheduler
from agent_memory_core.engine.sequence import Sequence, Status
from agent_memory_core.errors import PromptTooLong

BLOCK = 4
BUDGET = 220
LIMITS = Limits(
    max_batch_size=2,
    prefill_chunk=12,
    prefill_chunk_busy=4,
    block_tokens=BLOCK,
    bytes_per_token=1,
    context_length=60,
    grow=8,
)
ROOTS = [root_hash({"namespace": name}) for name in "ab"]

checkpoints = st.sets(st.integers(1, 40), max_size=3)


@dataclass
class DictTier:
    """A tier in memory: ancestors are stored before and dropped after their children."""

    blocks: dict[BlockHash, Block] = field(default_factory=dict)

    def known_prefix(self, hashes: list[BlockHash]) -> int:
        return next((i for i, key in enumerate(hashes) if key not in self.blocks), len(hashes))

    def starting(self, starts: list[BlockHash], most: int) -> list[Row]:
        found = {start: [b for b in self.blocks.values() if b.start == start][-most:] for start in starts}
        return [row_of(block) for blocks in found.values() for block in blocks]

    def named(self, keys: list[BlockHash]) -> list[Row]:
        return [row_of(self.blocks[key]) for key in keys if key in self.blocks]

    def stored(self, keys: list[BlockHash]) -> set[BlockHash]:
        return self.blocks.keys() & set(keys)


@dataclass(frozen=True)
class Row:
    key: BlockHash
    parent: BlockHash
    tokens: tuple[int, ...]
    kind: RecordKind


def row_of(block: Block) -> Row:
    return Row(block.hash, block.parent, block.tokens, block.kind)


class Books(RuleBasedStateMachine):
    """One engine's books with a pretended model: the KV of a token is the token."""

    resumes = ResumePolicy(BLOCK)

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BUDGET)
        self.tier = DictTier()
        self.prefixes = PrefixCache(self.pool, self.resumes)
        self.scheduler = Scheduler(self.pool, LIMITS, self.match)
        self.live: dict[int, list[int]] = {}
        self.turns: dict[int, Sequence] = {}
        self.ended: list[list[int]] = []
        self.ids = 0

    def match(self, sequence: Sequence, without: Collection[BlockHash] = ()) -> Match:
        return self.prefixes.match(sequence.root, sequence.token_ids, sequence.hashes, self.tier, without)

    @rule(
        heads=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=6),
        root=st.sampled_from(ROOTS),
        new=st.integers(0, 9),
        checkpoints=checkpoints,
    )
    def add(self, heads: list[list[int]], root: BlockHash, new: int, checkpoints: set[int]) -> None:
        for head in heads:
            self._add(head, root, new, checkpoints)

    @precondition(lambda self: self.ended)
    @rule(
        data=st.data(),
        more=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        root=st.sampled_from(ROOTS),
        checkpoints=checkpoints,
    )
    def go_on(self, data: st.DataObject, more: list[int], root: BlockHash, checkpoints: set[int]) -> None:
        self._add(data.draw(st.sampled_from(self.ended)) + more, root, 3, checkpoints)

    def _add(self, ids: list[int], root: BlockHash, new: int, checkpoints: set[int]) -> None:
        inside = tuple(sorted(checkpoint for checkpoint in checkpoints if checkpoint < len(ids)))
        sequence = Sequence(root, list(ids), BLOCK, seq_id=self.ids, max_tokens=new, checkpoints=inside)
        self.ids += 1
        self.scheduler.match(sequence)
        try:
            self.scheduler.add(sequence)
        except PromptTooLong:
            assert (
                len(ids) + min(1, new) > LIMITS.context_length or LIMITS.live_bytes(len(ids) + new) > BUDGET
            )
            return
        self.turns[sequence.seq_id] = sequence

    @rule(seed=st.integers(0, 99))
    def step(self, seed: int) -> None:
        chance = random.Random(seed)
        batch = self.scheduler.schedule()
        for sequence in batch.admitted:
            self._load(sequence, chance)
        for sequence in [s for s in self.scheduler.running if s.status is Status.DECODE]:
            self.live[sequence.seq_id].append(sequence.token_ids[-1])
            if len(sequence.generated) == sequence.max_tokens:
                self._finish(sequence)
            else:
                self.scheduler.update(sequence, chance.randint(0, 1))
        assert all(chunk.is_last or chunk.sequence.is_short for chunk in batch.chunks[1:])
        assert sum(chunk.stop - chunk.start for chunk in batch.chunks) <= LIMITS.prefill_chunk
        assert len({chunk.sequence.seq_id for chunk in batch.chunks}) == len(batch.chunks)
        for chunk in batch.chunks:
            self._compute(chunk, chance)

    def _compute(self, chunk: Chunk, chance: random.Random) -> None:
        sequence = chunk.sequence
        assert chunk.stop > chunk.start
        assert not any(chunk.start < checkpoint < chunk.stop for checkpoint in sequence.checkpoints), (
            "a chunk ends at a checkpoint"
        )
        self.live[sequence.seq_id] += sequence.token_ids[chunk.start : chunk.stop]
        self.scheduler.computed(chunk)
        if chunk.is_last and sequence.max_tokens:
            self.scheduler.update(sequence, chance.randint(0, 1))
        if chunk.is_last and sequence.max_tokens <= 1:
            self._finish(sequence)
        else:
            self._seal(sequence)
            if chunk.stop in sequence.checkpoints:
                self._put_tail(sequence, chunk.stop)

    def _load(self, sequence: Sequence, chance: random.Random) -> None:
        without: set[BlockHash] = set()
        reserved, others = sequence.reserved, self._held_by_others(sequence)
        while missing := [hit.key for hit in sequence.match.missing]:
            fails = chance.random() < 0.2
            rows = [self.tier.blocks[key] for key in missing[: len(missing) // 2 if fails else None]]
            copies = {b.hash: Block(b.hash, b.parent, b.tokens, b.nbytes, b.kv, b.kind) for b in rows}
            if lost := self.scheduler.loaded(sequence, copies):
                without.add(lost[0])
                self.scheduler.rematch(sequence, without)
                assert self._held() == others + Counter(
                    hit.key for hit in sequence.match.hits if hit.block is not None
                ), "what the lost match held is given back, and what the new one reads is held"
                assert sequence.reserved == reserved
        assert not {hit.key for hit in sequence.match.hits} & without
        known = [token for hit in sequence.match.hits for token in hit.block.kv[: hit.take]]  # type: ignore[union-attr]
        assert known == sequence.token_ids[: len(known)], "what is reused is decided by the tokens alone"
        assert len(known) < sequence.num_prompt, "one prompt token is always left to evaluate"
        self.live[sequence.seq_id] = known
        self.scheduler.restored(sequence)
        assert sequence.num_cached == len(known)
        read = {hit.key for hit in (*sequence.match.blocks, *sequence.match.windows)}
        assert {block.hash for block in sequence.unsaved} == read - self.tier.blocks.keys(), (
            "the tier lacks these"
        )

    def _seal(self, sequence: Sequence) -> None:
        live = self.live[sequence.seq_id]
        assert live == sequence.token_ids[: len(live)], "the live cache stands for the sequence's own tokens"
        last = len(live) // BLOCK
        fresh = []
        for index in range(sequence.num_sealed, last):
            start, stop = sequence.block_range(index)
            tokens = tuple(sequence.token_ids[start:stop])
            key = sequence.hashes[index]
            fresh.append(Block(key, sequence.parent_of(index), tokens, 20, live[start:stop]))
        self.scheduler.sealed(
            sequence, last, [b for b in fresh if b.hash not in self.tier.blocks], persist=True
        )
        for block in fresh if self.resumes.has_windows else ():
            self.pool.put(Block(record_hash("window", block.hash), block.hash, (), 5, [], kind="window"))

    def _put_tail(self, sequence: Sequence, length: int) -> Block | None:
        start = length // BLOCK * BLOCK
        tokens, parent = tuple(sequence.token_ids[start:length]), sequence.parent_of(start // BLOCK)
        if not tokens and self.resumes.at_block_ends:
            return None
        kv = self.live[sequence.seq_id][start:length]
        tail = Block(record_hash("tail", parent, tokens), parent, tokens, 10, kv, kind="tail")
        return self.pool.put(tail) or tail

    def _held(self) -> Counter[BlockHash]:
        return Counter({key: block.ref_count for key, block in self.pool._held.items()})

    def _held_by_others(self, sequence: Sequence) -> Counter[BlockHash]:
        return self._held() - Counter(block.hash for block in sequence.held)

    def _finish(self, sequence: Sequence) -> None:
        live = self.live[sequence.seq_id]
        self.scheduler.keep(sequence, len(live))
        self._seal(sequence)
        for block in sequence.unsaved:
            self.tier.blocks.setdefault(block.hash, block)
        self._commit(sequence, len(live))
        self.ended.append(list(live))
        self._retire(sequence)

    def _commit(self, sequence: Sequence, length: int) -> None:
        """Bring to the tier what it takes to resume at the end and at the checkpoints."""
        tails = [
            self._put_tail(sequence, place) for place in (*sequence.checkpoints, length) if place <= length
        ]
        windows = [self.pool.get(record_hash("window", key)) for key in sequence.hashes]
        for record in (*tails, *windows):
            above = record is not None and record.parent in {*self.tier.blocks, *ROOTS}
            if record is not None and above:
                self.tier.blocks.setdefault(record.hash, record)

    def _retire(self, sequence: Sequence) -> None:
        self.scheduler.retire(sequence)
        self.live.pop(sequence.seq_id, None)
        del self.turns[sequence.seq_id]

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = self.turns[data.draw(st.sampled_from(sorted(self.turns)))]
        if sequence.status not in (Status.WAITING, Status.LOADING):
            self._seal(sequence)
        self._retire(sequence)

    @rule(data=st.data())
    def tier_drops_a_leaf(self, data: st.DataObject) -> None:
        parents = {b.parent for b in self.tier.blocks.values()}
        leaves = sorted(key for key in self.tier.blocks if key not in parents)
        if leaves:
            del self.tier.blocks[data.draw(st.sampled_from(leaves))]

    @rule()
    def everybody_is_served(self) -> None:
        for seed in range(400):
            if not self.turns:
                break
            self.step(seed)
        assert not self.turns, "a sequence starved"
        assert self.pool.reserved == 0

    @invariant()
    def books_add_up(self) -> None:
        self.scheduler.check()

    @invariant()
    def blocks_stand_for_their_tokens(self) -> None:
        for turn in self.turns.values():
            for block in turn.held:
                assert tuple(block.kv) == block.tokens

    @invariant()
    def what_must_still_be_written_is_held(self) -> None:
        for turn in self.turns.values():
            held = {block.hash for block in turn.held}
            assert all(block.hash in held for block in turn.unsaved if self.pool.get(block.hash) is block)


class BooksOfWindows(Books):
    """The same where some layer keeps a window only."""

    resumes = ResumePolicy(BLOCK, (EveryToken(), LastTokens(6)))


class BooksOfStates(Books):
    """The same where some layer can be resumed only where its state was kept."""

    resumes = ResumePolicy(BLOCK, (EveryToken(), WholeState()))


class BooksOfBoth(Books):
    """The same where some layers keep a short window and others a state."""

    resumes = ResumePolicy(BLOCK, (EveryToken(), LastTokens(3), WholeState()))


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooksOfWindows = BooksOfWindows.TestCase
TestBooksOfStates = BooksOfStates.TestCase
TestBooksOfBoth = BooksOfBoth.TestCase
TestBooksOfWindows.settings = TestBooksOfStates.settings = TestBooksOfBoth.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None
)
