"""The page of what is stored: sessions, their size and last use; pin, forget, fork and check."""

from __future__ import annotations

import time
from typing import Any

from agent_memory_core.demos.ui.state import service_of


def show(st: Any) -> None:
    """Draw the page."""
    st.title("What is stored")
    memory, _ = service_of(st)
    sessions = memory.sessions()
    store = memory.stats().store
    columns = st.columns(2)
    columns[0].metric("sessions", len(sessions))
    columns[1].metric("MiB on disk", round(store.bytes / 2**20, 2))
    if not sessions:
        st.write("Nothing yet.")
        return
    now = time.time()
    st.dataframe(
        [
            {
                "session": info.session_id,
                "tokens": info.tokens,
                "KiB, shared ones too": round(info.nbytes / 1024),
                "branches": info.branches,
                "pinned": info.pinned,
                "minutes since its last use": round((now - info.last_use) / 60, 1),
            }
            for info in sessions
        ]
    )
    chosen = st.selectbox("Session", [info.session_id for info in sessions])
    if st.button("Pin"):
        memory.pin(chosen)
        st.rerun()
    if st.button("Forget"):
        memory.forget(chosen)
        st.rerun()
    if st.button("Fork"):
        memory.fork(chosen, f"{chosen}-fork-{int(now)}")
        st.rerun()
    if st.button("Check every file"):
        report = memory.check()
        st.write(f"{report.files} files, {len(report.damaged)} damaged, {len(report.missing)} missing.")
