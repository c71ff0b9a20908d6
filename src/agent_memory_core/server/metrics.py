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
from agent_memory_core.server.metrics_state import NAME, State
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
        self._times: dict[tuple[int, int], list[float]] = {}
        self._add_requests()
        self._add_turns()
        self._add_tokens()
        self._registry.register(State(host, turns))
        self._pages = [self._registry]
        if dialect == "vllm":
            other = CollectorRegistry()
            other.register(VllmNames(self._registry, lambda: host.served))
            self._pages.append(other)
        self.close = host.observe(self._observe)

    def _add_requests(self) -> None:
        self._requests = self._counter(
            "requests", "Requests that were answered.", "endpoint", "method", "status"
        )
        self._duration = self._histogram("request_duration_seconds", "From a request to its end.", "endpoint")
        self._rejected = self._counter("requests_rejected", "Requests that were not taken.", "reason")
        # A rate needs a beginning.
        for reason in REJECTED.values():
            self._rejected.labels(reason)

    def _add_turns(self) -> None:
        self._turns = self._counter("turns", "Turns that ended, by how.", "outcome")
        for outcome in ("stop", "cancelled", "failed"):
            self._turns.labels(outcome)
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to first token.", "tier")
        self._restore = self._histogram("restore_seconds", "Reading and decoding stored KV.", "tier")
        self._stages = {
            stage: self._histogram(f"{stage}_seconds", text)
            for stage, text in (
                ("queue", "From arrival to a place."),
                ("prefill", "From a place to the first token."),
                ("decode", "From the first token to the last."),
                ("turn", "From arrival to the last token."),
            )
        }
        self._between = self._histogram(
            "inter_token_latency_seconds", "Between tokens.", buckets=BETWEEN_TOKENS
        )

    def _add_tokens(self) -> None:
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("cached_tokens", "Tokens of prompts that were not computed.", "tier")
        self._computed = self._counter("computed_tokens", "Tokens of prompts that were computed.")
        self._generated = self._counter("generated_tokens", "Tokens of answers.")
        self._misses = self._counter("misses", "Turns that computed what could have been known.", "reason")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(NAME + name, text, labels, registry=self._registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        return Histogram(NAME + name, text, labels, registry=self._registry, buckets=buckets)

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
