"""Models and memories for tests on real MLX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import engine_driver, tiny_models

from agent_memory_core import EngineConfig


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random two-layer llama."""
    return tiny_models.write(tmp_path_factory.mktemp("models") / "llama", tiny_models.LLAMA)


@pytest.fixture
def open_driver(tmp_path: Path) -> Iterator[Callable[..., engine_driver.Driver]]:
    """Opens drivers on a store of this test, closed at its end."""
    opened: list[engine_driver.Driver] = []

    def open_one(model: str, **settings: Any) -> engine_driver.Driver:
        defaults: dict[str, Any] = {
            "cache_dir": tmp_path / "store",
            "block_tokens": 64,
            "min_free_mb": 0,
            "memory_budget_mb": 64,
        }
        opened.append(engine_driver.Driver(EngineConfig(model=model, **(defaults | settings))))
        return opened[-1]

    yield open_one
    for driver in opened:
        driver.memory.close()
