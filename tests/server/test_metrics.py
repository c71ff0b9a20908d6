"""What Prometheus reads, against what the answers say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from support import http_server

from agent_memory_core import AgentMemory

LIST = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000, "maxItems": 3000}


def numbers(text: str) -> dict[str, float]:
    lines = re.findall(r"^(agent_memory_\S+(?:\{.*?\})?) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def test_the_numbers_are_those_of_the_answers(memory: AgentMemory) -> None:
    with http_server.serve(memory) as server, server.http() as client:
        ask = {"model": "tiny-chat", "messages": [{"role": "user", "content": "Count me."}], "max_tokens": 4}
        told = [server.openai().chat.completions.create(**ask).usage for _ in range(3)]
        client.post("/v1/made/up/path", json={})
        found = numbers(client.get("/metrics").text)
    cached = sum(usage.prompt_tokens_details.cached_tokens for usage in told)
    prompt = sum(usage.prompt_tokens for usage in told)
    assert found["agent_memory_prompt_tokens_total"] == prompt
    assert found["agent_memory_computed_tokens_total"] == prompt - cached
    assert sum(v for n, v in found.items() if n.startswith("agent_memory_cached_tokens_total")) == cached > 0
    assert found["agent_memory_generated_tokens_total"] == sum(usage.completion_tokens for usage in told)
    endpoint = 'endpoint="/v1/chat/completions",method="POST",status="200"'
    assert found[f"agent_memory_requests_total{{{endpoint}}}"] == 3
    assert not [name for name in found if "made/up" in name], "names that clients make up are not counted"
    assert found["agent_memory_turns_in_flight"] == 0


MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
CHAT = {"model": "tiny-chat", "messages": [{"role": "user", "content": "Count me."}], "max_tokens": 4}


def expressions() -> list[str]:
    """Those of the dashboard and of the alerts."""
    board = json.loads((MONITORING / "dashboard.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    alerts = (MONITORING / "alerts.yml").read_text()
    return shown + re.findall(r"expr: (.*?)\n {8}(?:for|annotations):", alerts, re.DOTALL)


def test_the_dashboard_and_the_alerts_use_names_and_labels_that_exist(memory: AgentMemory) -> None:
    with http_server.serve(memory) as server, server.http() as client:
        client.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": "New."}]})
        client.post("/v1/chat/completions", json=CHAT)
        page = client.get("/metrics").text
    labels: dict[str, set[str]] = {}
    values: set[tuple[str, str]] = set()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
            values |= set(sample.labels.items())
    assert len(expressions()) > 35
    for expression in expressions():
        names = re.findall(r"agent_memory_\w+", expression)
        assert set(names) <= labels.keys(), expression
        grouped = re.findall(r"by \((.*?)\)", expression)
        wanted = {label.strip() for group in grouped for label in group.split(",")}
        assert wanted <= labels[names[0]], expression
        for label, value in re.findall(r'(\w+)="(\w+)"', expression):
            assert (label, value) in values, expression


def test_withdrawn_and_refused_turns_are_counted_by_why(memory: AgentMemory) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "list", "schema": LIST}}
    long = CHAT | {"max_tokens": 8000, "response_format": form}
    with http_server.serve(memory, timeout=0.3) as server, server.http() as client:
        assert client.post("/v1/chat/completions", json=long).status_code == 504
        with client.stream("POST", "/v1/chat/completions", json=long | {"stream": True}) as stream:
            next(stream.iter_lines())
        too_long = CHAT | {"messages": [{"role": "user", "content": "word " * 9000}]}
        assert client.post("/v1/chat/completions", json=too_long).status_code == 400
        name = "agent_memory_requests_cancelled_total"

        def cancelled(cause: str) -> float:
            return numbers(client.get("/metrics").text)[f'{name}{{cause="{cause}"}}']

        http_server.wait_until(lambda: cancelled("disconnect") == 1)
        assert (cancelled("deadline"), cancelled("admin")) == (1, 0)
        found = numbers(client.get("/metrics").text)
    assert found['agent_memory_requests_rejected_total{reason="too_long"}'] == 1


def test_the_names_of_vllm_hold_the_same_numbers(memory: AgentMemory) -> None:
    with http_server.serve(memory, metrics_dialect="vllm") as server, server.http() as client:
        for _ in range(2):
            client.post("/v1/chat/completions", json=CHAT)
        page = client.get("/metrics").text
    own = numbers(page)
    lines = re.findall(r"^vllm:(\S+?)(?:\{(.*?)\})? (\S+)$", page, re.MULTILINE)
    vllm = {name: float(value) for name, labels, value in lines if 'le="' not in labels}
    assert vllm["prompt_tokens_total"] == own["agent_memory_prompt_tokens_total"] > 0
    assert vllm["prefix_cache_queries_total"] == vllm["prompt_tokens_total"]
    hits = sum(v for n, v in own.items() if n.startswith("agent_memory_cached_tokens_total"))
    assert vllm["prefix_cache_hits_total"] == hits > 0
    assert vllm["time_to_first_token_seconds_count"] == 2
    assert 0 < vllm["kv_cache_usage_perc"] < 1
    assert 'vllm:request_success_total{finished_reason="' in page
