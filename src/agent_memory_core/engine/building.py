"""How an engine is built: weights from disk, and what its profile promises is checked."""

from __future__ import annotations

from agent_memory_core.config import EngineConfig
from agent_memory_core.engine.engine import Engine
from agent_memory_core.engine.events import Observers
from agent_memory_core.engine.gpu_memory import memory_budget_bytes
from agent_memory_core.engine.results import Results
from agent_memory_core.models.cache_spec import cache_spec
from agent_memory_core.models.loader import load_model
from agent_memory_core.models.profile import find_profile
from agent_memory_core.storage.block_store import BlockStore


def build_engine(
    config: EngineConfig, store: BlockStore | None, results: Results, observers: Observers
) -> Engine:
    """Load a model and put its engine together, on the thread that will own it.

    Raises:
        ModelError: the model cannot be loaded.
        InvalidSetting: its profile says something of it that is not so.
    """
    loaded = load_model(config.model, config.adapter_path, config.context_length, config.compute_dtype)
    profile = find_profile(config.model)
    engine = Engine(loaded, config, memory_budget_bytes(config, loaded.model), store, results, observers)
    if profile is not None:
        profile.check(cache_spec(engine.blocks.layout.groups, loaded.config))
    if store is not None:
        store.begin_reconciling()
    return engine
