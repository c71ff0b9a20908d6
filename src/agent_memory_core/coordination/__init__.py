"""Agents that talk, vote and remember, on the memory of `agent_memory_core`.

`CoordinationService` is the way in. A `Book` and the functions on it (`begin`, `upcoming`, `ask`, `tell`) are the same
sessions as plain data, for programs that let agents speak by other means.
"""

from agent_memory_core.coordination.books import Book, Draft, Event, begin, view
from agent_memory_core.coordination.errors import AgentBusy, InvalidTurn
from agent_memory_core.coordination.plain import event_data, event_of, spoken_data, spoken_of
from agent_memory_core.coordination.scenario import (
    Outcome,
    PhaseRecord,
    Scenario,
    Transcript,
    load_scenario,
    route,
    run_phase,
    run_scenario,
    stream_phase,
)
from agent_memory_core.coordination.service import CoordinationService
from agent_memory_core.coordination.session import Step, Token, TurnComplete, TurnStart
from agent_memory_core.coordination.spec import AgentRole, Said, SessionSpec
from agent_memory_core.coordination.status import AgentState, SessionStatus
from agent_memory_core.coordination.tallies import Ballot, Decision
from agent_memory_core.coordination.turns import Asked, announced, ask, is_over, tell, upcoming
from agent_memory_core.coordination.voices import WARMER, TurnStats, session_name

__all__ = [
    "AgentBusy",
    "AgentRole",
    "AgentState",
    "Asked",
    "Ballot",
    "Book",
    "CoordinationService",
    "Decision",
    "Draft",
    "Event",
    "InvalidTurn",
    "Outcome",
    "PhaseRecord",
    "Said",
    "Scenario",
    "SessionSpec",
    "SessionStatus",
    "Step",
    "Token",
    "Transcript",
    "TurnComplete",
    "TurnStart",
    "TurnStats",
    "WARMER",
    "announced",
    "ask",
    "begin",
    "event_data",
    "event_of",
    "is_over",
    "load_scenario",
    "route",
    "run_phase",
    "run_scenario",
    "session_name",
    "spoken_data",
    "spoken_of",
    "stream_phase",
    "tell",
    "upcoming",
    "view",
]
