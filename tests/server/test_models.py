"""Several models behind one address: requests name one, which is loaded when it is asked for, as the limit allows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from support import http_server
from support.http_server import Running

from agent_memory_core import AgentMemory, InvalidSetting
from agent_memory_core.manager import ManagerConfig, ModelManager
from agent_memory_core.server import create_app
from agent_memory_core.server.errors import ApiError
from agent_memory_core.server.host import Host
from agent_memory_core.testing import write_random_model

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello. " * 40}], "temperature": 0}
ADMIN = {"X-Admin-Key": "root"}


def model(folder: Path, name: str, seed: int, **more: Any) -> dict[str, Any]:
    path = write_random_model(folder / name, seed=seed)
    own = {"cache_dir": str(folder / "store"), "min_free_mb": 0, "kv_bits": None, "memory_budget_mb": 9}
    parameters = {**own, "block_tokens": 64, "max_tokens": 6}
    return {"name": name, "type": "mlx", "path": str(path), "parameters": parameters, **more}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    models = [model(folder, name, seed) for seed, name in enumerate("ab")]
    # Of 10 MiB each: one fits.
    return {"models": models, "max_memory_mb": 15, "default_model": "b", "fair_after": 0.2}


@pytest.fixture
def manager(config: dict[str, Any]) -> Iterator[ModelManager]:
    with ModelManager(ManagerConfig(**config)) as made:
        yield made


@pytest.fixture
def server(manager: ModelManager) -> Iterator[Running]:
    with http_server.serve(manager, admin_key="root", model_alias="chat") as running:
        yield running


def ask(client: httpx.Client, name: str, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json=CHAT | {"model": name} | more)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


def text(answer: dict[str, Any]) -> str:
    content: str = answer["choices"][0]["message"]["content"]
    return content


def test_requests_name_a_model_which_is_loaded_when_it_is_asked_for(
    server: Running, manager: ModelManager
) -> None:
    with server.http(**ADMIN) as client:
        listed = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
        assert listed == ["b", "chat", "a"]
        assert manager.list_loaded_models() == ["b"]
        of_a = ask(client, "a")
        assert of_a["usage"]["completion_tokens"] == 6, "as its configuration says"
        assert manager.list_loaded_models() == ["a"]
        of_b = ask(client, "b")
        assert text(of_a) != text(of_b)
        assert {text(ask(client, name)) for name in ("", "default", "chat")} == {text(of_b)}
        unknown = client.post("/v1/chat/completions", json=CHAT | {"model": "c"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        shown = client.get("/admin/models").json()
        assert (shown["served"], shown["models"]["a"]["load_count"]) == ("b", 1)
        count = client.post("/v1/messages/count_tokens", json=CHAT | {"model": "a", "max_tokens": 1})
        assert count.json()["input_tokens"] == of_a["usage"]["prompt_tokens"]


def test_many_at_once_get_the_answers_of_their_model_and_never_are_two_loaded(
    server: Running, manager: ModelManager
) -> None:
    together: list[list[str]] = []
    manager.register_callback("loaded", lambda name: together.append(manager.list_loaded_models()))
    with server.http() as client:
        expected = {name: text(ask(client, name)) for name in "ab"}

        def one(number: int) -> bool:
            name = "ab"[number % 2]
            return text(ask(client, name, session_id=f"{number}")) == expected[name]

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(one, range(12)))
        metrics = client.get("/metrics").text
    assert all(len(names) == 1 for names in together)
    assert all(stats.leases == 0 for stats in manager.get_model_stats().values())
    loaded = [float(line.rpartition(" ")[2]) for line in metrics.splitlines() if "model_loaded{" in line]
    assert (len(loaded), sum(loaded)) == (2, 1)
    # Turns of both engines are counted, and none of them as one of the other's.
    assert "agent_memory_turn_seconds_count 14.0" in metrics


def test_a_configured_model_is_served_in_place_of_another_and_both_stay(
    server: Running, manager: ModelManager, tmp_path: Path
) -> None:
    broken = write_random_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"broken")
    with server.http(**ADMIN) as client:

        def swap(name: str) -> int:
            return client.post("/admin/swap", json={"model": name, "timeout_seconds": 0}).status_code

        assert swap("a") == 200
        assert text(ask(client, "")) == text(ask(client, "a"))
        assert manager.list_loaded_models() == ["a"]
        assert swap(str(broken)) == 500
        assert manager.list_available_models() == ["a", "b"]
        assert manager.list_loaded_models() == ["a"]
        assert ask(client, "b")
        assert client.post("/admin/models/offload", json={"model": "b"}).json()["status"] == "offloaded"
        assert manager.list_loaded_models() == []


def test_agents_live_on_the_model_that_they_name(server: Running) -> None:
    with server.http() as client:
        made = client.post("/v1/agents", json={"agent_id": "x", "model": "a"})
        assert made.status_code == 201, made.text
        asked = {"prompt": "Hello.", "max_tokens": 4, "model": "a"}
        first = client.post("/v1/agents/x/generate", json=asked).json()
        second = client.post("/v1/agents/x/generate", json=asked).json()
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= first["usage"]["prompt_tokens"] > 0
        assert client.get("/v1/agents/x", params={"model": "a"}).json()["messages"] == 4


def test_after_a_swap_the_memory_is_that_of_one_model(tmp_path: Path) -> None:
    other = str(write_random_model(tmp_path / "other"))
    memory = AgentMemory(cache_dir=tmp_path / "store", memory_budget_mb=32, min_free_mb=0)
    with memory, http_server.serve(memory, admin_key="root") as server, server.http(**ADMIN) as client:

        def active() -> int:
            client.post("/admin/models/offload", json={"timeout_seconds": 30})
            client.post("/admin/models/load")
            return mx.get_active_memory()

        ask(client, "", max_tokens=4)
        alone = active()
        assert client.post("/admin/swap", json={"model": other}).status_code == 200
        ask(client, "", max_tokens=4)
        assert client.post("/admin/swap", json={"model": "tiny-chat"}).status_code == 200
        after = mx.get_active_memory()
        assert memory.weights_bytes == 0, "the first engine is not the one that is served again"
        assert after <= alone + 2**20


async def test_a_turn_that_comes_late_does_not_keep_the_model_before(tmp_path: Path) -> None:
    """One that was on its way when the model was swapped, and loads it once more."""
    other = str(write_random_model(tmp_path / "other"))
    with AgentMemory(cache_dir=None, memory_budget_mb=32) as memory:
        host = Host(memory)
        await host.load()
        late: list[str] = []

        def come_late(name: str) -> None:
            if name == other:
                late.append(memory.chat("Hello.", max_tokens=2).text)

        host.manager.register_callback("loaded", come_late)
        await host.swap(other, 0)
        assert len(late) == 1
        assert (host.served, host.names()) == (other, [other])
        assert (host.manager.list_loaded_models(), memory.weights_bytes) == ([other], 0)
        with pytest.raises(ApiError, match="on this machine"):
            await host.swap("no-such-model", 0)
        host.close()


def test_what_cannot_be_served_is_named(tmp_path: Path) -> None:
    models = [{"name": "g", "type": "gguf", "path": str(tmp_path / "g.gguf"), "memory_mb": 1}]
    with ModelManager(ManagerConfig(models=models)) as manager, pytest.raises(InvalidSetting, match="'g'"):
        create_app(manager)
    with ModelManager() as manager, pytest.raises(InvalidSetting, match="no model"):
        create_app(manager)


@pytest.mark.parametrize(
    ("settings", "asked"), [({"ttl": 0.2}, {}), ({}, {"ttl": 0.2}), ({"ttl": 600}, {"keep_alive": 0})]
)
def test_a_model_that_nobody_uses_is_freed_and_comes_back_with_the_next_turn(
    manager: ModelManager, settings: dict[str, Any], asked: dict[str, Any]
) -> None:
    with http_server.serve(manager, **settings) as server, server.http() as client:
        before = ask(client, "a", session_id="kept", **asked)
        http_server.wait_until(
            lambda: {one.state for one in manager.get_model_stats().values()} == {"unloaded"}
        )
        assert client.get("/health/ready").status_code == 200
        after = ask(client, "a", session_id="kept")
    assert after["choices"] == before["choices"]
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "the session is warm"


def test_the_holder_of_a_key_does_not_free_what_others_use(manager: ModelManager) -> None:
    body = CHAT | {"keep_alive": 0}
    with http_server.serve(manager, api_keys=("k",)) as server, server.http(**{"x-api-key": "k"}) as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.headers["x-agent-memory-ignored"] == "keep_alive"
    assert manager.list_loaded_models() == ["b"]
