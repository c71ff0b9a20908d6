"""The same numbers under the names of vLLM, https://docs.vllm.ai/en/latest/usage/metrics.html, for its dashboards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

NAMES: Mapping[str, tuple[str, str | None]] = {
    "requests_running": ("num_requests_running", None),
    "requests_waiting": ("num_requests_waiting", None),
    "prompt_tokens": ("prompt_tokens", None),
    "generated_tokens": ("generation_tokens", None),
    "turns": ("request_success", "finished_reason"),
    "time_to_first_token_seconds": ("time_to_first_token_seconds", None),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", None),
    "turn_seconds": ("e2e_request_latency_seconds", None),
    "queue_seconds": ("request_queue_time_seconds", None),
    "prefill_seconds": ("request_prefill_time_seconds", None),
    "decode_seconds": ("request_decode_time_seconds", None),
    "cached_tokens": ("prefix_cache_hits", None),
}
"""Our names, and theirs with the label that takes the place of our only one."""

PROMPTS = "prefix_cache_queries"
"""Their name for the tokens that could have been known, which are those of all prompts."""


class VllmNames(Collector):
    """Repeats the metrics of another registry."""

    def __init__(self, registry: CollectorRegistry, model: Callable[[], str]) -> None:
        self._registry, self._model = registry, model

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known once the others are asked."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Those that vLLM has, too."""
        pool: dict[str, float] = {}
        for family in self._registry.collect():
            short = family.name.removeprefix("agent_memory_")
            if short == "pool_bytes":
                pool = {sample.labels["state"]: sample.value for sample in family.samples}
            if short in NAMES:
                yield self._renamed(family, *NAMES[short])
            if short == "prompt_tokens":
                yield self._renamed(family, PROMPTS, None)
        if pool.get("budget"):
            usage = Metric("vllm:kv_cache_usage_perc", "The part of the budget that is taken.", "gauge")
            taken = (sum(pool.values()) - pool["budget"]) / pool["budget"]
            usage.add_sample(usage.name, {"model_name": self._model()}, taken)
            yield usage

    def _renamed(self, family: Metric, name: str, label: str | None) -> Metric:
        """A family by another name, summed over the labels that vLLM does not have."""
        sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            labels = {"model_name": self._model()}
            labels |= {"le": sample.labels["le"]} if "le" in sample.labels else {}
            labels |= {label: next(iter(sample.labels.values()))} if label else {}
            suffix = sample.name.removeprefix(family.name)
            sums[f"vllm:{name}{suffix}", tuple(labels.items())] += sample.value
        renamed = Metric(f"vllm:{name}", family.documentation, family.type)
        for (full, pairs), value in sums.items():
            renamed.add_sample(full, dict(pairs), value)
        return renamed
