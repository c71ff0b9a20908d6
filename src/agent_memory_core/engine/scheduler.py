"""What runs next: admission, prefill chunks, decode, retire. It says; the model runner does.

Every step decodes one token for all running rows and then prefills one chunk of one sequence, and of as many short
prompts as fit into what a chunk may have; a step that admits somebody prefills nothing. Among the prefilling,
the one with the least work left goes first, so that a warm turn overtakes a cold one; every `FAIR_EVERY`-th chunk
goes to the one that has waited longest, so that nobody waits for ever. Admission asks the block pool for the bytes of
the live cache before anything is allocated, in the same order; who has waited `PATIENCE` steps blocks all others
until it fits. A sequence whose prefill is done has its first token; while the decode batch is full it waits in READY.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from agent_memory_core.blocks.block import START_TOKENS, Block, BlockHash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.match import Match
from agent_memory_core.engine.sequence import Sequence, Status
from agent_memory_core.errors import PromptTooLong

FAIR_EVERY = 4
"""One prefill chunk in so many goes to the sequence that has waited longest."""

GATHER_STEPS = 3
"""Steps for which rows that could begin to decode wait for others, while none decodes."""

PATIENCE = 64
"""Steps after which a waiting sequence is no longer overtaken at admission."""

RUNNING_FACTOR = 4
"""Sequences admitted at once, in units of the decode batch."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens [start, stop) of one sequence, to evaluate in one forward pass."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the chunk ends the prompt."""
        return self.stop == self.sequence.num_prompt

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        return self.sequence.token_ids[self.start : self.stop]

    @property
    def wants_token(self) -> bool:
        """Whether a token is to be sampled where the chunk ends."""
        return self.is_last and self.sequence.max_tokens > 0

    @property
    def is_checkpoint(self) -> bool:
        """Whether something of the live cache is to be kept where the chunk ends."""
        return self.stop in self.sequence.stops


@dataclass(slots=True)
class Batch:
    """One step's orders: restore what is known of the admitted, let these join the decode, prefill these chunks."""

    admitted: list[Sequence] = field(default_factory=list)
    joining: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes the scheduler keeps to. Chunk sizes are in tokens; ``bytes_per_token`` is of a live cache.

    Layers that keep ``window`` tokens take ``window_bytes`` for each of them, those that keep a state
    ``fixed_bytes`` in all.
    """

    max_batch_size: int
    prefill_chunk: int
    prefill_chunk_busy: int
    block_tokens: int
    bytes_per_token: int
    context_length: int
    is_model_limit: bool = True
    """Whether ``context_length`` is the model's own, which no setting can raise."""
    grow: int = 256
    window: int = 0
    window_bytes: int = 0
    fixed_bytes: int = 0

    def live_bytes(self, tokens: int) -> int:
        """Bytes of a live cache that may come to hold ``tokens``, and of the window records taken from it."""
        in_window = min(tokens, 2 * self.window + self.prefill_chunk)
        growing = -(-tokens // self.grow) * self.grow * self.bytes_per_token
        return growing + in_window * self.window_bytes + self.fixed_bytes


def joint_groups(chunks: list[Chunk], most: int) -> list[list[Chunk]]:
    """The chunks of one step in groups, each of which may run in one forward pass of at most ``most`` tokens.

    Only short prompts share a pass, because it pads every row to the length of the longest.
    """
    short = [chunk for chunk in chunks if chunk.sequence.is_short and chunk.stop - chunk.start > 1]
    groups: list[list[Chunk]] = [[chunk] for chunk in chunks if chunk not in short]
    joint: list[Chunk] = []
    for chunk in sorted(short, key=lambda chunk: chunk.stop - chunk.start):
        length = chunk.stop - chunk.start
        if joint and ((len(joint) + 1) * length > most or length > 2 * (joint[0].stop - joint[0].start)):
            groups.append(joint)
            joint = []
        joint.append(chunk)
    return [*groups, joint] if joint else groups


def _remedy(limits: Limits) -> str:
    if limits.is_model_limit:
        return "shorten the conversation, since that is all that the model can hold"
    return "shorten the conversation, or raise context_length (LlamaIndex: context_window), which sets this limit"


MatchFunction = Callable[[Sequence, Collection[BlockHash]], Match]
"""Finds what is stored of a sequence's prompt now, without the records of these names. It changes nothing."""


class Scheduler:
    """The queues of one engine, and the only writer of its sequences."""

    def __init__(self, pool: BlockPool, limits: Limits, match: MatchFunction) -> None:
        self._pool = pool
        self._limits = limits
        self._match = match
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._chunks = 0
        self._gathered = 0
        self.chunk_tokens: int | None = None
        """Most tokens of a chunk for the sake of those who wait for its end, half of that while others decode.

        None sets no limit but those of the sizes."""
        self.steps = 0

    @property
    def waiting(self) -> int:
        """Sequences not yet admitted."""
        return len(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """Sequences admitted and not yet retired."""
        return list(self._running)

    @property
    def largest_chunk(self) -> int:
        """Most tokens of one forward pass."""
        size = max(self._limits.prefill_chunk, self._limits.prefill_chunk_busy, self._limits.block_tokens)
        return size if self.chunk_tokens is None else min(size, self.chunk_tokens)

    def has_work(self) -> bool:
        """Whether a step could move anything; sequences whose blocks are still loading cannot be moved."""
        return bool(self._waiting) or any(s.status is not Status.LOADING for s in self._running)

    def match(self, sequence: Sequence) -> Match:
        """Find what is stored of a new sequence's prompt, which tells how much work it is."""
        sequence.match = self._match(sequence, ())
        return sequence.match

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that was matched.

        Raises:
            PromptTooLong: it can never fit the context or the memory budget.
        """
        limits = self._limits
        if sequence.num_prompt + min(1, sequence.max_tokens) > limits.context_length:
            raise PromptTooLong(
                f"the prompt has {sequence.num_prompt} tokens and the model's context holds "
                f"{limits.context_length}: {_remedy(limits)}.",
                prompt_tokens=sequence.num_prompt,
                limit=limits.context_length,
            )
        room = limits.context_length - sequence.num_prompt
        sequence.max_tokens = min(sequence.max_tokens, room)
        needed = limits.live_bytes(sequence.capacity)
        if needed > self._pool.budget:
            raise PromptTooLong(
                f"{sequence.num_prompt} prompt tokens and up to {sequence.max_tokens} new ones need "
                f"{needed / 2**20:.1f} MiB of KV and the memory budget is {self._pool.budget / 2**20:.1f} MiB: "
                "shorten the prompt, lower max_tokens or raise memory_budget_mb."
            )
        self._waiting.append(sequence)

    def schedule(self) -> Batch:
        """Decide the next step."""
        self.steps += 1
        batch = Batch(admitted=self._admit())
        batch.joining = self._join()
        if not batch.admitted:
            # Who has just come may have less left to do than who is next, which its restoring will tell.
            batch.chunks = self._next_chunks(batch)
        for sequence in (*self._waiting, *self._running):
            if sequence.status in (Status.WAITING, Status.PREFILL):
                sequence.waited += 1
        return batch

    def loaded(self, sequence: Sequence, found: dict[BlockHash, Block]) -> list[BlockHash]:
        """Blocks came from the tier: put them in the pool. Return the names of those that did not come."""
        for hit in sequence.match.missing:
            if (block := found.get(hit.key)) is not None:
                hit.block = self._pool.put(block) or block
                if hit.key in self._pool:
                    self._pool.hold(hit.block)
                    sequence.held.append(hit.block)
        return [hit.key for hit in sequence.match.missing]

    def rematch(self, sequence: Sequence, without: Collection[BlockHash]) -> None:
        """Match an admitted sequence again, without records that could not be had."""
        self._release(sequence, keep=[])
        self._take(sequence, self._match(sequence, without))

    def computed(self, chunk: Chunk) -> None:
        """A chunk was evaluated."""
        sequence = chunk.sequence
        assert sequence.num_computed == chunk.start
        sequence.num_computed = chunk.stop
        sequence.waited = 0

    def update(self, sequence: Sequence, token_id: int) -> None:
        """A token was sampled: the only place where one is appended."""
        if sequence.status is Status.PREFILL:
            assert sequence.remaining == 0
            sequence.status = Status.READY
        sequence.append(token_id)

    def retire(self, sequence: Sequence) -> None:
        """Free the place of a sequence that is done, failed or cancelled, in whatever state."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        self._release(sequence, keep=[])
        self._pool.unreserve(sequence.reserved)
        sequence.reserved = 0
        sequence.status = Status.FINISHED

    def restored(self, sequence: Sequence) -> None:
        """The live cache holds the matched tokens: all their blocks may go but those the disk lacks."""
        sequence.num_cached = sequence.num_computed = sequence.match.tokens
        sequence.status = Status.PREFILL
        sequence.num_sealed = len(sequence.match.blocks)
        sequence.unsaved = [
            hit.block
            for hit in (*sequence.match.blocks, *sequence.match.windows)
            if hit.block is not None and not hit.stored
        ]
        self._release(sequence, keep=sequence.unsaved)

    def sealed(self, sequence: Sequence, last: int, blocks: list[Block], *, persist: bool) -> None:
        """Blocks up to ``last`` are at rest; of these ``blocks`` are new. What must still be written stays held."""
        sequence.num_sealed = last
        for block in blocks:
            kept = self._pool.put(block)
            if persist:
                sequence.unsaved.append(kept or block)
            if persist and kept is not None:
                self._pool.hold(kept)
                sequence.held.append(kept)

    def keep(self, sequence: Sequence, length: int) -> None:
        """Cut generated tokens from ``length`` on; all tokens that stay have KV."""
        sequence.keep(length)
        sequence.num_computed = length

    def check(self) -> None:
        """Assert that reservations and places add up."""
        self._pool.check()
        assert self._pool.reserved == sum(s.reserved for s in self._running)
        assert all(s.reserved == 0 and not s.held for s in self._waiting)
        assert sum(s.status is Status.DECODE for s in self._running) <= self._limits.max_batch_size

    def _admit(self) -> list[Sequence]:
        admitted: list[Sequence] = []
        most = self._limits.max_batch_size * RUNNING_FACTOR
        while len(self._running) < most:
            sequence = next((s for s in self._candidates() if self._reserve(s)), None)
            if sequence is None:
                break
            self._waiting.remove(sequence)
            self._running.append(sequence)
            self._take(sequence, self._match(sequence, ()))
            admitted.append(sequence)
        return admitted

    def _candidates(self) -> list[Sequence]:
        oldest = self._waiting[:1]
        if oldest and oldest[0].waited >= PATIENCE:
            return oldest
        return sorted(self._waiting, key=_least_work)

    def _reserve(self, sequence: Sequence) -> bool:
        needed = self._limits.live_bytes(sequence.capacity)
        # What it is about to read must not be what makes room for it.
        self._pool.touch(hit.key for hit in sequence.match.hits)
        if not self._pool.reserve(needed):
            return False
        sequence.reserved = needed
        return True

    def _take(self, sequence: Sequence, match: Match) -> None:
        sequence.match, sequence.matched_at = match, self._pool.changes
        sequence.status = Status.LOADING
        for hit in match.hits:
            if hit.block is not None:
                self._pool.hold(hit.block)
                sequence.held.append(hit.block)

    def _takes_more(self, sequence: Sequence) -> bool:
        """Whether others sealed more of its prompt while it waited for its first chunk; then it takes that."""
        if sequence.num_computed > sequence.num_cached or sequence.matched_at == self._pool.changes:
            return False
        sequence.matched_at = self._pool.changes
        match = self._match(sequence, ())
        if match.tokens <= sequence.num_cached or match.missing:
            return False
        self._take(sequence, match)
        return True

    def _release(self, sequence: Sequence, keep: list[Block]) -> None:
        kept = {block.hash for block in keep}
        self._pool.release([block for block in sequence.held if block.hash not in kept])
        sequence.held = [block for block in sequence.held if block.hash in kept]

    def _join(self) -> list[Sequence]:
        decoding = sum(s.status is Status.DECODE for s in self._running)
        if not decoding and self._gathers():
            return []
        free = self._limits.max_batch_size - decoding
        joining = [s for s in self._running if s.status is Status.READY][:free]
        for sequence in joining:
            sequence.status = Status.DECODE
        return joining

    def _gathers(self) -> bool:
        """Whether rows that are ready wait a few steps for short prompts, to decode together with them from then on.

        Each of them has its first token by now. Decoding takes about as long for one row as for many.
        """
        ready = any(s.status is Status.READY for s in self._running)
        short = any(s.status is Status.PREFILL and s.remaining <= self._chunk_size(s) for s in self._running)
        self._gathered = self._gathered + 1 if ready and short else 0
        return 0 < self._gathered <= GATHER_STEPS

    def _next_chunks(self, batch: Batch) -> list[Chunk]:
        ready = sorted((s for s in self._running if s.status is Status.PREFILL), key=_least_work)
        if not ready:
            return []
        self._chunks += 1
        if self._chunks % FAIR_EVERY == 0:
            ready.sort(key=lambda s: -s.waited)
        room = self._chunk_size(ready[0])
        chunks: list[Chunk] = []
        for waiting in ready:
            sequence = self._leader(waiting, ready)
            if any(chunk.sequence is sequence or _computes_for(chunk, sequence) for chunk in chunks):
                continue
            chunk = Chunk(sequence, sequence.num_computed, self._chunk_end(sequence, room))
            if chunks and not (chunk.is_last or sequence.is_short):
                break
            if self._takes_more(sequence):
                batch.admitted.append(sequence)
                break
            chunks.append(chunk)
            room -= chunk.stop - chunk.start
            if room <= 0:
                break
        return chunks

    def _leader(self, sequence: Sequence, ready: list[Sequence]) -> Sequence:
        """Who has come furthest with the block that the sequence would begin with: itself, if nobody.

        A chunk may be shorter than a block, so that one is begun before it is at rest for others.
        """
        if sequence.num_computed > sequence.num_cached:
            return sequence
        return max(
            (other for other in ready if other is sequence or self._is_inside(other, sequence)),
            key=lambda other: (other.num_computed, -other.seq_id),
        )

    def _is_inside(self, other: Sequence, sequence: Sequence) -> bool:
        start = sequence.num_computed
        begun = other.num_computed // self._limits.block_tokens * self._limits.block_tokens
        return begun <= start < other.num_computed and _begin_alike(other, sequence)

    def _chunk_size(self, sequence: Sequence) -> int:
        small = sequence.background or any(s.status is Status.DECODE for s in self._running)
        size = self._limits.prefill_chunk_busy if small else self._limits.prefill_chunk
        size = max(size, self._limits.block_tokens)
        if self.chunk_tokens is None:
            return size
        return min(size, max(1, self.chunk_tokens // 2) if small else self.chunk_tokens)

    def _chunk_end(self, sequence: Sequence, size: int) -> int:
        """End on a block boundary, and leave the last chunk no longer than a block: its logits cover all of it.

        A checkpoint on the way ends it too. Chunks smaller than a block stop at each boundary that they reach.
        """
        block = self._limits.block_tokens
        start = sequence.num_computed
        stop = min(start + size, sequence.num_prompt) if size < block else sequence.num_prompt
        if size < block:
            stop = min(stop, (start // block + 1) * block)
        elif sequence.remaining > block:
            stop = min(start + size, sequence.num_prompt - 1) // block * block
        return min((place for place in sequence.stops if start < place < stop), default=stop)


def _computes_for(chunk: Chunk, sequence: Sequence) -> bool:
    """Whether a chunk computes what another sequence needs next, which can therefore take it after this step."""
    return chunk.start <= sequence.num_computed < chunk.stop and _begin_alike(chunk.sequence, sequence)


def _begin_alike(other: Sequence, sequence: Sequence) -> bool:
    """Whether two prompts are the same beyond what was computed of the second one."""
    end = sequence.num_computed + START_TOKENS
    return other.root == sequence.root and other.token_ids[:end] == sequence.token_ids[:end]


def _least_work(sequence: Sequence) -> tuple[int, int]:
    return sequence.remaining, sequence.seq_id
