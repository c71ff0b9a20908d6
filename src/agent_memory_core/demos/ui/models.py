"""The page of the models: who is in memory, who makes room for whom, and what became of each."""

from __future__ import annotations

import time
from typing import Any

from agent_memory_core.demos.ui.desk import Happened
from agent_memory_core.demos.ui.engine import Engine
from agent_memory_core.demos.ui.state import gauge, page, tried

WORDS = (
    "Several models share one memory. Asking one loads it; where there is no room, the least important one that nobody "
    "uses leaves. Its sessions stay on disk and are warm when it comes back."
)


def show(st: Any) -> None:
    """Draw the page."""
    with page(st, "Models", WORDS) as engine:
        _draw(st, engine)


def _draw(st: Any, engine: Engine) -> None:
    names = engine.manager.list_available_models()
    _ask(st, engine, names)
    usage = engine.manager.get_memory_usage()
    gauge(st, "All models", usage["total_mb"], usage["limit_mb"])
    _table(st, engine, names)
    columns = st.columns(2)
    columns[0].subheader("Memory")
    taken = {"model": list(usage["models"]), "MiB": list(usage["models"].values())}
    if usage["models"]:
        columns[0].bar_chart(taken, x="model", y="MiB", horizontal=True, color="#2563ab", height=220)
    else:
        columns[0].caption("No model is loaded.")
    columns[1].subheader("Events")
    happened: list[Happened] = engine.desk.happened()
    for each in happened:
        columns[1].markdown(
            f"`{time.strftime('%H:%M:%S', time.localtime(each.when))}` {each.model}: {each.event}"
        )
    if not happened:
        columns[1].caption("None yet.")


def _ask(st: Any, engine: Engine, names: list[str]) -> None:
    with st.form("ask"):
        columns = st.columns([1, 3])
        name = columns[0].selectbox("Model", names)
        words = columns[1].text_input("Words", "My name is Ada. What is my name?")
        asked, load, unload = (
            column.form_submit_button(label, width="stretch")
            for column, label in zip(st.columns(3), ("Ask", "Load", "Unload"), strict=True)
        )
    if asked and words and (answer := tried(st, lambda: engine.desk.ask_model(name, words))) is not None:
        st.chat_message(name, avatar=":material/neurology:").markdown(answer)
    if load:
        tried(st, lambda: engine.desk.load_model(name))
    if unload:
        tried(st, lambda: engine.manager.unload_model(name))


def _table(st: Any, engine: Engine, names: list[str]) -> None:
    stats = engine.manager.get_model_stats()
    rows = [
        {
            "model": name,
            "state": stats[name].state,
            "leases": stats[name].leases,
            "MiB": stats[name].memory_usage_mb,
            "loads": stats[name].load_count,
            "load, s": round(stats[name].load_seconds, 2),
            "made room": stats[name].evictions,
            "idle, s": round(stats[name].idle_seconds),
        }
        for name in names
    ]
    st.dataframe(rows, hide_index=True)
