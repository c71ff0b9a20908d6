"""What whoever runs the server may do, and that nobody else may."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import http_server
from support.http_server import Running, wait_until

from agent_memory_core import AgentMemory
from agent_memory_core.testing import write_random_model

ADA = {"role": "user", "content": "My name is Ada."}
CHAT: dict[str, Any] = {"messages": [ADA], "max_tokens": 4, "temperature": 0}
LIST = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3000, "maxItems": 3000}
FORM = {"type": "json_schema", "json_schema": {"name": "long", "schema": LIST}}
LONG = CHAT | {"max_tokens": 8000, "stream": True, "response_format": FORM}


@pytest.fixture(scope="module")
def run(memory: AgentMemory) -> Iterator[Running]:
    with http_server.serve(memory, admin_key="root", api_keys=("user",)) as running:
        yield running


@pytest.fixture
def admin(run: Running) -> Iterator[httpx.Client]:
    with run.http(**{"X-Admin-Key": "root", "x-api-key": "user"}) as client:
        yield client


def test_nobody_without_the_admin_key_comes_in(run: Running, server: Running) -> None:
    for key in ({}, {"x-api-key": "user"}, {"X-Admin-Key": "wrong"}, {"X-Admin-Key": "user"}):
        with run.http(**key) as client:
            assert client.post("/admin/seed", json={"seed": 1}).status_code == 401
            for path in ("/admin/stats", "/debug/memory", "/admin/requests", "/admin/nothing"):
                assert client.get(path).status_code == 401, path
    with server.http(**{"X-Admin-Key": ""}) as client:
        assert client.post("/admin/drain").status_code == 403
        assert client.post("/admin/seed", json={"seed": 1}).status_code == 403
        assert client.request("DELETE", "/admin/caches", json={"confirm": True}).status_code == 403
        assert "/admin" not in client.get("/openapi.json").text


def test_live_requests_are_listed_and_one_is_cancelled(run: Running, admin: httpx.Client) -> None:
    headers = {"X-Request-ID": "mine"}
    with admin.stream("POST", "/v1/chat/completions", json=LONG, headers=headers) as stream:
        lines = stream.iter_lines()
        next(lines)
        (live,) = admin.get("/admin/requests").json()["requests"]
        assert (live["request_id"], live["stream"]) == ("mine", True)
        wait_until(lambda: admin.get("/admin/requests").json()["requests"][0]["phase"] == "answer")
        (live,) = admin.get("/admin/requests").json()["requests"]
        assert live["prompt_tokens"] == live["prompt_tokens_done"] > 0
        assert admin.delete("/admin/requests/other").status_code == 404
        assert admin.delete("/admin/requests/mine").json()["status"] == "cancelled"
        assert '"error"' in [line for line in lines if line][-1]
    wait_until(lambda: admin.get("/admin/requests").json()["requests"] == [])


def test_a_server_that_drains_takes_turns_again_when_told_to(admin: httpx.Client) -> None:
    assert admin.post("/admin/drain").json()["status"] == "draining"
    assert admin.get("/health/ready").json()["reason"] == "draining"
    assert admin.post("/v1/chat/completions", json=CHAT).status_code == 503
    admin.delete("/admin/drain")
    assert admin.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_sessions_are_listed_released_and_deleted_only_when_confirmed(admin: httpx.Client) -> None:
    for name in ("a", "b"):
        admin.post("/v1/chat/completions", json=CHAT | {"session_id": name})
    listed = admin.get("/admin/caches").json()["sessions"]
    (namespace,) = {s["namespace"] for s in listed if s["session_id"] == "a"}

    def drop(**body: Any) -> httpx.Response:
        return admin.request("DELETE", "/admin/caches", json={"namespace": namespace, **body})

    def names() -> list[str]:
        found = admin.get("/admin/caches", params={"namespace": namespace}).json()["sessions"]
        return sorted(session["session_id"] for session in found)

    assert drop(scope="all").status_code == 400
    assert drop(scope="all", confirm=True, sesion_id="a").status_code == 400
    assert names() == ["a", "b"]
    assert drop(confirm=True).json()["sessions"] == 2
    assert names() == ["a", "b"]
    assert drop(scope="all", session_id="a", confirm=True).json()["sessions"] == 1
    assert names() == ["b"]
    assert drop(scope="all", confirm=True).json()["sessions"] == 1
    assert names() == []


def test_sessions_are_pinned_and_forked_and_say_what_their_last_turn_did(admin: httpx.Client) -> None:
    admin.post("/v1/chat/completions", json=CHAT | {"session_id": "kept"})
    before = {s["session_id"]: s for s in admin.get("/admin/caches").json()["sessions"]}["kept"]
    owner = {"namespace": before["namespace"], "session_id": "kept"}
    turn = admin.get("/admin/turns").json()["turns"][-1]
    assert before["last_turn"] == turn
    assert (turn["session_id"], turn["completion_tokens"]) == ("kept", 4)
    assert turn["total_seconds"] >= turn["time_to_first_token"] > 0
    assert admin.post("/admin/caches/pin", json=owner).json()["pinned"]
    assert admin.post("/admin/caches/fork", json=owner | {"new_session_id": "copy"}).status_code == 200
    assert admin.post("/admin/caches/fork", json=owner | {"new_session_id": "copy"}).status_code == 400
    assert admin.post("/admin/caches/pin", json=owner | {"session_id": "nobody"}).status_code == 404
    after = {s["session_id"]: s for s in admin.get("/admin/caches").json()["sessions"]}
    assert (after["kept"]["pinned"], after["copy"]["last_turn"]) == (True, None)
    assert after["copy"]["tokens"] == after["kept"]["tokens"]
    admin.request(
        "DELETE", "/admin/caches", json=owner | {"scope": "all", "session_id": None, "confirm": True}
    )


def test_a_seed_makes_answers_that_repeat(admin: httpx.Client) -> None:
    anything = {"role": "user", "content": "Tell me another one, of any kind."}
    # As hot as this, of 40 answers hardly two are equal; asked about a name, the model is sure of what it says.
    body = CHAT | {"messages": [anything], "temperature": 2, "max_tokens": 12}

    def answer() -> str:
        text: str = admin.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        return text

    admin.post("/admin/seed", json={"seed": 7})
    first = answer()
    assert answer() == first
    admin.post("/admin/seed", json={"seed": None})
    assert len({answer() for _ in range(6)} | {first}) > 1


def test_a_prompt_is_computed_before_anybody_asks(admin: httpx.Client) -> None:
    long = CHAT | {"messages": [{"role": "user", "content": "A shared beginning. " * 30}]}
    prewarmed = admin.post("/admin/prewarm", json=long).json()
    assert prewarmed["cached_tokens"] == 0
    assert admin.post("/admin/prewarm", json=long).json()["cached_tokens"] > 64


def test_what_the_memory_counts_is_shown(admin: httpx.Client) -> None:
    stats, debug = admin.get("/admin/stats").json(), admin.get("/debug/memory").json()
    assert stats["turns"] > 0
    assert debug["weights_bytes"] > 0
    assert debug["process_peak_bytes"] > debug["active_bytes"] > 0
    assert "tiny-chat" in admin.get("/admin/models/available").json()["models"]


def test_an_offloaded_model_is_loaded_by_the_next_turn(admin: httpx.Client) -> None:
    assert admin.post("/admin/models/offload").json()["status"] == "offloaded"
    assert not admin.get("/admin/models/current").json()["loaded"]
    assert admin.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert admin.get("/admin/models/current").json()["loaded"]
    assert admin.post("/admin/models/load").json()["loaded"]


def test_models_are_swapped_under_load_and_a_failed_swap_keeps_serving(tmp_path: Path) -> None:
    other = str(write_random_model(tmp_path / "other"))
    broken = write_random_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"broken")
    memory = AgentMemory(cache_dir=tmp_path / "store", memory_budget_mb=128, min_free_mb=0)
    serving = http_server.serve(memory, admin_key="root", any_model=True)
    with memory, serving as server, server.http(**{"X-Admin-Key": "root"}) as client:

        def swap(name: str, seconds: float = 0) -> httpx.Response:
            return client.post("/admin/swap", json={"model_id": name, "timeout_seconds": seconds})

        def cached() -> int:
            answer = client.post("/v1/chat/completions", json=CHAT | {"session_id": "ada"})
            assert answer.status_code == 200, answer.text
            tokens: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return tokens

        assert cached() == 0
        statuses: list[int] = []
        stop = threading.Event()
        loads = [threading.Thread(target=ask, args=(server.url, statuses, stop)) for _ in range(2)]
        for thread in loads:
            thread.start()
        wait_until(lambda: len(statuses) > 4)
        assert swap(other).json()["old_model_id"] == "tiny-chat"
        stop.set()
        for thread in loads:
            thread.join()
        assert set(statuses) <= {200, 503}
        assert client.get("/v1/models").json()["data"][0]["id"] == other
        assert client.get("/").json()["model"] == other
        # The template's opening may be there already.
        assert cached() < 8
        assert (swap("no-such-model").status_code, swap(str(broken)).status_code) == (404, 500)
        assert client.get("/health").status_code == 200
        assert cached() > 0
        assert swap("tiny-chat").json()["new_model_id"] == "tiny-chat"
        assert cached() > 0


def ask(url: str, statuses: list[int], stop: threading.Event) -> None:
    """Ask again and again, as clients do that know nothing of a swap."""
    body = CHAT | {"messages": [{"role": "user", "content": "Hello! What is the time?"}]}
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.is_set():
            statuses.append(client.post("/v1/chat/completions", json=body).status_code)
