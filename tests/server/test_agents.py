"""Agents that the server keeps: what they know is theirs, and a client sends only what is new."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import http_server
from support.http_server import Running

from agent_memory_core import AgentMemory
from agent_memory_core.agents import PersistentAgentManager

PROMPT = "You are a librarian. You know where every book stands, and you say it in few words."
ASK: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
ANNA = {"x-api-key": "anna"}


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


def create(client: httpx.Client, name: str, **more: Any) -> httpx.Response:
    return client.post("/v1/agents", json={"agent_id": name, "system_prompt": PROMPT, **more})


def ask(client: httpx.Client, name: str, prompt: str) -> dict[str, Any]:
    answer = client.post(f"/v1/agents/{name}/generate", json=ASK | {"prompt": prompt})
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


def test_an_agent_remembers_and_computes_only_what_is_new(client: httpx.Client) -> None:
    made = create(client, "a", pinned=True)
    for body, pinned in (({"pinned": False}, False), ({"pinned": True}, True)):
        assert client.patch("/v1/agents/a", json=body).json()["pinned"] is pinned
    assert client.patch("/v1/agents/a", json={"system_prompt": "Other."}).status_code == 400
    assert (made.status_code, made.json()["pinned"]) == (201, True)
    assert create(client, "a").status_code == 409
    first, second = ask(client, "a", "Where is Moby Dick?"), ask(client, "a", "And Hamlet?")
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"]
    messages = client.get("/v1/agents/a/messages").json()["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[2]["content"] == first["text"]
    # The same conversation in the dialect of chats is the same turn.
    chat = client.post("/v1/chat/completions", json=ASK | {"messages": messages[:4]}).json()
    assert chat["choices"][0]["message"]["content"] == second["text"]
    listed = client.get("/v1/agents").json()
    assert listed == client.get("/v1/agents/list").json()
    assert "a" in [agent["agent_id"] for agent in listed["agents"]]
    assert client.get("/v1/agents/stats").json()["total_count"] == listed["total"]


def test_a_fork_goes_its_own_way(client: httpx.Client) -> None:
    create(client, "origin")
    ask(client, "origin", "Where is Emma?")
    assert client.post("/v1/agents/origin/fork", json={"new_id": "copy"}).status_code == 201
    assert client.post("/v1/agents/origin/fork", json={"new_id": "copy"}).status_code == 409
    before = client.get("/v1/agents/origin/messages").json()["messages"]
    forked = ask(client, "copy", "And Persuasion?")
    assert forked["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert client.get("/v1/agents/origin/messages").json()["messages"] == before


def test_an_agent_leaves_memory_and_comes_back_or_goes_for_good(client: httpx.Client) -> None:
    create(client, "gone")
    ask(client, "gone", "Where is Ulysses?")
    assert client.delete("/v1/agents/gone", params={"evict_only": True}).status_code == 204
    warmed = client.post("/v1/agents/gone/prewarm").json()
    assert warmed["cached_tokens"] > 0
    assert client.delete("/v1/agents/gone").status_code == 204
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/messages"), ("POST", "/prewarm")):
        assert client.request(method, f"/v1/agents/gone{path}").status_code == 404
    assert client.post("/v1/agents/gone/generate", json={"prompt": "Hi."}).status_code == 404


def test_questions_at_once_are_answered_one_after_another(client: httpx.Client) -> None:
    create(client, "busy")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda n: ask(client, "busy", f"Book {n}?"), range(3)))
    messages = client.get("/v1/agents/busy/messages").json()["messages"]
    assert [message["role"] for message in messages[1:]] == ["user", "assistant"] * 3


def test_an_agent_answers_while_a_chat_is_streamed(client: httpx.Client) -> None:
    create(client, "beside")
    long = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000}
    form = {"type": "json_schema", "json_schema": {"name": "long", "schema": long}}
    chat = {"messages": [{"role": "user", "content": "Count."}], "response_format": form, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=chat) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        assert ask(client, "beside", "Where is Emma?")["text"]
        assert '"content"' in next(lines)


def test_what_cannot_be_asked_is_refused_and_remembered_by_nobody(client: httpx.Client) -> None:
    create(client, "strict")
    for body in ({}, {"prompt": ""}, {"prompt": "x", "n": 2}):
        assert client.post("/v1/agents/strict/generate", json=body).status_code == 400
    for more in ({"tools": [{"name": "f"}]}, {"ttl": 5}):
        assert create(client, "never", **more).json()["error"]["param"] == next(iter(more))
    assert client.post("/v1/agents/strict/fork", json={"new_id": "b", "at": 1}).status_code == 400
    too_long: dict[str, Any] = {"prompt": "word " * 9000}
    for body in (too_long, too_long | {"stream": True}):
        assert client.post("/v1/agents/strict/generate", json=body).status_code == 400
    assert len(client.get("/v1/agents/strict/messages").json()["messages"]) == 1


LIST = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000}
LONG: dict[str, Any] = {"prompt": "Count.", "max_tokens": 8000, "response_schema": LIST, "stream": True}


def said(client: httpx.Client, name: str) -> list[str]:
    """The roles of an agent's messages after its system prompt."""
    messages = client.get(f"/v1/agents/{name}/messages").json()["messages"]
    return [message["role"] for message in messages[1:]]


