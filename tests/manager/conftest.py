"""Models and managers for tests on real engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_memory_core.manager import ManagerConfig, ModelManager
from agent_memory_core.testing import write_random_model

Make = Callable[..., ModelManager]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of four small random models by their names."""
    folder = tmp_path_factory.mktemp("managed")
    return {name: str(write_random_model(folder / name, seed=seed)) for seed, name in enumerate("abcd")}


@pytest.fixture
def make(models: dict[str, str], tmp_path: Path) -> Iterator[Make]:
    """Makes managers of the models a to d, each of which counts 10 MiB; closed at the end of the test."""
    made: list[ModelManager] = []

    def model(name: str, values: dict[str, Any]) -> dict[str, Any]:
        parameters = {
            "cache_dir": str(tmp_path / name),
            "min_free_mb": 0,
            "kv_bits": None,
            "memory_budget_mb": 9,
            "max_tokens": 8,
        }
        more = {"prefill_chunk": 128, "prefill_chunk_busy": 64, "block_tokens": 64}
        own = {"name": name, "type": "mlx", "path": models[name], "parameters": parameters | more}
        return own | values | {"parameters": {**own["parameters"], **values.get("parameters", {})}}  # type: ignore[dict-item]

    def make_one(
        *, clock: Callable[[], float] | None = None, limit: int = 100, **config: Any
    ) -> ModelManager:
        own = config.pop("models", {name: {} for name in "abcd"})
        config["models"] = [model(name, values) if name in models else values for name, values in own.items()]
        keywords = {} if clock is None else {"clock": clock}
        made.append(ModelManager(ManagerConfig(max_memory_mb=limit, **config), **keywords))
        return made[-1]

    yield make_one
    for manager in made:
        manager.shutdown(timeout=0)
