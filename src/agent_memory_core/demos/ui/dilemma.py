"""The page of the prisoner's dilemma: five phases, what each suspect knows, and what comes of it."""

from __future__ import annotations

from typing import Any

from agent_memory_core.coordination import PhaseRecord, Scenario, Transcript, load_scenario
from agent_memory_core.demos.ui.engine import Engine
from agent_memory_core.demos.ui.state import Faces, costs, live, page, tried

PREFIX = "dilemma-page"
"""Under which name the agents are remembered."""

NAME = "prisoners_dilemma"

WORDS = (
    " What a suspect is told in the first room it still knows in the last phase, also when the engine was killed in "
    "between: kill it, and run the next phase."
)


def show(st: Any) -> None:
    """Draw the page."""
    scenario = load_scenario(NAME)
    with page(st, "Prisoner's dilemma", scenario.description + WORDS) as engine:
        _draw(st, engine, scenario)


def _draw(st: Any, engine: Engine, scenario: Scenario) -> None:
    run: Transcript = st.session_state.setdefault("dilemma", Transcript(scenario=scenario.name))
    faces = Faces(
        {name: str(fields.get("display_name", name)) for name, fields in scenario.agents.items()},
        scenario.ui.get("icons"),
    )
    _progress(st, scenario, run)
    _buttons(st, engine, scenario, run, faces)
    _payoff(st, scenario, run, faces)
    for record in reversed(run.phases):
        _phase(st, scenario, record, faces, is_last=record is run.phases[-1])
    costs(st, [row for record in run.phases for row in record.stats])


def _progress(st: Any, scenario: Scenario, run: Transcript) -> None:
    labels = [phase.label for phase in scenario.phases]
    done = len(run.phases)
    words = " → ".join(f"**{label}**" if place < done else label for place, label in enumerate(labels))
    st.progress(done / len(labels), text=words)


def _buttons(st: Any, engine: Engine, scenario: Scenario, run: Transcript, faces: Faces) -> None:
    left = scenario.phases[len(run.phases) :]
    row = st.container(horizontal=True)
    one = left and row.button(f"Run {left[0].label}", type="primary")
    rest = left and row.button("Run all")
    again = row.button("Begin again", disabled=not run.phases)
    if again:
        st.session_state["dilemma"] = Transcript(scenario=scenario.name)
    for phase in left if rest else left[:1] if one else ():
        st.subheader(phase.label)
        done = tried(st, lambda: _played(st, engine, faces))
        if done is None:
            return
        st.session_state["dilemma"] = done
    if one or rest or again:
        st.rerun()


def _played(st: Any, engine: Engine, faces: Faces) -> Transcript:
    """The transcript with the next phase, whose words are shown while they are said."""
    engine.service.release(PREFIX)
    done: Transcript = live(st, engine.desk.steps("phase", NAME, st.session_state["dilemma"], PREFIX), faces)
    return done


def _phase(st: Any, scenario: Scenario, record: PhaseRecord, faces: Faces, *, is_last: bool) -> None:
    """A phase with a column for each suspect: what it has heard, and what nobody else has."""
    phase = next(phase for phase in scenario.phases if phase.name == record.name)
    suspects = [str(agent) for agent in scenario.ui["columns"]]
    with st.expander(phase.label, expanded=is_last):
        for column, agent in zip(st.columns(len(suspects)), suspects, strict=True):
            column.markdown(f"##### What {faces.name(agent)} knows")
            if agent not in phase.agents:
                column.caption("Is not here, and hears nothing.")
                continue
            for event in record.events:
                if event.is_known_to(agent):
                    faces.show(column, event)


def _payoff(st: Any, scenario: Scenario, run: Transcript, faces: Faces) -> None:
    """The table of payoffs, with the cell marked that came out."""
    if run.outcome is None or scenario.outcome is None:
        return
    first, second = scenario.outcome.agents
    chosen = tuple(run.outcome.choices[agent] for agent in (first, second))
    st.subheader("What each gets")
    header = [f"{faces.name(first)} ↓ {faces.name(second)} →", *scenario.outcome.choices]
    lines = [header, ["---"] * len(header)]
    for mine in scenario.outcome.choices:
        cells = []
        for other in scenario.outcome.choices:
            paid = scenario.payoff[f"{mine}, {other}"]
            cell = f"{paid[first]:g} / {paid[second]:g}"
            cells.append(f":green-badge[**{cell}**]" if chosen == (mine, other) else cell)
        lines.append([f"**{mine}**", *cells])
    st.markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))
    st.caption(
        "Years, below zero because less is better. Both chose in secret, after all that they had heard."
    )
