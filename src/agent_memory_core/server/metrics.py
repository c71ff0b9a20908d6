"""Numbers for Prometheus. They come from what happens and never wait for the engine."""

from __future__ import annotations

import asyncio
from time import perf_counter

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest

from agent_memory_core import (
    BlocksEvicted,
    FirstToken,
    TurnAdmitted,
    TurnCancelled,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnQueued,
    TurnReport,
)
from agent_memory_core.server.errors import (
    LOADING,
    OVERLOADED,
    QUEUE_FULL,
    RATE_LIMITED,
    TOO_LONG,
    UNAUTHORIZED,
    Kind,
)
from agent_memory_core.server.host import Host
from agent_memory_core.server.metrics_state import State
from agent_memory_core.server.metrics_vllm import VllmNames
from agent_memory_core.server.turns import Turns

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
BETWEEN_TOKENS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

REJECTED = {
    QUEUE_FULL: "queue_full",
    RATE_LIMITED: "rate",
    TOO_LONG: "too_long",
    UNAUTHORIZED: "auth",
    LOADING: "model_loading",
    OVERLOADED: "overloaded",
}
"""Why requests are not answered though they may be right."""


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, host: Host, turns: Turns, dialect: str = "own") -> None:
        self._registry = CollectorRegistry()
        name, registry = "agent_memory_", self._registry

        def counter(suffix: str, text: str, *labels: str) -> Counter:
            return Counter(name + suffix, text, labels, registry=registry)

        def histogram(
            suffix: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
        ) -> Histogram:
            return Histogram(name + suffix, text, labels, registry=registry, buckets=buckets)

        self._requests = counter("requests", "Requests that were answered.", "endpoint", "method", "status")
        self._duration = histogram("request_duration_seconds", "From a request to its end.", "endpoint")
        self._rejected = counter("requests_rejected", "Requests that were not taken.", "reason")
        self._turns = counter("turns", "Turns that ended, by how.", "outcome")
        self._first = histogram("time_to_first_token_seconds", "From arrival to first token.", "tier")
        self._restore = histogram("restore_seconds", "Reading and decoding stored KV.", "tier")
        self._stages = {
            stage: histogram(f"{stage}_seconds", text)
            for stage, text in (
                ("queue", "From arrival to a place."),
                ("prefill", "From a place to the first token."),
                ("decode", "From the first token to the last."),
                ("turn", "From arrival to the last token."),
            )
        }
        self._between = histogram("inter_token_latency_seconds", "Between tokens.", buckets=BETWEEN_TOKENS)
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._cached = counter("cached_tokens", "Tokens of prompts that were not computed.", "tier")
        self._computed = counter("computed_tokens", "Tokens of prompts that were computed.")
        self._generated = counter("generated_tokens", "Tokens of answers.")
        self._misses = counter("misses", "Turns that computed what could have been known.", "reason")
        self._times: dict[tuple[int, int], list[float]] = {}
        # A rate needs a beginning.
        for reason in REJECTED.values():
            self._rejected.labels(reason)
        for outcome in ("stop", "cancelled", "failed"):
            self._turns.labels(outcome)
        registry.register(State(host, turns))
        self._pages = [registry]
        if dialect == "vllm":
            other = CollectorRegistry()
            other.register(VllmNames(registry, lambda: host.served))
            self._pages.append(other)
        self.close = host.observe(self._observe)

    def add_to(self, app: FastAPI) -> None:
        """Add the path."""
        app.add_api_route("/metrics", self._page, methods=["GET"], include_in_schema=False)

    def answered(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """Count a request. ``endpoint`` is the path's template, of which there are few."""
        self._requests.labels(endpoint, method, str(status)).inc()
        self._duration.labels(endpoint).observe(seconds)

    def refused(self, kind: Kind) -> None:
        """Count a request that is not taken."""
        if kind in REJECTED:
            self._rejected.labels(REJECTED[kind]).inc()

    async def _page(self) -> Response:
        # The store is asked, too, which may wait for a disk.
        pages = await asyncio.to_thread(lambda: b"".join(map(generate_latest, self._pages)))
        return Response(pages, media_type=CONTENT_TYPE_LATEST)

    def _observe(self, event: TurnEvent | BlocksEvicted) -> None:
        """Runs on the engine's thread."""
        if isinstance(event, BlocksEvicted) or event.turn.background:
            return
        # Several engines count their turns each for itself.
        turn_id = (event.turn.turn_id, id(event.turn.key))
        if isinstance(event, TurnQueued):
            self._times[turn_id] = [perf_counter()]
        elif isinstance(event, (TurnAdmitted, FirstToken)):
            # A turn may be admitted twice; the first time counts.
            place = 1 if isinstance(event, TurnAdmitted) else 2
            times = self._times.get(turn_id, [])
            if len(times) == place:
                times.append(perf_counter())
        elif isinstance(event, (TurnFinished, TurnCancelled, TurnFailed)):
            times = self._times.pop(turn_id, [])
            self._ended(event, [*times, perf_counter()])

    def _ended(self, event: TurnFinished | TurnCancelled | TurnFailed, times: list[float]) -> None:
        if isinstance(event, TurnFinished):
            self._turns.labels(event.report.finish_reason).inc()
            self._add(event.report)
            self._add_times(times, event.report.usage.completion_tokens)
        else:
            self._turns.labels("cancelled" if isinstance(event, TurnCancelled) else "failed").inc()

    def _add_times(self, times: list[float], tokens: int) -> None:
        if len(times) < 4:
            # It began before anybody watched.
            return
        self._stages["turn"].observe(times[-1] - times[0])
        for stage, before, after in zip(("queue", "prefill", "decode"), times, times[1:], strict=False):
            self._stages[stage].observe(after - before)
        if tokens > 1:
            self._between.observe((times[-1] - times[-2]) / (tokens - 1))

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
