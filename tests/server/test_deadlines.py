"""How long an answer may take: what a client asks for, within what the settings allow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.http_server import Running

from agent_memory_core.server import ServerSettings
from agent_memory_core.server.deadlines import time_limit
from agent_memory_core.server.errors import ApiError

LIST = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000}
LONG: dict[str, Any] = {"prompt": "Count.", "max_tokens": 8000, "response_schema": LIST}


@pytest.mark.parametrize(
    ("asked", "timeout", "stream", "limit"),
    [
        (None, None, False, 3600),
        (None, None, True, None),
        (None, 60, False, 60),
        (None, 60, True, 60),
        ("7200", None, False, 7200),
        ("0.5", None, True, 0.5),
        ("7200", 60, False, 60),
        ("5", 60, True, 5),
    ],
)
def test_an_answer_gets_what_its_client_asks_for_and_the_settings_allow(
    asked: str | None, timeout: float | None, stream: bool, limit: float | None
) -> None:
    headers = {} if asked is None else {"x-request-timeout": asked}
    assert time_limit(headers, ServerSettings(timeout=timeout), stream=stream) == limit


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan", ""])
def test_a_time_that_is_none_is_refused_by_its_value(value: str) -> None:
    with pytest.raises(ApiError, match="X-Request-Timeout") as refused:
        time_limit({"x-request-timeout": value}, ServerSettings(), stream=True)
    assert repr(value) in refused.value.message


def test_the_time_of_every_dialect_is_the_one_that_its_client_asks_for(server: Running) -> None:
    form = {"type": "json_schema", "name": "long", "schema": LIST}
    words: dict[str, Any] = {"max_tokens": 8000, "messages": [{"role": "user", "content": "Count."}]}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": words | {"response_format": {"type": "json_schema", "json_schema": form}},
        "/v1/messages": words | {"output_config": {"format": form}},
        "/v1/responses": {"input": "Count.", "text": {"format": form}},
        "/v1/agents/slow/generate": LONG,
    }
    with server.http(**{"X-Request-Timeout": "0.3"}) as client:
        client.post("/v1/agents", json={"agent_id": "slow"})
        for path, body in bodies.items():
            assert client.post(path, json=body).status_code == 504, path
            assert "timeout" in client.post(path, json=body | {"stream": True}).text, path
        refused = client.post("/v1/agents/slow/generate", json=LONG, headers={"X-Request-Timeout": "no"})
        assert refused.status_code == 400


def test_a_question_waits_for_the_one_before_it_in_its_own_time(server: Running) -> None:
    with server.http() as client, ThreadPoolExecutor(1) as pool:
        client.post("/v1/agents", json={"agent_id": "queue"})
        with client.stream("POST", "/v1/agents/queue/generate", json=LONG | {"stream": True}) as first:
            lines = first.iter_lines()
            next(lines)
            asked = {"json": {"prompt": "And?"}, "headers": {"X-Request-Timeout": "0.2"}}
            second = pool.submit(lambda: client.post("/v1/agents/queue/generate", **asked)).result()
            assert (second.status_code, second.json()["error"]["code"]) == (504, "timeout")
        # Whoever gave up stands in nobody's way.
        later = client.post("/v1/agents/queue/generate", json={"prompt": "Hi.", "max_tokens": 2})
        assert later.status_code == 200
        messages = client.get("/v1/agents/queue/messages").json()["messages"]
        assert [message["content"] for message in messages if message["role"] == "user"] == ["Hi."]
