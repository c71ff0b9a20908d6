"""Numbers that are looked up when somebody asks for the metrics: what is held now, and what the core has counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent_memory_core import Stats
from agent_memory_core.server.host import Host
from agent_memory_core.server.process import peak_bytes
from agent_memory_core.server.turns import Turns

NAME = "agent_memory_"


class State(Collector):
    """Reads the memory and the server. It waits for neither the engine nor a turn."""

    def __init__(self, host: Host, turns: Turns) -> None:
        self._host, self._turns = host, turns

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering it asks for no number."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        if not self._host.memory.closed:
            yield from _of_stats(self._host.memory.stats())
        yield from self._of_model()
        cancelled = "Turns that were withdrawn, by what for."
        yield _counter("requests_cancelled", cancelled, "cause", self._turns.cancelled)
        yield _gauge("turns_in_flight", "Turns that run or wait.", None, {"": len(self._turns)})
        yield _gauge("process_peak_bytes", "Most physical memory so far.", None, {"": peak_bytes()})
        yield _gauge("build_info", "The version.", "version", {_version(): 1})

    def _of_model(self) -> Iterator[Metric]:
        host = self._host
        loaded = {name: float(host.engine(name).weights_bytes > 0) for name in host.names()}
        yield _gauge("model_loaded", "Whether a model is in memory.", "model", loaded)
        yield _gauge("model_load_seconds", "What the last load took.", None, {"": host.load_seconds})
        yield _counter(
            "model_swaps", "Changes of the model.", "result", {"done": 0, "failed": 0} | host.swaps
        )


def _of_stats(stats: Stats) -> Iterator[Metric]:
    memory, store = stats.memory, stats.store
    yield _gauge("requests_running", "Turns that have a place.", None, {"": stats.running})
    yield _gauge("requests_waiting", "Turns that wait for one.", None, {"": stats.waiting})
    yield _gauge(
        "engine_step_seconds", "How long the step in progress takes.", None, {"": stats.step_seconds}
    )
    yield _counter(
        "idle_tokens", "Tokens that background work computed.", None, {"": stats.background_tokens}
    )
    yield _counter("unsaved_turns", "Turns that could not be stored.", None, {"": stats.unsaved_turns})
    pool = {
        "blocks": memory.block_bytes,
        "live": memory.live_bytes,
        "reserved": memory.reserved_bytes,
        "budget": memory.budget_bytes,
    }
    yield _gauge("pool_bytes", "Keys and values in memory.", "state", pool)
    yield _gauge("pool_blocks", "Blocks in memory.", None, {"": memory.blocks})
    evicted = {"memory": memory.evicted, "disk": store.evicted}
    yield _counter("evictions", "Blocks dropped to make room.", "where", evicted)
    mlx = {"active": memory.active_bytes, "cache": memory.cached_bytes, "peak": memory.peak_bytes}
    yield _gauge("mlx_memory_bytes", "What MLX holds.", "kind", mlx)
    disk = {"used": store.bytes, "reserved": store.reserved, "quota": store.quota}
    yield _gauge("store_bytes", "The store on disk.", "kind", disk)
    yield _gauge("store_free_bytes", "What is free on its volume.", None, {"": store.volume_free})
    yield _gauge("store_quarantined", "Damaged files set aside.", None, {"": store.quarantined})
    yield _counter("store_failed_reads", "Reads of the catalog that failed.", None, {"": store.failed_reads})
    sessions = {"live": memory.live_caches, "disk": store.sessions}
    yield _gauge("sessions", "Sessions with a live cache, and on disk.", "state", sessions)


def _gauge(name: str, text: str, label: str | None, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(NAME + name, text, labels=[label] if label else [])
    return _filled(family, label, values)


def _counter(name: str, text: str, label: str | None, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(NAME + name, text, labels=[label] if label else [])
    return _filled(family, label, values)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, label: str | None, values: Mapping[str, float]
) -> Metric:
    for value, number in values.items():
        family.add_metric([value] if label else [], number)
    return family


def _version() -> str:
    try:
        return version("agent-memory-mlx")
    except PackageNotFoundError:
        return ""
