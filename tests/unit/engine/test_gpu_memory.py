"""What an engine does to MLX's limits of memory, counted, on a device that is made to look like a Mac's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from agent_memory_core import EngineConfig, OutOfGpuMemory
from agent_memory_core.engine import gpu_memory
from agent_memory_core.engine.gpu_memory import (
    CACHE_LIMIT,
    GpuMemory,
    default_memory_budget_bytes,
    memory_budget_bytes,
    weight_bytes,
)

GIB = 2**30
LACKS = [
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "[malloc] Unable to allocate 137438953472 bytes.",
]


class Limits:
    """MLX's two limits, with what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, recommended: int | None) -> None:
        self.cache, self.wired = [40 * GIB], [0]
        info = {} if recommended is None else {"max_recommended_working_set_size": recommended}
        monkeypatch.setattr(mx, "device_info", lambda: info)
        monkeypatch.setattr(mx, "set_cache_limit", lambda n: self._set(self.cache, n))
        monkeypatch.setattr(mx, "set_wired_limit", lambda n: self._set(self.wired, n))

    def _set(self, history: list[int], nbytes: int) -> int:
        history.append(nbytes)
        return history[-2]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[Limits]:
    yield Limits(monkeypatch, 16 * GIB)
    assert gpu_memory._cache_limit._users == gpu_memory._wired_limit._users == 0


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(cache_dir=None, **settings)


class Weights:
    """A model of so many bytes, one array of which has two names."""

    def __init__(self, nbytes: int) -> None:
        embedding = mx.zeros((nbytes,), mx.uint8)
        self._weights = {"embedding": embedding, "head": embedding}

    def parameters(self) -> dict[str, mx.array]:
        return self._weights


def test_the_cache_is_bounded_while_any_engine_runs_and_the_wired_limit_is_left_alone(mac: Limits) -> None:
    first, second = GpuMemory(config(), Weights(8)), GpuMemory(config(), Weights(8))
    assert len(mac.cache) == 2
    assert mac.cache[-1] <= CACHE_LIMIT
    first.close()
    first.close()
    assert len(mac.cache) == 2, "the other engine still runs"
    second.close()
    assert mac.cache[-1] == mac.cache[0]
    assert mac.wired == [0]


def test_a_lower_limit_of_the_user_stays(mac: Limits) -> None:
    mac.cache[0] = 1000
    memory = GpuMemory(config(), Weights(8))
    assert mac.cache[-1] == 1000
    memory.close()
    assert mac.cache[-1] == 1000


def test_wiring_happens_once_and_is_undone_once(mac: Limits) -> None:
    engines = [GpuMemory(config(wired="on"), Weights(8)) for _ in range(2)]
    for engine in engines:
        assert mac.wired == [0, 16 * GIB]
        engine.close()
    assert mac.wired == [0, 16 * GIB, 0]


def test_a_device_without_a_recommended_size_has_nothing_to_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, None)
    GpuMemory(config(wired="on"), Weights(8)).close()
    assert limits.wired == [0]


@pytest.mark.parametrize(
    ("wired", "weights", "warned"), [("off", 800, True), ("off", 600, False), ("on", 800, False)]
)
def test_weights_that_nearly_fill_the_gpu_are_warned_of_unless_they_are_wired(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wired: str, weights: int, warned: bool
) -> None:
    Limits(monkeypatch, 1000)
    with caplog.at_level(logging.WARNING, "agent_memory"):
        GpuMemory(config(wired=wired), Weights(weights)).close()
    assert ('wired="on"' in caplog.text) == warned


def test_shared_weights_count_once() -> None:
    assert weight_bytes(Weights(1000)) == 1000


def test_the_budget_is_what_is_set_or_what_the_weights_leave(mac: Limits) -> None:
    assert memory_budget_bytes(config(memory_budget_mb=3), Weights(8)) == 3 * 2**20
    assert 256 * 2**20 <= memory_budget_bytes(config(), Weights(8)) <= 8 * GIB


@pytest.mark.parametrize("text", LACKS)
def test_a_lack_of_memory_is_known_by_its_text_and_keeps_nothing_alive(mac: Limits, text: str) -> None:
    memory = GpuMemory(config(), Weights(8))

    def work() -> None:
        raise RuntimeError(text)

    lack = memory.attempt(work)
    assert isinstance(lack, OutOfGpuMemory)
    assert (lack.__cause__, lack.__context__, lack.__traceback__) == (None, None, None)
    assert all(word in str(lack) for word in ("memory_budget_mb", "prefill_chunk", text))
    memory.close()


def test_any_other_error_is_raised(mac: Limits) -> None:
    memory = GpuMemory(config(), Weights(8))

    def work() -> None:
        raise RuntimeError("[matmul] Last dimension of first input with shape (1,2) must match")

    with pytest.raises(RuntimeError, match="matmul"):
        memory.attempt(work)
    assert memory.attempt(lambda: None) is None
    memory.close()


# What is set where nothing else is


def with_memory(monkeypatch: pytest.MonkeyPatch, gib: int) -> None:
    """Let the machine have so much memory."""
    sizes = {"SC_PHYS_PAGES": gib * 2**18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)


def test_the_memory_budget_is_never_more_than_a_quarter_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_memory(monkeypatch, 16)
    assert default_memory_budget_bytes(2**30, {}) == 4 * 2**30
    with_memory(monkeypatch, 128)
    assert default_memory_budget_bytes(2**30, {}) == 8 * 2**30


@pytest.mark.parametrize(
    ("memory", "weights", "device", "budget"),
    [
        (24, 14 * 1024, {"max_recommended_working_set_size": 16 * 2**30}, 1024),
        (24, 4 * 1024, {"max_recommended_working_set_size": 16 * 2**30}, 6 * 1024),
        (24, 20 * 1024, {"max_recommended_working_set_size": 16 * 2**30}, 256),
        (128, 40 * 1024, {"max_recommended_working_set_size": 96 * 2**30}, 8 * 1024),
        (64, 5 * 1024, {"total_memory": 8 * 2**30}, 1536),
    ],
)
def test_the_memory_budget_is_at_most_half_of_what_the_weights_leave_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, memory: int, weights: int, device: dict[str, int], budget: int
) -> None:
    with_memory(monkeypatch, memory)
    assert default_memory_budget_bytes(weights * 2**20, device) == budget * 2**20
