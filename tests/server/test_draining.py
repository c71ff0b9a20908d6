"""A server that is stopped takes no more turns, lets those in flight end, and uploads what waits, all of it in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore
from starlette.testclient import TestClient
from support.cold_turns import Weather

from agent_memory_core import AgentMemory
from agent_memory_core.scale.ending import end
from agent_memory_core.server import ServerSettings, create_app
from agent_memory_core.server.serving import Server
from agent_memory_core.storage.cold.tier import ColdTier

ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Where are the bees?"}],
    "max_tokens": 4,
    "session_id": "ada",
}
IN_VAIN = 60.0
"""Seconds that whoever waits for the object store in vain once more takes."""
AFTER = IN_VAIN / 3
"""Seconds within which everything ends once the time is over, also on a busy machine."""


class Machine:
    """A server without a socket, whose object store has weather. No turn is answered but through `say`."""

    def __init__(self, folder: Path) -> None:
        self.weather = Weather(MemoryStore())
        self.memory = AgentMemory(cache_dir=folder, cold_url="memory://unused", min_free_mb=0, kv_bits=None)
        store = self.memory._required_store()
        store.mirror.close()
        store.mirror = self.tier = ColdTier(store, self.weather, timeout=1.0)
        app = create_app(self.memory, ServerSettings(api_keys=[]))
        self.server: Server = app.state.server
        self.client = TestClient(app, base_url="http://localhost")

    def say(self) -> Any:
        return self.client.post("/v1/chat/completions", json=ASKED)

    def heads(self) -> int:
        pages = self.weather._bucket.list("v1/plain/")
        return sum("/heads/" in meta["path"] for page in pages for meta in page)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    with made.client:
        while made.client.get("/health/ready").status_code != 200:
            time.sleep(0.01)
        yield made
    made.memory.close()


def drained(machine: Machine, seconds: float) -> tuple[bool, float]:
    """Whether all was uploaded, and the seconds that it took."""
    began = time.monotonic()
    portal = machine.client.portal
    assert portal is not None
    return portal.call(machine.server.drain, seconds), time.monotonic() - began


def test_what_waits_is_uploaded_and_new_turns_are_sent_elsewhere(machine: Machine) -> None:
    machine.weather.delay = 0.1
    assert machine.say().status_code == 200
    assert machine.heads() == 0
    with ThreadPoolExecutor() as pool:
        draining = pool.submit(drained, machine, 20.0)
        while not machine.server.turns.draining:
            time.sleep(0.001)
        refused = machine.say()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert machine.client.get("/health/ready").status_code == 503
        assert draining.result()[0]
    assert machine.heads() == 1
    assert machine.tier.status().waiting == 0


def test_a_bucket_that_is_gone_does_not_keep_a_server_from_ending(machine: Machine, tmp_path: Path) -> None:
    """Nor does closing wait for it once more. What waited is uploaded by the next start."""
    machine.weather.is_gone = True
    assert machine.say().status_code == 200
    machine.tier._timeout = IN_VAIN
    done, seconds = drained(machine, 0.5)
    assert (done, machine.tier.status().waiting_turns > 0) == (False, True)
    assert 0.5 <= seconds < 0.5 + AFTER
    began = time.monotonic()
    machine.tier.close()
    assert time.monotonic() - began < AFTER
    machine.weather.is_gone = False
    store = machine.memory._required_store()
    store.mirror = ColdTier(store, machine.weather, timeout=5.0)
    assert store.mirror.flush(20.0)
    assert machine.heads() == 1


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_replica_ends_the_same_way(machine: Machine, is_gone: bool) -> None:
    """Ray calls this itself when the last request has ended."""
    assert machine.say().status_code == 200
    assert machine.tier.flush(20.0)
    machine.weather.is_gone = is_gone
    machine.memory.chat("And now?", session="bea", max_tokens=2)
    machine.tier._timeout = IN_VAIN
    began = time.monotonic()
    assert end(machine.server, 0.5) == (not is_gone)
    assert time.monotonic() - began < 0.5 + AFTER
    assert machine.server.turns.draining
    assert machine.memory.closed
    assert machine.heads() == (1 if is_gone else 2)
