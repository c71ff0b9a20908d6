"""One tiny model for the tests of the engine's rooms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import families
from support.engine_driver import SteppedEngine

from agent_memory_core import EngineConfig
from agent_memory_core.storage.block_store import BlockStore

BLOCK = 64


@pytest.fixture
def open_engine() -> Iterator[Callable[..., SteppedEngine]]:
    """Opens engines of a tiny model on a folder, or without a disk; closed at the test's end."""
    opened: list[SteppedEngine] = []

    def open_one(folder: Path | None, model: str = "llama", **settings: Any) -> SteppedEngine:
        config = EngineConfig(model=model, block_tokens=BLOCK, kv_bits=None, **settings)
        store = BlockStore(folder) if folder is not None else None
        opened.append(SteppedEngine(families.loaded(model), config, 2**26, store))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.fail_all(RuntimeError("the test is over"))
        engine.close()
