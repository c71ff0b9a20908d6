"""One server for the tests of a module, on the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import http_server

from agent_memory_core import AgentMemory


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[http_server.Running]:
    folder: Path = tmp_path_factory.mktemp("store")
    memory = AgentMemory(cache_dir=folder, memory_budget_mb=128, min_free_mb=0, block_tokens=64, kv_bits=None)
    with memory, http_server.serve(memory, max_tokens=64, any_model=True) as running:
        yield running
