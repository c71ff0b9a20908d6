"""What is asked for at a path, or in a way, that is not there."""

from __future__ import annotations

import pytest
from support.http_server import Running

ANTHROPIC = {"anthropic-version": "2023-06-01"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
    ],
)
def test_what_is_not_there_is_told_as_every_error(
    server: Running, method: str, path: str, status: int
) -> None:
    with server.http() as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(f"{method} {path}: ")
    assert answer.json()["error"]["code"] in ("not_found", "method_not_allowed")


def test_clients_of_anthropic_are_told_in_their_dialect(server: Running) -> None:
    with server.http(**ANTHROPIC) as client:
        for path in ("/v1/messages/nothing", "/v1/models/nothing"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_the_prefix_of_a_provider_leads_to_the_same_paths_and_to_no_others(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}
    with server.http() as client:
        assert client.post("/anthropic/v1/messages", json=body).json()["type"] == "message"
        assert client.get("/anthropic/v1/models/tiny-chat").json()["id"] == "tiny-chat"
        assert client.get("/anthropic/admin/stats").status_code == 403
        links = client.get("/").json()["links"]
        assert {client.get(path).status_code for path in links.values()} <= {200, 307}


def test_paths_that_clients_make_up_are_counted_as_one(server: Running) -> None:
    with server.http() as client:
        for number in range(3):
            client.get(f"/made-up-{number}")
        page = client.get("/metrics").text
    assert "made-up" not in page
    assert 'endpoint="other",method="GET",status="404"' in page
