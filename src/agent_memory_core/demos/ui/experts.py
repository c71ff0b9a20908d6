"""The page of the experts: one article each, and the time to the first word cold, hot and after a kill."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from agent_memory_core.coordination import Scenario, load_scenario
from agent_memory_core.coordination.scenario import Routing
from agent_memory_core.demos.ui.engine import Engine
from agent_memory_core.demos.ui.state import numbers, page, tried

PREFIX = "experts-page"
CHOOSES = "the router chooses"

TIERS = {"none": "cold", "hot": "hot", "warm": "after a kill"}
"""What the times are called, by where the known tokens came from."""

WORDS = (
    "Each expert has read one article. A router, which has to name one of them, sends your question there. Ask twice, "
    "kill the engine, and ask again: what an expert has read is never computed a second time."
)


def show(st: Any) -> None:
    """Draw the page."""
    with page(st, "Experts that remember", WORDS) as engine:
        _draw(st, engine)


def _draw(st: Any, engine: Engine) -> None:
    scenario = load_scenario("routing")
    routing = scenario.phases[0].routing
    assert routing is not None
    with st.form("question"):
        columns = st.columns([3, 1])
        question = columns[0].text_input("Question", "What is the code of the harbour?")
        to = columns[1].selectbox("Who answers", [CHOOSES, *routing.experts])
        asked = st.form_submit_button("Ask", type="primary")
    if asked and question:
        tried(st, lambda: _ask(st, engine, scenario, routing, question, to))
    _answer(st)
    _times(st)
    with st.expander("What the experts have read"):
        for name in routing.experts:
            article = scenario.role(name).prior_messages[0].content.partition("\n\n")[2]
            st.markdown(f"**{name}**: {article}")


def _session(st: Any, engine: Engine, scenario: Scenario, routing: Routing) -> str:
    """The session of this page; its experts go on from the last one."""
    known = st.session_state.get("experts")
    if known is not None and known in {status.session_id for status in engine.service.list()}:
        return str(known)
    engine.service.release(PREFIX)
    roles = [scenario.role(name) for name in (routing.router, *routing.experts)]
    spec = {"agents": roles, "topology": "whisper", "persistent_cache_prefix": PREFIX, "reasons": False}
    sid = engine.service.create_session({**spec, "sampling": scenario.sampling}).session_id
    st.session_state["experts"] = sid
    bar = st.progress(0.0, text="The experts read their articles.")
    for count, role in enumerate(roles, 1):
        report = engine.service.prime(sid, [role.agent_id])[role.agent_id]
        bar.progress(count / len(roles), text=f"{role.name}: {report.usage.cache_creation} tokens computed")
    bar.empty()
    return str(sid)


def _ask(st: Any, engine: Engine, scenario: Scenario, routing: Routing, question: str, to: str) -> None:
    sid = _session(st, engine, scenario, routing)
    if to == CHOOSES:
        expert, answer = engine.desk.routed(sid, routing, question)
    else:
        expert, answer = (
            to,
            engine.service.turn(sid, speaker=to, to=routing.router, prompt=question).content,
        )
    row = engine.service.stats(sid)[-1]
    times = st.session_state.setdefault("times", {})
    times.setdefault(row.hit_tier, []).append(row.ttft)
    times.setdefault("none", []).append(engine.desk.cold(sid, expert))
    st.session_state["answer"] = (question, expert, answer, row)


def _answer(st: Any) -> None:
    """The last answer, and what it cost."""
    if "answer" not in st.session_state:
        return
    question, expert, answer, row = st.session_state["answer"]
    st.chat_message("You", avatar=":material/person:").markdown(question)
    bubble = st.chat_message(expert, avatar=":material/menu_book:")
    bubble.caption(expert)
    bubble.markdown(answer)
    numbers(st, row)


def _times(st: Any) -> None:
    """The times so far, by where the known tokens came from."""
    times: dict[str, Sequence[float]] = st.session_state.get("times", {})
    if not times:
        return
    st.subheader("Time to the first token")
    row = st.container(horizontal=True)
    medians = {}
    for tier, name in TIERS.items():
        if found := times.get(tier):
            medians[name] = round(statistics.median(found) * 1000)
            row.metric(f"{name}, median of {len(found)}", f"{medians[name]} ms")
        else:
            row.metric(name, "not yet")
    table = {"known before": list(medians), "ms": list(medians.values())}
    st.bar_chart(table, x="known before", y="ms", x_label="", sort=False, horizontal=True, height=180)
    st.caption(
        "Cold is the same prompt where nothing of it is known. After a kill the answer is the first one of a new "
        "process, which reads from disk."
    )
