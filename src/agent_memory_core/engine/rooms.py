"""What one engine is made of, put together. The engine connects the rooms; none of them knows it."""

from __future__ import annotations

from dataclasses import dataclass

from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.prefix_cache import PrefixCache
from agent_memory_core.config import EngineConfig
from agent_memory_core.engine.committing import Committing
from agent_memory_core.engine.gpu_memory import GpuMemory
from agent_memory_core.engine.intake import Intake
from agent_memory_core.engine.model_runner import ModelRunner
from agent_memory_core.engine.pace import MOST_TOKENS, PrefillPace
from agent_memory_core.engine.persistence import Disk, NoDisk, Persistence
from agent_memory_core.engine.preparing import Preparation, Preparer
from agent_memory_core.engine.prewarm import BackgroundPrewarm
from agent_memory_core.engine.restoring import Restoring
from agent_memory_core.engine.results import Results
from agent_memory_core.engine.retention import KvRetention
from agent_memory_core.engine.scheduler import Limits, MatchFunction, Scheduler
from agent_memory_core.engine.session_book import CatalogSessionBook, MemorySessionBook, SessionBook
from agent_memory_core.engine.working_set import WorkingSet
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.records import KvBlocks
from agent_memory_core.models.loader import LoadedModel
from agent_memory_core.models.parity import ParityCheck, machine_key
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.text.chat_template import ChatTemplate

LIVE_SHARE = 4
"""One part in so many of the memory budget is for live caches of turns that have ended, if they need it."""
BUSY_TOKENS = 256
"""Most tokens of a chunk while others decode, unless a setting says so."""


@dataclass(frozen=True, slots=True, eq=False)
class Rooms:
    """The parts of one engine."""

    parity: ParityCheck
    """Whether the model may decode in batches and be resumed."""
    template: ChatTemplate
    """Messages to text and token ids."""
    blocks: KvBlocks
    """Live caches to records and back."""
    pool: BlockPool
    """The records in memory."""
    limits: Limits
    """Sizes that the scheduler keeps to."""
    scheduler: Scheduler
    """What runs next."""
    runner: ModelRunner
    """The model at work."""
    disk: Persistence
    """Where turns outlast the engine."""
    sessions: SessionBook
    """The sessions in use."""
    intake: Intake
    """Requests to turns."""
    preparer: Preparer
    """Long requests to prompts."""
    restoring: Restoring
    """Stored prompts to live caches."""
    retention: KvRetention
    """What is kept of a live cache."""
    committing: Committing
    """Ended turns to sessions."""
    background: BackgroundPrewarm
    """What to do while no turn is in flight."""
    gpu: GpuMemory
    """MLX's own limits of memory."""
    pace: PrefillPace | None
    """The size of chunks; None where a setting says it."""
    working_set: WorkingSet
    """What a step may take for a moment."""


def make_rooms(
    loaded: LoadedModel,
    config: EngineConfig,
    memory_bytes: int,
    store: BlockStore | None,
    results: Results,
) -> Rooms:
    """Put the parts of one engine together.

    This is the one place that asks whether there is a store. What was read, written and prepared comes through
    ``results``.
    """
    catalog = store.catalog if store is not None else None
    layout = KvLayout(loaded.model)
    disk: Persistence = Disk(store, results) if store is not None else NoDisk()
    vocab_size = loaded.tokenizer.vocab_size
    parity = ParityCheck(loaded.model, layout, loaded.fingerprint, vocab_size, catalog, disk.later)
    template = ChatTemplate(loaded.tokenizer, config.control_words)
    blocks = KvBlocks(layout, config.kv_bits, config.block_tokens, resumes=parity.resumes)
    # What is evicted can be read again only where there is a disk.
    pool = BlockPool(memory_bytes, memory_bytes // LIVE_SHARE if store is not None else 0)
    limits = _limits(loaded, config, layout)
    runner = _runner(loaded, config, layout)
    sessions: SessionBook = MemorySessionBook(pool)
    if store is not None:
        sessions = CatalogSessionBook(pool, store.catalog.branches, template.tokenizer, config.block_tokens)
    retention = KvRetention(blocks, pool, disk, config.block_tokens)
    scheduler = Scheduler(pool, limits, _match_function(PrefixCache(pool, blocks.resume), disk))
    needs_checkpoints = blocks.resume.needs_checkpoints

    def prepares_with(own: ChatTemplate) -> Preparation:
        return Preparation(own, needs_checkpoints, limits.context_length)

    preparation = prepares_with(template)
    key = machine_key("chunk 1", loaded.fingerprint, layout)
    pace = PrefillPace(key, catalog, disk.later) if config.prefill_chunk is None else None
    scheduler.chunk_tokens = pace.tokens if pace is not None else None
    prewarms = config.prewarm == "idle" and not blocks.resume.unsupported
    return Rooms(
        parity=parity,
        template=template,
        blocks=blocks,
        pool=pool,
        limits=limits,
        scheduler=scheduler,
        runner=runner,
        disk=disk,
        sessions=sessions,
        preparer=Preparer(loaded.tokenizer, config.control_words, preparation, prepares_with, results),
        intake=Intake(loaded, config, preparation, blocks, sessions, retention, disk),
        restoring=Restoring(blocks, pool, scheduler, runner, disk, limits.prefill_chunk),
        retention=retention,
        committing=Committing(disk, sessions, retention, pool, template.tokenizer),
        background=BackgroundPrewarm(template, sessions, enabled=prewarms),
        gpu=GpuMemory(config, loaded.model),
        pace=pace,
        working_set=WorkingSet(loaded.model),
    )


def _runner(loaded: LoadedModel, config: EngineConfig, layout: KvLayout) -> ModelRunner:
    runner = ModelRunner(loaded.model, layout, sorted(loaded.tokenizer.eos_token_ids))
    if config.batching != "auto":
        runner.batches = config.batching == "always" and layout.batches
    return runner


def _match_function(prefixes: PrefixCache, disk: Persistence) -> MatchFunction:
    return lambda sequence, without: prefixes.match(
        sequence.root,
        sequence.token_ids,
        sequence.hashes,
        disk.tier if sequence.reads_tier else None,
        without,
        sequence.known_tails(),
    )


def _limits(loaded: LoadedModel, config: EngineConfig, layout: KvLayout) -> Limits:
    live = layout.live_bytes
    return Limits(
        max_batch_size=config.max_batch_size,
        prefill_chunk=config.prefill_chunk or MOST_TOKENS,
        prefill_chunk_busy=config.prefill_chunk_busy or BUSY_TOKENS,
        block_tokens=config.block_tokens,
        bytes_per_token=live.per_token,
        context_length=min(config.context_length or loaded.context_length, loaded.context_length),
        is_model_limit=(config.context_length or loaded.context_length) >= loaded.context_length,
        window=live.window,
        window_bytes=live.per_window_token,
        fixed_bytes=live.fixed,
    )