def streamed(client: httpx.Client, name: str, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The events of an answer, each with its name."""
    answer = client.post(f"/v1/agents/{name}/generate", json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = (event.split("\n", 1) for event in answer.text.strip().split("\n\n"))
    named = [(name.removeprefix("event: "), json.loads(rest.removeprefix("data: "))) for name, rest in parts]
    return named


def test_a_streamed_answer_is_the_whole_one_and_remembered(client: httpx.Client) -> None:
    create(client, "whole")
    create(client, "streams")
    body = ASK | {"prompt": "Where is Moby Dick?", "max_tokens": 20}
    whole = client.post("/v1/agents/whole/generate", json=body).json()
    *deltas, (name, last) = streamed(client, "streams", body)
    assert {name for name, _ in deltas} == {"delta"}
    assert "".join(delta["text"] for _, delta in deltas) == last["text"] == whole["text"]
    assert (name, last["agent_id"], last.keys()) == ("answer", "streams", whole.keys())
    assert said(client, "streams") == ["user", "assistant"]
    # The next question goes on from both.
    second = ask(client, "streams", "And Hamlet?")
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= last["cache_size_tokens"] - 1


def test_a_client_that_leaves_its_stream_was_not_heard(client: httpx.Client) -> None:
    create(client, "left")
    with client.stream("POST", "/v1/agents/left/generate", json=LONG) as stream:
        lines = stream.iter_lines()
        while not (line := next(lines)).startswith("data: ") or json.loads(line[6:])["text"] == "":
            pass
    # The agent answers its next question only once the one before is over.
    ask(client, "left", "Where is Emma?")
    assert said(client, "left") == ["user", "assistant"]


def test_a_stream_of_an_agent_that_breaks_ends_with_an_error_and_is_forgotten(memory: AgentMemory) -> None:
    with http_server.serve(memory, timeout=0.5, keep_alive=0.01) as server, server.http() as client:
        create(client, "breaks")
        events = streamed(client, "breaks", LONG)
        assert (events[-1][0], events[-1][1]["error"]["code"]) == ("error", "timeout")
        assert ("delta", {"text": ""}) in events
        assert "answer" not in dict(events)
        assert said(client, "breaks") == []


def test_an_agent_outlives_the_server_and_is_its_keys(tmp_path: Path) -> None:
    def opened() -> AgentMemory:
        return AgentMemory(cache_dir=tmp_path, memory_budget_mb=128, min_free_mb=0)

    keys = {"api_keys": ("anna", "bert")}
    with opened() as memory, http_server.serve(memory, **keys) as server, server.http(**ANNA) as anna:
        create(anna, "hers")
        first = ask(anna, "hers", "Where is Dracula?")
    with opened() as memory, http_server.serve(memory, **keys) as server, server.http(**ANNA) as anna:
        bert = {"x-api-key": "bert"}
        assert anna.get("/v1/agents/hers", headers=bert).status_code == 404
        assert anna.get("/v1/agents", headers=bert).json()["total"] == 0
        second = ask(anna, "hers", "And Emma?")
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]


def test_without_a_folder_agents_live_as_long_as_the_server() -> None:
    memory = AgentMemory(cache_dir=None, memory_budget_mb=128)
    with memory, http_server.serve(memory) as server, server.http() as client:
        assert create(client, "a").status_code == 201
        first, second = ask(client, "a", "Where is Moby Dick?"), ask(client, "a", "And Hamlet?")
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= first["usage"]["prompt_tokens"]
        evicted = client.delete("/v1/agents/a", params={"evict_only": True})
    assert evicted.status_code == 500
    assert "cache_dir" in evicted.json()["error"]["message"]


def test_an_agent_is_made_from_a_template_and_forgets_what_was_said(client: httpx.Client) -> None:
    made = client.post("/v1/agents", json={"agent_id": "t", "agent_type": "technical"})
    assert (made.status_code, made.json()["agent_type"]) == (201, "technical")
    assert client.post("/v1/agents", json={"agent_type": "no-such"}).status_code == 400
    ask(client, "t", "Hello.")
    before = client.get("/v1/agents/t/messages").json()["messages"]
    assert client.delete("/v1/agents/t/messages").status_code == 204
    assert client.get("/v1/agents/t/messages").json()["messages"] == before[:1]


def test_an_agent_travels_as_a_file(client: httpx.Client, tmp_path: Path) -> None:
    create(client, "traveller")
    first = ask(client, "traveller", "Where is Persuasion?")
    exported = client.get("/v1/agents/traveller/export")
    assert exported.headers["content-type"] == "application/octet-stream"
    assert client.post("/v1/agents/import", content=exported.content).status_code == 409
    assert client.post("/v1/agents/import", content=b"nothing").status_code == 400
    memory = AgentMemory(
        cache_dir=tmp_path, memory_budget_mb=128, min_free_mb=0, block_tokens=64, kv_bits=None
    )
    with memory, http_server.serve(memory) as server, server.http() as other:
        made = other.post("/v1/agents/import", content=exported.content, params={"new_id": "arrived"})
        assert (made.status_code, made.json()["messages"]) == (201, 2)
        there = ask(other, "arrived", "And Emma?")
    here = ask(client, "traveller", "And Emma?")
    assert there["text"] == here["text"]
    assert there["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]


def test_agents_are_those_of_the_library(client: httpx.Client, memory: AgentMemory) -> None:
    create(client, "shared")
    ask(client, "shared", "Where is Dracula?")
    with PersistentAgentManager(memory=memory) as agents:
        assert agents.load_agent("shared").conversation_history[0]["content"] == "Where is Dracula?"
        agents.generate("shared", "And Emma?", max_tokens=4)
    assert len(client.get("/v1/agents/shared/messages").json()["messages"]) == 3
    ask(client, "shared", "And Hamlet?")
    assert len(client.get("/v1/agents/shared/messages").json()["messages"]) == 7
