"""Managers on a store of the test, with a random model or with the embedded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from agent_memory_core.agents import PersistentAgentManager

PROMPT = "You are a helpful assistant on a small ship. " * 6
OpenManager = Callable[..., PersistentAgentManager]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random two-layer llama."""
    return tiny_models.write(tmp_path_factory.mktemp("models") / "llama", tiny_models.LLAMA)


@pytest.fixture
def open_manager(tmp_path: Path, llama: str) -> Iterator[OpenManager]:
    """Opens managers on the store of this test, closed at its end."""
    opened: list[PersistentAgentManager] = []

    def open_one(model_name: str = llama, **settings: Any) -> PersistentAgentManager:
        own: dict[str, Any] = {"block_tokens": 64, "min_free_mb": 0, "memory_budget_mb": 64}
        defaults = {"cache_dir": tmp_path / "store", **own}
        opened.append(PersistentAgentManager(model_name, **(defaults | settings)))
        return opened[-1]

    yield open_one
    for manager in opened:
        manager.close()
