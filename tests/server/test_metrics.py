"""What Prometheus reads, against what the answers say."""

from __future__ import annotations

import re

from support import http_server

from agent_memory_core import AgentMemory


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
