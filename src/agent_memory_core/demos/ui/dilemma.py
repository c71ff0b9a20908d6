"""The page of the prisoner's dilemma: four phases, what each agent knows, and what comes of it."""

from __future__ import annotations

from typing import Any

from agent_memory_core.coordination import Scenario, Transcript, load_scenario, run_phase
from agent_memory_core.demos.ui.state import costs, restart_button, service_of, told

PREFIX = "dilemma-page"


def show(st: Any) -> None:
    """Draw the page."""
    scenario = load_scenario("prisoners_dilemma")
    st.title("Prisoner's dilemma")
    st.write(
        scenario.description + " What a suspect is told in the first room it still knows in the last phase."
    )
    run: Transcript = st.session_state.setdefault("dilemma", Transcript(scenario=scenario.name))
    _buttons(st, scenario, run)
    run = st.session_state["dilemma"]
    names = {name: str(fields.get("display_name", name)) for name, fields in scenario.agents.items()}
    for record in run.phases:
        st.subheader(next(phase.label for phase in scenario.phases if phase.name == record.name))
        st.table(told(names, record.events))
    costs(st, [row for record in run.phases for row in record.stats])
    _payoff(st, scenario, run)


def _buttons(st: Any, scenario: Scenario, run: Transcript) -> None:
    _, service = service_of(st)
    left = scenario.phases[len(run.phases) :]
    if left and st.button(f"Run {left[0].label}"):
        with st.spinner("They talk."):
            if not run.phases:
                service.release(PREFIX)
                service.delete_persistent(PREFIX)
            st.session_state["dilemma"] = run_phase(scenario, service, left[0], run, prefix=PREFIX)
        st.rerun()
    if run.phases and st.button("Begin again"):
        st.session_state["dilemma"] = Transcript(scenario=scenario.name)
        st.rerun()
    restart_button(st)


def _payoff(st: Any, scenario: Scenario, run: Transcript) -> None:
    """The table of payoffs, with the cell marked that came out."""
    if run.outcome is None or scenario.outcome is None:
        return
    first, second = scenario.outcome.agents
    chosen = tuple(run.outcome.choices[agent] for agent in (first, second))
    rows = []
    for mine in scenario.outcome.choices:
        row: dict[str, str] = {first: mine}
        for other in scenario.outcome.choices:
            paid = scenario.payoff[f"{mine}, {other}"]
            cell = f"{paid[first]:g} / {paid[second]:g}"
            row[f"{second}: {other}"] = f"**{cell}**" if chosen == (mine, other) else cell
        rows.append(row)
    st.subheader("What each gets")
    st.table(rows)
