"""Streams that last long, and streams that break."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest
from support import http_server

from agent_memory_core import AgentMemory

LONG_PROMPT = [{"role": "user", "content": "one two three four five six seven eight " * 10}]
BODY: dict[str, Any] = {"model": "tiny-chat", "max_tokens": 8}
LIST = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000, "maxItems": 3000}


def test_a_silent_stream_gives_signs_of_life_that_clients_pass_over(memory: AgentMemory) -> None:
    with http_server.serve(memory, keep_alive=0.002) as server:
        chunks = list(
            server.openai().chat.completions.create(**BODY, messages=LONG_PROMPT, temperature=0, stream=True)
        )
        assert sum(not c.choices[0].delta.model_dump(exclude_none=True) for c in chunks if c.choices) > 2
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        # Another prompt, so that it is not there already.
        other = [{"role": "user", "content": "And " + LONG_PROMPT[0]["content"]}]
        with server.http() as client:
            raw = client.post("/v1/messages", json=BODY | {"messages": other, "stream": True}).text
        names = [line.removeprefix("event: ") for line in raw.splitlines() if line.startswith("event: ")]
        assert "ping" in names
        assert next(name for name in names if name != "ping") == "message_start"
        with server.anthropic().messages.stream(**BODY, messages=LONG_PROMPT) as stream:
            assert stream.get_final_message().content[0].text == said
        options: Any = {
            "model": "tiny-chat",
            "input": "Other. " + other[0]["content"],
            "max_output_tokens": 8,
        }
        with server.openai().responses.stream(**options) as events:
            names = [event.type for event in events]
        assert names.count("response.in_progress") > 2


def read_on(events: Any) -> None:
    """Read a stream to its end, or up to the event that tells of its failure, which one client hands out."""
    for event in events:
        assert getattr(event, "type", "") != "response.failed", event.response.error.message


def test_an_answer_that_takes_too_long_is_given_up(memory: AgentMemory) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "list", "schema": LIST}}
    body = {"messages": LONG_PROMPT[:1], "max_tokens": 8000, "response_format": form}
    with http_server.serve(memory, timeout=0.3) as server, server.http() as client:
        answer = client.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        streamed = client.post("/v1/chat/completions", json=body | {"stream": True})
        last = streamed.text.strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


@pytest.mark.parametrize("dialect", ["chat", "messages", "responses"])
def test_a_stream_that_breaks_ends_as_an_error_and_never_as_an_answer(dialect: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "list", "schema": LIST}}
    short = [{"role": "user", "content": "Go."}]
    memory = AgentMemory(cache_dir=None, memory_budget_mb=128)
    with memory, http_server.serve(memory) as server:
        if dialect == "chat":
            options: Any = {"messages": short, "max_tokens": 8000, "response_format": form}
            stream = server.openai().chat.completions.create(**BODY | options, stream=True)
            error: type[Exception] = openai.APIError
        elif dialect == "messages":
            config = {"format": {"type": "json_schema", "schema": LIST}}
            options = {"messages": short, "max_tokens": 8000, "output_config": config}
            stream = server.anthropic().messages.create(**BODY | options, stream=True)
            error = anthropic.APIStatusError
        else:
            text = {"format": {"type": "json_schema", "name": "list", "schema": LIST}}
            stream = server.openai().responses.create(model="", input="Go.", text=text, stream=True)
            error = AssertionError
        events = iter(stream)
        for _ in range(6):
            next(events)
        memory.close()
        with pytest.raises(error, match="closed"):
            read_on(events)
        with server.http() as client:
            assert client.get("/health").status_code == 503
            answer = client.post("/v1/chat/completions", json=BODY | {"messages": short})
        assert answer.status_code == 500
        assert answer.headers["x-should-retry"] == "false"
        assert "closed" in json.loads(answer.text)["error"]["message"]
