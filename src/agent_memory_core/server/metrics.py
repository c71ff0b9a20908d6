"""Numbers for Prometheus. They come from what happens and never wait for the engine."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from agent_memory_core import (
    BlocksEvicted,
    TurnCancelled,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnReport,
)
from agent_memory_core.server.host import Host

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, host: Host, in_flight: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        name, registry = "agent_memory_", self._registry

        def counter(suffix: str, text: str, *labels: str) -> Counter:
            return Counter(name + suffix, text, labels, registry=registry)

        def histogram(suffix: str, text: str, *labels: str) -> Histogram:
            return Histogram(name + suffix, text, labels, registry=registry, buckets=SECONDS)

        self._requests = counter("requests", "Requests that were answered.", "endpoint", "method", "status")
        self._duration = histogram(
            "request_duration_seconds", "From a request to its answer's end.", "endpoint"
        )
        self._turns = counter("turns", "Turns that ended, by how.", "outcome")
        self._first = histogram(
            "time_to_first_token_seconds", "From a turn's arrival to its first token.", "tier"
        )
        self._restore = histogram("restore_seconds", "Reading and decoding stored KV.", "tier")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._cached = counter("cached_tokens", "Tokens of prompts that were not computed.", "tier")
        self._computed = counter("computed_tokens", "Tokens of prompts that were computed.")
        self._generated = counter("generated_tokens", "Tokens of answers.")
        self._misses = counter("misses", "Turns that computed what could have been known.", "reason")
        self._evicted = counter("evicted_blocks", "Blocks dropped from memory to make room.")
        running = Gauge(name + "turns_in_flight", "Turns that run or wait.", registry=registry)
        running.set_function(in_flight)
        self.close = host.observe(self._observe)

    def add_to(self, app: FastAPI) -> None:
        """Add the path."""
        app.add_api_route("/metrics", self._page, methods=["GET"], include_in_schema=False)

    def answered(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """Count a request. ``endpoint`` is the path's template, of which there are few."""
        self._requests.labels(endpoint, method, str(status)).inc()
        self._duration.labels(endpoint).observe(seconds)

    async def _page(self) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def _observe(self, event: TurnEvent | BlocksEvicted) -> None:
        """Runs on the engine's thread."""
        if isinstance(event, BlocksEvicted):
            self._evicted.inc(event.blocks)
        elif event.turn.background:
            return
        elif isinstance(event, TurnFinished):
            self._turns.labels(event.report.finish_reason).inc()
            self._add(event.report)
        elif isinstance(event, TurnCancelled):
            self._turns.labels("cancelled").inc()
        elif isinstance(event, TurnFailed):
            self._turns.labels("failed").inc()

    def _add(self, report: TurnReport) -> None:
        counted, tier = report.usage, report.hit_tier
        self._first.labels(tier).observe(report.time_to_first_token)
        self._restore.labels(tier).observe(report.restore_seconds)
        self._prompt.inc(counted.prompt_tokens)
        self._cached.labels(tier).inc(counted.cache_read)
        self._computed.inc(counted.cache_creation)
        self._generated.inc(counted.completion_tokens)
        if report.miss_reason:
            self._misses.labels(report.miss_reason).inc()
