"""Services on the embedded model and on random ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_models

from agent_memory_core import AgentMemory
from agent_memory_core.coordination import CoordinationService


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random two-layer llama, which writes nonsense and never ends by itself."""
    return tiny_models.write(tmp_path_factory.mktemp("models") / "llama", tiny_models.LLAMA)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentMemory]:
    """One memory of tiny-chat for a file; sessions keep apart by their ids."""
    folder = tmp_path_factory.mktemp("memory") / "caches"
    with AgentMemory(cache_dir=folder, min_free_mb=0, memory_budget_mb=128, max_batch_size=8) as opened:
        yield opened


@pytest.fixture
def service(memory: AgentMemory, tmp_path: Path) -> Iterator[CoordinationService]:
    """A service with no sessions yet."""
    with CoordinationService(memory, tmp_path / "coordination.db") as opened:
        yield opened


@pytest.fixture(scope="module")
def random_memory(llama: str) -> Iterator[AgentMemory]:
    """A memory of the random model, on no disk."""
    with AgentMemory(model=llama, cache_dir=None, memory_budget_mb=64, max_batch_size=8) as opened:
        yield opened


@pytest.fixture
def random_service(random_memory: AgentMemory) -> Iterator[CoordinationService]:
    """A service of agents that write nonsense."""
    with CoordinationService(random_memory) as opened:
        yield opened
