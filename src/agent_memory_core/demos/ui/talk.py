"""The page of a session of your own: any topology, your words and whispers, and a vote."""

from __future__ import annotations

from typing import Any, get_args

from agent_memory_core import InvalidRequest
from agent_memory_core.coordination import CoordinationService, SessionStatus
from agent_memory_core.coordination.spec import DebateFormat, Topology
from agent_memory_core.demos.ui.state import costs, pieces, service_of, told


def show(st: Any) -> None:
    """Draw the page."""
    st.title("A session of your own")
    _, service = service_of(st)
    _new(st, service)
    sid = st.session_state.get("talk")
    if sid is None or sid not in {status.session_id for status in service.list()}:
        st.write("Begin a session.")
        return
    status = service.get(sid)
    if status.is_active:
        _turns(st, service, status)
        _words(st, service, status)
        _vote(st, service, status)
    names = {agent.agent_id: agent.name for agent in status.spec.agents}
    st.table(told(names, service.events(sid)))
    costs(st, service.stats(sid))


def _new(st: Any, service: CoordinationService) -> None:
    with st.form("new"):
        names = st.text_input("Agents", "Ann, Bob, Cyd")
        topology = st.selectbox("Topology", get_args(Topology))
        debate = st.selectbox("Format", get_args(DebateFormat))
        scenario = st.text_area("What they all know", "Three friends plan a trip.")
        begun = st.form_submit_button("Begin")
    if begun:
        spec = {
            "agents": [{"agent_id": name.strip()} for name in names.split(",") if name.strip()],
            "topology": topology,
            "debate_format": debate,
            "initial_prompt": scenario,
            "decision_mode": "majority_vote",
            "ends_on_decision": False,
            "sampling": {"max_tokens": 64},
        }
        try:
            st.session_state["talk"] = service.create_session(spec).session_id
        except InvalidRequest as error:
            st.error(str(error))


def _turns(st: Any, service: CoordinationService, status: SessionStatus) -> None:
    ids = [agent.agent_id for agent in status.spec.agents]
    to = st.selectbox("Whispered to", ids) if status.spec.topology == "whisper" else None
    if st.button("Next turn"):
        try:
            st.write_stream(pieces(service.stream_turn(status.session_id, to=to)))
        except InvalidRequest as error:
            st.error(str(error))
    if st.button("A round"):
        st.write_stream(pieces(service.stream_round(status.session_id)))


def _words(st: Any, service: CoordinationService, status: SessionStatus) -> None:
    with st.form("words", clear_on_submit=True):
        words = st.text_input("Your words")
        to = st.selectbox("Who hears them", ["all", *(agent.agent_id for agent in status.spec.agents)])
        said = st.form_submit_button("Say it")
    if said and words:
        service.say(status.session_id, "You", words, () if to == "all" else [to])


def _vote(st: Any, service: CoordinationService, status: SessionStatus) -> None:
    with st.form("vote"):
        question = st.text_input("Question", "Where do we go?")
        choices = st.text_input("Choices", "sea, hills")
        asked = st.form_submit_button("Vote")
    if asked:
        wanted = [choice.strip() for choice in choices.split(",") if choice.strip()]
        try:
            decision = service.decide(status.session_id, question, wanted)
        except InvalidRequest as error:
            st.error(str(error))
            return
        st.write(f"Decided: {decision.winner or 'nothing'}")
        st.bar_chart(
            {"choice": list(decision.tally), "votes": list(decision.tally.values())}, x="choice", y="votes"
        )
