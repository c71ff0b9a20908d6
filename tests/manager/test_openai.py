"""Models at an endpoint: what is sent, what comes back, and that withdrawing a call ends it."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from agent_memory_core import Cancelled, InvalidRequest, InvalidSetting
from agent_memory_core.manager import ManagerConfig, ModelManager

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


class Endpoint(ThreadingHTTPServer):
    """Speaks chat completions: answers with the last message, word by word, or calls the first tool."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.go = threading.Event()
        self.go.set()


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        if body["messages"][-1]["content"] == "bad":
            self.send_error(400)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for chunk in self._chunks(body):
            try:
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
            except OSError:
                return
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "tools" in body:
            for piece in (
                {"id": "c1", "function": {"name": "weather", "arguments": '{"city"'}},
                {"function": {"arguments": ': "Rome"}'}},
            ):
                yield _chunk({"tool_calls": [{"index": 0, **piece}]})
            yield _chunk({}, "tool_calls")
        else:
            for word in body["messages"][-1]["content"].split():
                yield _chunk({"content": f"{word} "})
                self.server.go.wait(30)
            yield _chunk({}, "stop")
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 5},
        }
        yield {
            "id": "1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [],
            "usage": usage,
        }


def _chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.go.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def manager(endpoint: Endpoint) -> Iterator[ModelManager]:
    base = f"http://127.0.0.1:{endpoint.server_port}/v1"
    model = {
        "name": "o",
        "type": "openai",
        "path": "remote",
        "parameters": {"api_base": base, "max_retries": 0, "temperature": 0.5},
    }
    with ModelManager(ManagerConfig(models=[model])) as made:
        yield made


def test_it_streams_and_counts_no_memory(manager: ModelManager, endpoint: Endpoint) -> None:
    model = manager.get_model("o")
    with model.stream("one two three", max_tokens=9) as answer:
        deltas = list(answer)
    assert [delta.text for delta in deltas] == ["one ", "two ", "three ", ""]
    report = deltas[-1].report
    assert report is not None
    assert (report.usage.prompt_tokens, report.usage.cache_read, report.hit_tier) == (7, 5, "none")
    (body,) = endpoint.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("remote", 0.5, 9)
    assert "top_p" not in body, "what nobody named is the endpoint's to choose"
    assert endpoint.keys == ["Bearer not-needed"], "an endpoint on this machine needs no key"
    assert manager.get_memory_usage()["total_mb"] == 0


def test_it_calls_tools(manager: ModelManager, endpoint: Endpoint) -> None:
    answer = manager.get_model("o").chat("What is the weather?", tools=[TOOL], tool_choice="weather")
    (call,) = answer.tool_calls
    assert (call.name, call.arguments, call.id) == ("weather", {"city": "Rome"}, "c1")
    assert answer.report.finish_reason == "tool_calls"
    assert endpoint.bodies[0]["tool_choice"] == {"type": "function", "function": {"name": "weather"}}


def test_a_forced_unload_cancels_a_stream(manager: ModelManager, endpoint: Endpoint) -> None:
    endpoint.go.clear()
    model = manager.get_model("o")
    stream = model.stream("one two three")
    next(stream)
    assert not manager.unload_model("o")
    assert manager.unload_model("o", force=True, timeout=0)
    with pytest.raises(Cancelled):
        next(stream)
    endpoint.go.set()
    assert model.generate("again") == "again "


def test_a_refusal_is_the_callers_error(manager: ModelManager) -> None:
    with pytest.raises(InvalidRequest, match="remote"):
        manager.get_model("o").chat("bad")


def test_a_key_is_never_shown_and_missed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from agent_memory_core.manager import ModelConfig
    from agent_memory_core.manager.backends.openai import api_key_of

    config = ModelConfig(name="o", type="openai", path="m", parameters={"api_key": "secret"})
    assert "secret" not in repr(config)
    assert api_key_of(config) == "secret"
    monkeypatch.setenv("OTHER_KEY", "from there")
    assert (
        api_key_of(ModelConfig(name="o", type="openai", path="m", parameters={"api_key_env": "OTHER_KEY"}))
        == "from there"
    )
    monkeypatch.delenv("OTHER_KEY")
    with pytest.raises(InvalidSetting, match="OTHER_KEY"):
        api_key_of(ModelConfig(name="o", type="openai", path="m", parameters={"api_key_env": "OTHER_KEY"}))
