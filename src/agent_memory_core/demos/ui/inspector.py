"""The page of what is stored: sessions, their size and last use; pin, forget, fork and check."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from agent_memory_core import AgentMemory, SessionInfo
from agent_memory_core.demos.ui.state import service_of


def show(st: Any) -> None:
    """Draw the page."""
    st.title("What is stored")
    memory, _ = service_of(st)
    sessions = memory.sessions()
    columns = st.columns(2)
    columns[0].metric("sessions", len(sessions))
    columns[1].metric("MiB on disk", round(memory.stats().store.bytes / 2**20, 2))
    if not sessions:
        st.write("Nothing yet.")
        return
    st.dataframe([_row(info) for info in sessions])
    _buttons(st, memory, st.selectbox("Session", [info.session_id for info in sessions]))
    if st.button("Check every file"):
        report = memory.check()
        st.write(f"{report.files} files, {len(report.damaged)} damaged, {len(report.missing)} missing.")


def _row(info: SessionInfo) -> dict[str, Any]:
    return {
        "session": info.session_id,
        "tokens": info.tokens,
        "KiB, shared ones too": round(info.nbytes / 1024),
        "branches": info.branches,
        "pinned": info.pinned,
        "minutes since its last use": round((time.time() - info.last_use) / 60, 1),
    }


def _buttons(st: Any, memory: AgentMemory, session_id: str) -> None:
    acts: dict[str, Callable[[], object]] = {
        "Pin": lambda: memory.pin(session_id),
        "Forget": lambda: memory.forget(session_id),
        "Fork": lambda: memory.fork(session_id, f"{session_id}-fork-{int(time.time())}"),
    }
    for label, act in acts.items():
        if st.button(label):
            act()
            st.rerun()
