"""What MLX may keep of the machine's memory besides the engine's own budget, and errors of a GPU that has none left.

MLX keeps freed buffers for reuse, on Metal up to 0.95 of the recommended working set, whatever the memory budget says;
here that cache has a limit. The wired limit, up to which MLX keeps its buffers resident, is set once or never: changing
it while the GPU works is known to end in kernel panics. Both limits are those of the whole process, so they are set by
the first engine that needs them, and the last one puts back what was there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from agent_memory_core.backend import physical_memory_bytes
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.config import DEFAULT_MEMORY_MB, LEAST_MEMORY_MB, EngineConfig
from agent_memory_core.engine.stats import MemoryStats
from agent_memory_core.errors import OutOfGpuMemory

log = logging.getLogger("agent_memory")

CACHE_LIMIT = 2**30
"""Most bytes of freed buffers that MLX keeps, or a 20th of the machine's memory if that is less."""

UNWIRED_SHARE = 0.7
"""Weights above this share of the recommended working set are slow unless they are wired."""

_MIB = 2**20
_SIGNS = (
    "out of memory",
    "outofmemory",
    "insufficient memory",
    "cudaerrormemoryallocation",
    "[metal::malloc]",
    "unable to allocate",
)
"""What an error of the GPU says in any backend of MLX when memory was lacking, in small letters."""


def device_info() -> Mapping[str, Any]:
    """What MLX knows of the device: only Metal names a recommended working set, and only CUDA a total memory."""
    return mx.device_info()


def weight_bytes(model: Any) -> int:
    """Bytes of a loaded model's weights; weights that are shared count once."""
    weights: list[tuple[str, Any]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return sum({id(x): int(x.nbytes) for _, x in weights}.values())


def default_memory_budget_bytes(weight_bytes: int, device: Mapping[str, Any]) -> int:
    """Bytes for all KV in memory where nothing else is set.

    Args:
        weight_bytes: bytes of the model's weights, with which the KV shares the memory of the GPU.
        device: what MLX knows of the device. Metal names a recommended working set, CUDA a total memory, and a
            CPU neither; its memory is the machine's.
    """
    most = min(DEFAULT_MEMORY_MB * 2**20, physical_memory_bytes() // 4)
    of_gpu: int | None = device.get("max_recommended_working_set_size") or device.get("total_memory")
    if of_gpu is None:
        return most
    # Half of what the weights leave: the other half is for what a forward pass computes, and for other programs.
    return min(most, max(LEAST_MEMORY_MB * 2**20, (of_gpu - weight_bytes) // 2))


def memory_budget_bytes(config: EngineConfig, model: Any) -> int:
    """Bytes for all keys and values in memory: what is set, or what suits the model and the device."""
    if config.memory_budget_mb is not None:
        return config.memory_budget_mb * _MIB
    return default_memory_budget_bytes(weight_bytes(model), device_info())


class _ProcessLimit:
    """One limit of MLX, which holds for the process. The first user sets it; the last one puts the old one back."""

    def __init__(self, set_limit: Callable[[int], int], *, only_lower: bool) -> None:
        self._set_limit = set_limit
        self._only_lower = only_lower
        self._lock = threading.Lock()
        self._users = 0
        self._before = 0

    def acquire(self, nbytes: int) -> None:
        """Set the limit to bytes, unless an engine of this process has done that already."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            self._before = self._set_limit(nbytes)
            if self._only_lower and self._before < nbytes:
                self._set_limit(self._before)

    def release(self) -> None:
        """Put the old limit back if this was the last user."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._set_limit(self._before)


# Looked up at each call, so that a test can count the calls.
_cache_limit = _ProcessLimit(lambda nbytes: mx.set_cache_limit(nbytes), only_lower=True)
_wired_limit = _ProcessLimit(lambda nbytes: mx.set_wired_limit(nbytes), only_lower=False)


class GpuMemory:
    """MLX's own limits for one engine, from when it is built until it is closed."""

    def __init__(self, config: EngineConfig, model: Any) -> None:
        info = device_info()
        recommended = info.get("max_recommended_working_set_size")
        self._held = [_cache_limit]
        _cache_limit.acquire(min(CACHE_LIMIT, physical_memory_bytes() // 20))
        if recommended is None:
            return
        if config.wired == "on":
            self._held.append(_wired_limit)
            _wired_limit.acquire(recommended)
        elif (weights := weight_bytes(model)) > UNWIRED_SHARE * recommended:
            log.warning(
                "the weights of %s take %.1f GiB, and this machine's GPU works well with %.1f GiB in all: if "
                'decoding is slow, set wired="on", or use a smaller or more quantised model.',
                config.model,
                weights / 2**30,
                recommended / 2**30,
            )

    def attempt(self, work: Callable[..., None], *args: Any) -> OutOfGpuMemory | None:
        """Do work on the GPU. Return the error if it lacked the memory; any other error is raised."""
        try:
            work(*args)
        except (RuntimeError, MemoryError) as error:
            lack = _lack_of_memory(error)
            if lack is None:
                raise
            # A new error without a cause: the frames of the old one hold what the work had allocated.
            return lack
        return None

    def clear_cache(self) -> None:
        """Give the freed buffers that MLX keeps back to the machine."""
        mx.clear_cache()

    def stats(self, pool: BlockPool, working_bytes: int) -> MemoryStats:
        """What a pool and MLX hold now, with what a step may take besides, see `WorkingSet`."""
        return MemoryStats(
            budget_bytes=pool.budget,
            block_bytes=pool.block_bytes,
            reserved_bytes=pool.reserved,
            blocks=len(pool),
            live_bytes=pool.live.nbytes,
            live_caches=len(pool.live),
            evicted=pool.evicted,
            working_bytes=working_bytes,
            active_bytes=mx.get_active_memory(),
            cached_bytes=mx.get_cache_memory(),
            peak_bytes=mx.get_peak_memory(),
        )

    def close(self) -> None:
        """Put back the limits that no other engine of this process needs. Calling it again does nothing."""
        if self._held:
            # No step may be under way while the wired limit changes.
            mx.synchronize()
        while self._held:
            self._held.pop().release()


def _lack_of_memory(error: Exception) -> OutOfGpuMemory | None:
    text = str(error).lower()
    if not isinstance(error, MemoryError) and not any(sign in text for sign in _SIGNS):
        return None
    return OutOfGpuMemory(
        "the GPU has no memory left for this turn, which was given up: lower memory_budget_mb or prefill_chunk, or use "
        f"a smaller model ({error})."
    )
