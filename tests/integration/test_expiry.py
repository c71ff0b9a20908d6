"""Sessions that nobody used for ``session_ttl_days`` are deleted while an engine runs; pinned ones stay."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from agent_memory_core import AgentMemory, InvalidSetting, StoreError
from agent_memory_core.engine.expiry import Expiry

DAY = 86_400


def aged(folder: Path, **ages: float) -> None:
    """Let sessions look as if their last use were this many days ago."""
    with closing(sqlite3.connect(folder / "catalog.db", isolation_level=None)) as db:
        for session, days in ages.items():
            db.execute(
                "UPDATE branches SET last_use = ? WHERE session IN (SELECT id FROM sessions WHERE session_id = ?)",
                (time.time() - days * DAY, session),
            )


def wait_for(memory: AgentMemory, sessions: set[str]) -> set[str]:
    deadline = time.monotonic() + 20
    while (
        found := {info.session_id for info in memory.sessions()}
    ) != sessions and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_old_sessions_go_when_the_first_turn_runs(tmp_path: Path) -> None:
    with AgentMemory(cache_dir=tmp_path) as memory:
        for session in ("old", "pinned", "fresh"):
            memory.chat("Hello.", session, max_tokens=1)
        memory.pin("pinned")
    aged(tmp_path, old=40, pinned=40, fresh=20)
    with AgentMemory(cache_dir=tmp_path, session_ttl_days=30) as memory:
        assert len(memory.sessions()) == 3, "nothing is deleted by a look at the sessions"
        memory.chat("Hello.", "new", max_tokens=1)
        assert wait_for(memory, {"pinned", "fresh", "new"}) == {"pinned", "fresh", "new"}
    assert not any(thread.name == "agent-memory-expiry" for thread in threading.enumerate())


def test_without_the_setting_sessions_stay(tmp_path: Path) -> None:
    with AgentMemory(cache_dir=tmp_path) as memory:
        memory.chat("Hello.", "old", max_tokens=1)
    aged(tmp_path, old=4000)
    with AgentMemory(cache_dir=tmp_path) as memory:
        memory.chat("Hello.", "new", max_tokens=1)
        assert {info.session_id for info in memory.sessions()} == {"old", "new"}
    with pytest.raises(InvalidSetting, match="session_ttl_days"):
        AgentMemory(session_ttl_days=0)


class Owner:
    """Somebody who has sessions."""


def test_a_failure_is_tried_again() -> None:
    calls: list[int] = []
    done = threading.Event()

    def delete(_: Owner) -> int:
        calls.append(1)
        if len(calls) == 1:
            raise StoreError("the disk is away")
        done.set()
        return 0

    owner = Owner()
    expiry = Expiry(owner, delete, interval=0.01)
    assert done.wait(10)
    expiry.stop()
    count = len(calls)
    time.sleep(0.05)
    assert len(calls) == count


@pytest.mark.parametrize("end", ["closed", "gone"])
def test_the_thread_ends_with_what_it_looks_after(end: str) -> None:
    owner = Owner()
    is_closed = False
    expiry = Expiry(owner, lambda _: None if is_closed else 0, interval=0.01)
    assert expiry._thread.is_alive()
    if end == "closed":
        is_closed = True
    else:
        del owner
    expiry._thread.join(10)
    assert not expiry._thread.is_alive()
