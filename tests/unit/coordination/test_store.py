"""Several processes share one file of sessions: it is made once, and an agent that is remembered is in one session."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent_memory_core import AgentMemory, StoreUnreadable
from agent_memory_core.coordination import AgentBusy, CoordinationService
from agent_memory_core.coordination.store import VERSION, Store

pytestmark = pytest.mark.usefixtures("all_cores")

MANY = 8
SPEC = {
    "agents": [{"agent_id": "ann", "lifecycle": "permanent"}, {"agent_id": "bob"}],
    "persistent_cache_prefix": "trip",
}


def test_a_file_that_many_open_at_a_moment_is_made_once(tmp_path: Path) -> None:
    for turn in range(5):
        start = threading.Barrier(MANY)

        def opened(_: int, path: Path = tmp_path / f"{turn}.db", start: threading.Barrier = start) -> Store:
            start.wait(10)
            return Store(path)

        with ThreadPoolExecutor(MANY) as threads:
            for store in threads.map(opened, range(MANY)):
                assert store.ids("default") == []
                store.close()


def test_an_agent_that_many_want_at_a_moment_is_in_one_session(tmp_path: Path) -> None:
    """Each has a connection of its own, as processes have. No model is loaded for it."""
    memory = AgentMemory(cache_dir=None)
    services = [CoordinationService(memory, tmp_path / "talk.db") for _ in range(4)]
    for _ in range(5):
        start = threading.Barrier(len(services))

        def begun(service: CoordinationService, start: threading.Barrier = start) -> str:
            start.wait(10)
            try:
                return service.create_session(SPEC).session_id
            except AgentBusy:
                return ""

        with ThreadPoolExecutor(len(services)) as threads:
            found = [session_id for session_id in threads.map(begun, services) if session_id]
        assert len(found) == 1
        services[0].delete(found[0])
    for service in services:
        service.close()


def test_sessions_of_which_nothing_is_under_way_take_no_memory(tmp_path: Path) -> None:
    with CoordinationService(AgentMemory(cache_dir=None), tmp_path / "talk.db") as service:
        for _ in range(10):
            sid = service.create_session({"agents": [{"agent_id": "bob"}]}).session_id
            service.say(sid, "guide", "Hello.")
        gc.collect()
        assert len(service.list()) == 10
        assert len(service._sessions) == 0


def test_a_file_of_another_version_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "talk.db")
    with store.transaction() as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    store.close()
    with pytest.raises(StoreUnreadable, match=f"is of version {VERSION + 1}"):
        Store(tmp_path / "talk.db")
