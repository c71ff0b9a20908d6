"""The page of the experts: one article each, and the time to the first word cold, hot and after a restart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from agent_memory_core import AgentMemory, SessionKey
from agent_memory_core.coordination import CoordinationService, load_scenario, route
from agent_memory_core.coordination.scenario import Routing
from agent_memory_core.demos.ui.state import restart_button, service_of

PREFIX = "experts-page"


def show(st: Any) -> None:
    """Draw the page."""
    st.title("Experts that remember")
    st.write("Each expert has read one article. A router sends your question to one of them.")
    routing = load_scenario("routing").phases[0].routing
    assert routing is not None
    memory, service = service_of(st)
    sid = _session(st, service, routing)
    question = st.text_input("Question", "What is the code of the harbour?")
    to = st.selectbox("Who answers", ["the router chooses", *routing.experts])
    if st.button("Ask") and question:
        _ask(st, memory, service, sid, routing, question, None if to == "the router chooses" else to)
    restart_button(st)
    _times(st)


def _session(st: Any, service: CoordinationService, routing: Routing) -> str:
    """The session of this page; its experts go on from the last one."""
    known = st.session_state.get("experts")
    if known is not None and known in {status.session_id for status in service.list()}:
        return str(known)
    service.release(PREFIX)
    scenario = load_scenario("routing")
    roles = [scenario.role(name) for name in (routing.router, *routing.experts)]
    spec = {"agents": roles, "topology": "whisper", "persistent_cache_prefix": PREFIX, "reasons": False}
    sid = service.create_session({**spec, "sampling": scenario.sampling}).session_id
    with st.spinner("The experts read their articles."):
        service.prime(sid)
    st.session_state["experts"] = sid
    return sid


def _ask(
    st: Any,
    memory: AgentMemory,
    service: CoordinationService,
    sid: str,
    routing: Routing,
    question: str,
    expert: str | None,
) -> None:
    if expert is None:
        expert, answer = route(service, sid, routing, question)
    else:
        answer = service.turn(sid, speaker=expert, to=routing.router, prompt=question).content
    row = service.stats(sid)[-1]
    st.session_state.setdefault("times", {}).setdefault(row.hit_tier, []).append(row.ttft)
    st.session_state["times"].setdefault("none", []).append(_cold(memory, service, sid, expert))
    st.write(f"**{expert}**: {answer}")
    columns = st.columns(2)
    columns[0].metric("tokens of the prompt", row.prompt)
    columns[1].metric("of these computed", row.new)


def _cold(memory: AgentMemory, service: CoordinationService, sid: str, expert: str) -> float:
    """Seconds to the first token of the same prompt where nothing is known: in a namespace of its own."""
    key = SessionKey(None, namespace=f"cold-{sid}-{len(service.stats(sid))}")
    return memory.chat(service.last_prompt(sid, expert), key, max_tokens=1).report.time_to_first_token


def _times(st: Any) -> None:
    """The times so far, by where the known tokens came from."""
    times: dict[str, Sequence[float]] = st.session_state.get("times", {})
    words = {
        "none": "cold: nothing known",
        "hot": "hot: in memory",
        "warm": "warm: read from disk after a restart",
    }
    rows = [
        {
            "": words[tier],
            "answers": len(times[tier]),
            "median ms": round(statistics.median(times[tier]) * 1000),
        }
        for tier in words
        if times.get(tier)
    ]
    if rows:
        st.subheader("Time to the first token")
        st.table(rows)
