"""What the scheduler says of one sequence: chunks that tile its prompt, and bytes that its live cache keeps to."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, strategies as st
from mlx_lm.models.cache import make_prompt_cache
from support import families
from support.cases import some_of

from agent_memory_core.blocks.block import START_TOKENS, Block, record_hash, root_hash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.match import Hit, Match
from agent_memory_core.engine.scheduler import Chunk, Limits, Scheduler, joint_groups
from agent_memory_core.engine.sequence import SHORT_PROMPT, Sequence
from agent_memory_core.kv.layout import KvLayout

ROOT = root_hash({"a": "b"})

limits = st.builds(
    Limits,
    max_batch_size=st.just(2),
    prefill_chunk=st.integers(1, 40),
    prefill_chunk_busy=st.integers(1, 20),
    block_tokens=st.integers(1, 12),
    bytes_per_token=st.integers(0, 9),
    context_length=st.just(10_000),
    grow=st.integers(1, 30),
    window=st.integers(0, 50),
    window_bytes=st.integers(0, 9),
    fixed_bytes=st.integers(0, 99),
)


def chunks_of(
    limits: Limits, length: int, cached: int, checkpoints: set[int], paced: int | None = None
) -> list[Chunk]:
    """All chunks of a prompt of which so many tokens are known at its beginning."""
    pool = BlockPool(10**9)
    known = tuple(range(cached))
    block = Block(record_hash("tail", ROOT, known), ROOT, known, 1, None, kind="tail")
    pool.put(block)
    match = Match(end=Hit(block.hash, cached, block, stored=True, kind="tail"))
    scheduler = Scheduler(pool, limits, lambda sequence, without: match)
    scheduler.chunk_tokens = paced
    inside = tuple(sorted(checkpoint for checkpoint in checkpoints if checkpoint < length))
    sequence = Sequence(
        ROOT, list(range(length)), limits.block_tokens, seq_id=0, max_tokens=0, checkpoints=inside
    )
    scheduler.add(sequence)
    chunks: list[Chunk] = []
    while not chunks or not chunks[-1].is_last:
        batch = scheduler.schedule()
        for admitted in batch.admitted:
            scheduler.restored(admitted)
            scheduler.check()
        for chunk in batch.chunks:
            assert chunk.start < chunk.stop
            chunks.append(chunk)
            scheduler.computed(chunk)
    scheduler.retire(sequence)
    scheduler.check()
    assert pool.reserved == 0
    return chunks


@given(limits, st.integers(1, 150), st.data())
def test_chunks_tile_the_rest_of_a_prompt_and_end_at_every_mark(
    limits: Limits, length: int, data: st.DataObject
) -> None:
    cached = data.draw(st.integers(0, length - 1))
    checkpoints = data.draw(st.sets(st.integers(1, 150), max_size=5))
    chunks = chunks_of(limits, length, cached, checkpoints)
    ends = [chunk.stop for chunk in chunks]
    assert [chunk.start for chunk in chunks] == [cached, *ends[:-1]]
    assert ends[-1] == length
    assert {checkpoint for checkpoint in checkpoints if cached < checkpoint < length} <= set(ends)
    assert all(end % limits.block_tokens == 0 or end in checkpoints for end in ends[:-1])


@given(limits, st.integers(1, 150), st.sets(st.integers(1, 150), max_size=5))
def test_no_chunk_is_longer_than_it_may_be_and_the_last_no_longer_than_a_block(
    limits: Limits, length: int, checkpoints: set[int]
) -> None:
    chunks = chunks_of(limits, length, 0, checkpoints)
    most = max(limits.prefill_chunk, limits.block_tokens)
    assert all(chunk.stop - chunk.start <= most for chunk in chunks)
    assert chunks[-1].stop - chunks[-1].start <= limits.block_tokens


def test_short_prompts_are_prefilled_in_one_step_and_a_long_one_takes_the_rest_of_the_steps() -> None:
    sizes = Limits(
        max_batch_size=8,
        prefill_chunk=16,
        prefill_chunk_busy=8,
        block_tokens=4,
        bytes_per_token=1,
        context_length=10_000,
    )
    scheduler = Scheduler(BlockPool(10**6), sizes, lambda sequence, without: Match())
    for number, length in enumerate((SHORT_PROMPT + 1, 4, 3, 2, 8)):
        ids = list(range(1000 * number, 1000 * number + length))
        scheduler.add(Sequence(ROOT, ids, 4, seq_id=number, max_tokens=0))
    steps: list[list[tuple[int, int]]] = []
    while scheduler.has_work() or not steps:
        batch = scheduler.schedule()
        for admitted in batch.admitted:
            scheduler.restored(admitted)
        steps.append([(chunk.sequence.seq_id, chunk.stop - chunk.start) for chunk in batch.chunks])
        for chunk in batch.chunks:
            scheduler.computed(chunk)
            if chunk.is_last:
                scheduler.retire(chunk.sequence)
    assert steps[1] == [(3, 2), (2, 3), (1, 4), (4, 4)]
    assert [number for step in steps[3:] for number, _ in step] == [0] * (len(steps) - 3)
    assert sum(size for step in steps for number, size in step if number == 0) == SHORT_PROMPT + 1
    assert all(sum(size for _, size in step) <= 16 for step in steps)


def match_of(pool: BlockPool, sequence: Sequence) -> Match:
    """The leading blocks of a prompt that are at rest; one token is always left."""
    blocks = []
    for name in sequence.hashes[: (sequence.num_prompt - 1) // sequence.block_tokens]:
        if name not in pool:
            break
        blocks.append(Hit(name, sequence.block_tokens, pool.get(name), stored=False))
    return Match(blocks=blocks)


def seal(scheduler: Scheduler, sequence: Sequence) -> None:
    """Put to rest what was computed, as the engine does behind each chunk."""
    last = sequence.num_computed // sequence.block_tokens
    fresh = []
    for index in range(sequence.num_sealed, last):
        start, stop = sequence.block_range(index)
        tokens = tuple(sequence.token_ids[start:stop])
        fresh.append(Block(sequence.hashes[index], sequence.parent_of(index), tokens, 1, None))
    scheduler.sealed(sequence, last, fresh, persist=False)


@given(
    shared=st.integers(1, 8),
    rests=st.lists(st.integers(0, 40), min_size=2, max_size=4),
    paced=st.integers(1, 40),
    block=st.integers(START_TOKENS + 1, 24),
)
def test_what_several_prompts_begin_with_is_computed_once_however_short_chunks_are(
    shared: int, rests: list[int], paced: int, block: int
) -> None:
    """Whole blocks are meant; what is left of a prompt behind the last of them belongs to it alone."""
    pool = BlockPool(10**9)
    begin = list(range(shared * block))
    limits = Limits(
        max_batch_size=4, prefill_chunk=64, prefill_chunk_busy=64, block_tokens=block, bytes_per_token=1,
        context_length=10_000, grow=1, window=0, window_bytes=0, fixed_bytes=0,
    )  # fmt: skip
    scheduler = Scheduler(pool, limits, lambda sequence, _: match_of(pool, sequence))
    scheduler.chunk_tokens = paced
    for number, rest in enumerate(rests):
        ids = begin + [10_000 * (number + 1) + n for n in range(rest + 1)]
        scheduler.add(Sequence(ROOT, ids, block, seq_id=number, max_tokens=0))
    computed = 0
    while scheduler.running or scheduler.waiting:
        batch = scheduler.schedule()
        assert batch.admitted or batch.chunks, "somebody always goes on"
        for sequence in batch.admitted:
            scheduler.restored(sequence)
        for chunk in batch.chunks:
            computed += chunk.stop - chunk.start
            scheduler.computed(chunk)
            seal(scheduler, chunk.sequence)
            if chunk.is_last:
                scheduler.retire(chunk.sequence)
    assert computed == len(begin) + sum(rest + 1 for rest in rests)


@given(limits, st.integers(1, 150), st.sets(st.integers(1, 150), max_size=5), st.integers(1, 20))
def test_chunks_that_time_allows_less_than_a_block_tile_the_prompt_and_cross_no_boundary(
    limits: Limits, length: int, checkpoints: set[int], paced: int
) -> None:
    chunks = chunks_of(limits, length, 0, checkpoints, paced)
    ends = [chunk.stop for chunk in chunks]
    assert [chunk.start for chunk in chunks] == [0, *ends[:-1]]
    assert ends[-1] == length
    assert all(chunk.stop - chunk.start <= paced for chunk in chunks)
    if paced < limits.block_tokens:
        assert set(range(limits.block_tokens, length, limits.block_tokens)) <= set(ends)


@given(limits, st.integers(0, 300), st.integers(0, 300))
def test_a_live_caches_bytes_grow_with_its_tokens_up_to_the_window_and_never_with_its_state(
    limits: Limits, tokens: int, more: int
) -> None:
    fewer, many = limits.live_bytes(tokens), limits.live_bytes(tokens + more)
    assert fewer <= many
    assert limits.live_bytes(0) == limits.fixed_bytes
    full = 2 * limits.window + limits.prefill_chunk
    beyond = limits.live_bytes(full + tokens + more) - limits.live_bytes(full + tokens)
    assert beyond <= (more + limits.grow) * limits.bytes_per_token, "the window is full"
    assert fewer >= tokens * limits.bytes_per_token + min(tokens, full) * limits.window_bytes


@pytest.mark.model
@pytest.mark.parametrize(
    "name",
    some_of(["llama", "gemma3", "gpt_oss", "lfm2", "mamba2", "recurrent_gemma"], ["gpt_oss", "lfm2"]),
)
def test_a_real_cache_keeps_to_the_bytes_that_are_reserved_for_it(name: str) -> None:
    """But for one step of growth: a buffer that grows does so from where its tokens end, on a step or not."""
    model = families.build(name)
    layout = KvLayout(model)
    limits = Limits(
        max_batch_size=1,
        prefill_chunk=256,
        prefill_chunk_busy=64,
        block_tokens=64,
        bytes_per_token=layout.live_bytes.per_token,
        context_length=10_000,
        window=layout.live_bytes.window,
        window_bytes=layout.live_bytes.per_window_token,
        fixed_bytes=layout.live_bytes.fixed,
    )
    cache = make_prompt_cache(model)
    length = 0
    for chunk in (30, 256, 256, 1, 1, 64, 200):
        mx.eval(model(mx.array([[5] * chunk]), cache=cache))
        length += chunk
        assert sum(x.nbytes for x in layout.arrays(cache)) <= limits.live_bytes(length + limits.grow)


@given(
    st.lists(st.tuples(st.integers(0, 600), st.integers(1, 600), st.booleans()), max_size=12),
    st.integers(1, 2048),
)
def test_chunks_that_share_a_pass_are_of_short_prompts_and_their_padding_is_bounded(
    shapes: list[tuple[int, int, bool]], most: int
) -> None:
    chunks: list[Chunk] = []
    for start, length, is_last in shapes:
        ids = list(range(start + length + (not is_last)))
        sequence = Sequence(ROOT, ids, 64, seq_id=len(chunks), max_tokens=1)
        chunks.append(Chunk(sequence, start, start + length))
    groups = joint_groups(chunks, most)
    assert sorted((chunk for group in groups for chunk in group), key=chunks.index) == chunks
    for group in groups:
        lengths = [chunk.stop - chunk.start for chunk in group]
        if len(group) > 1:
            assert all(chunk.sequence.num_prompt <= SHORT_PROMPT for chunk in group)
            assert min(lengths) > 1
            assert max(lengths) <= 2 * min(lengths)
            assert len(group) * max(lengths) <= most
