"""The page of a session of your own: any topology, your words and whispers, and a vote."""

from __future__ import annotations

from typing import Any, get_args

from agent_memory_core.coordination import Decision, SessionStatus
from agent_memory_core.coordination.spec import DebateFormat, DecisionMode, Topology
from agent_memory_core.demos.ui.engine import Engine
from agent_memory_core.demos.ui.state import Faces, costs, live, page, tried

ALL = "all"
YOU = "you"

WORDS = "Agents of your own talk in the way that you choose. You may speak, whisper, and let them vote."


def show(st: Any) -> None:
    """Draw the page."""
    with page(st, "A session of your own", WORDS) as engine:
        _draw(st, engine)


def _draw(st: Any, engine: Engine) -> None:
    sid = st.session_state.get("talk")
    known = {status.session_id for status in engine.service.list()} if sid is not None else set()
    with st.expander("Begin a session", expanded=sid not in known):
        _new(st, engine)
    sid = st.session_state.get("talk")
    if sid is None or (sid not in known and not st.session_state.pop("begun", False)):
        return
    status: SessionStatus = engine.service.get(sid)
    faces = Faces({agent.agent_id: agent.name for agent in status.spec.agents})
    talk, side = st.columns([3, 2])
    with talk:
        controls, said = st.container(), st.container()
    if status.is_active:
        with controls:
            _turns(st, engine, status, faces, said)
    with side:
        if status.is_active:
            _words(st, engine, status)
            _whisper(st, engine, status)
            _vote(st, engine, status)
        else:
            st.info("This session is over.")
        _tally(st)
    events = engine.service.events(sid)
    with said:
        for event in events:
            faces.show(st, event)
    costs(st, engine.service.stats(sid))


def _new(st: Any, engine: Engine) -> None:
    with st.form("new"):
        columns = st.columns(2)
        names = columns[0].text_input("Agents", "Ann, Bob, Cyd")
        topology = columns[1].selectbox("Topology", get_args(Topology))
        debate = columns[0].selectbox("Format", get_args(DebateFormat))
        modes = [mode for mode in get_args(DecisionMode) if mode != "none"]
        mode = columns[1].selectbox("Decisions", modes)
        scenario = st.text_area("What they all know", "Three friends plan a trip.")
        begun = st.form_submit_button("Begin", type="primary")
    if begun:
        agents = [{"agent_id": name.strip()} for name in names.split(",") if name.strip()]
        spec = {
            "agents": [*agents, {"agent_id": YOU, "display_name": "You", "is_human": True}],
            "topology": topology,
            "debate_format": debate,
            "initial_prompt": scenario,
            "decision_mode": mode,
            "coordinator": agents[0]["agent_id"] if agents else None,
            "ends_on_decision": False,
            "reasons": False,
            "sampling": {"max_tokens": 64},
        }
        if (status := tried(st, lambda: engine.service.create_session(spec))) is not None:
            st.session_state.update(talk=status.session_id, begun=True, decision=None)


def _turns(st: Any, engine: Engine, status: SessionStatus, faces: Faces, said: Any) -> None:
    ids = [agent.agent_id for agent in status.spec.speakers]
    columns = st.columns(3)
    to = columns[2].selectbox("Whispered to", ids) if status.spec.topology == "whisper" else None
    if status.spec.topology == "interrupt":
        who = columns[2].selectbox("Who cuts in", ids)
        if columns[2].button("Cut in", width="stretch"):
            tried(st, lambda: engine.service.interrupt(status.session_id, who))
    if columns[0].button("Next turn", type="primary", width="stretch"):
        with said:
            steps = engine.service.steps("stream_turn", status.session_id, to=to)
            tried(st, lambda: live(st, steps, faces))
        st.rerun()
    if columns[1].button("A round", width="stretch"):
        with said:
            steps = engine.service.steps("stream_round", status.session_id)
            tried(st, lambda: live(st, steps, faces))
        st.rerun()


def _words(st: Any, engine: Engine, status: SessionStatus) -> None:
    with st.form("words", clear_on_submit=True):
        words = st.text_input("Your words, which all hear")
        said = st.form_submit_button("Say it", width="stretch")
    if said and words:
        tried(st, lambda: engine.service.say(status.session_id, YOU, words))


def _whisper(st: Any, engine: Engine, status: SessionStatus) -> None:
    """Words of anybody to one other, of which nobody else knows."""
    ids = [agent.agent_id for agent in status.spec.agents]
    with st.form("whisper", clear_on_submit=True):
        columns = st.columns(2)
        sender = columns[0].selectbox("Whisper from", [YOU, *(name for name in ids if name != YOU)])
        to = columns[1].selectbox("to", [name for name in ids if name != YOU])
        words = st.text_input("Words that only these two know of")
        said = st.form_submit_button("Whisper", width="stretch")
    if said and words:
        tried(st, lambda: engine.service.whisper(status.session_id, sender, to, words))


def _vote(st: Any, engine: Engine, status: SessionStatus) -> None:
    with st.form("vote"):
        question = st.text_input("Question", "Where do we go?")
        choices = st.text_input("Choices", "sea, hills")
        mine = st.text_input("Your vote, if you have one", "")
        asked = st.form_submit_button("Vote", width="stretch")
    if asked:
        wanted = [choice.strip() for choice in choices.split(",") if choice.strip()]
        st.session_state["decision"] = tried(
            st, lambda: _decided(engine, status, question, wanted, mine.strip())
        )


def _decided(engine: Engine, status: SessionStatus, question: str, choices: list[str], mine: str) -> Decision:
    engine.service.ask(status.session_id, question, choices)
    if mine:
        engine.service.vote(status.session_id, YOU, mine)
    decision: Decision = engine.service.decide(status.session_id)
    return decision


def _tally(st: Any) -> None:
    """The last vote."""
    decision: Decision | None = st.session_state.get("decision")
    if decision is None:
        return
    st.markdown(f"**{decision.question}** {decision.winner or 'Nothing was decided.'}")
    table = {"choice": list(decision.tally), "votes": list(decision.tally.values())}
    st.bar_chart(table, x="choice", y="votes", color="#2563ab", height=180, horizontal=True)
    for ballot in decision.ballots:
        st.caption(f"{ballot.agent_id}: {', '.join(ballot.ranking) or ballot.error or 'abstained'}")
