"""The page of what is stored: sessions, their size and last use; pin, forget, fork and check."""

from __future__ import annotations

import time
from typing import Any

from agent_memory_core.demos.ui.desk import Stored
from agent_memory_core.demos.ui.engine import Engine
from agent_memory_core.demos.ui.state import gauge, page, tried

MIB = 2**20

WORDS = "Every session on disk, and what it takes. All pages share this store."


def show(st: Any) -> None:
    """Draw the page."""
    with page(st, "What is stored", WORDS) as engine:
        _draw(st, engine)


def _draw(st: Any, engine: Engine) -> None:
    sessions: list[Stored] = engine.desk.stored()
    stats = engine.memory.stats()
    alone = sum(each.info.nbytes for each in sessions)
    row = st.container(horizontal=True)
    row.metric("sessions", len(sessions))
    row.metric("MiB on disk", f"{stats.store.bytes / MIB:.2f}")
    row.metric("MiB saved by sharing", f"{max(0, alone - stats.store.bytes) / MIB:.2f}")
    memory = stats.memory
    held = memory.block_bytes + memory.live_bytes + memory.reserved_bytes
    gauge(st, "Keys and values in memory", held / MIB, memory.budget_bytes / MIB)
    gauge(st, "The store", stats.store.bytes / MIB, stats.store.quota / MIB)
    if not sessions:
        st.info("Nothing yet: let agents talk on another page.")
        return
    st.dataframe([_row(each) for each in sessions], hide_index=True)
    _bytes(st, sessions)
    _buttons(st, engine, sessions)


def _row(stored: Stored) -> dict[str, Any]:
    info = stored.info
    return {
        "session": info.session_id,
        "tier": stored.tier,
        "tokens": info.tokens,
        "KiB": round(info.nbytes / 1024),
        "branches": info.branches,
        "pinned": info.pinned,
        "minutes ago": round((time.time() - info.last_use) / 60, 1),
    }


def _bytes(st: Any, sessions: list[Stored]) -> None:
    largest = sorted(sessions, key=lambda each: -each.info.nbytes)[:12]
    table = {
        "session": [_short(each.info.session_id) for each in largest],
        "KiB": [round(each.info.nbytes / 1024) for each in largest],
    }
    st.subheader("The largest ones")
    st.bar_chart(table, x="session", y="KiB", horizontal=True, color="#2563ab", sort="-KiB")
    st.caption("What sessions share counts for each of them.")


def _short(session_id: str) -> str:
    """An id with its last part first: the axis cuts the end off, where the ids of agents differ."""
    rest, _, last = session_id.rpartition("/")
    return f"{last}, {rest}" if rest else last


def _buttons(st: Any, engine: Engine, sessions: list[Stored]) -> None:
    by_name = {each.info.session_id: each.info for each in sessions}
    name = st.selectbox("Session", list(by_name))
    pinned = by_name[name].pinned
    row = st.container(horizontal=True)
    acts = {
        "Unpin" if pinned else "Pin": lambda: engine.memory.pin(name, pinned=not pinned),
        "Fork": lambda: engine.memory.fork(name, f"{name}-fork-{int(time.time())}"),
        "Forget": lambda: engine.memory.forget(name),
    }
    for label, act in acts.items():
        if row.button(label):
            tried(st, act)
            st.rerun()
    if row.button("Check every file"):
        report = engine.memory.check()
        st.success(f"{report.files} files, {len(report.damaged)} damaged, {len(report.missing)} missing.")
