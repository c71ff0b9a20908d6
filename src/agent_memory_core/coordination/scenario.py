"""Scenarios: sessions that follow each other, written as YAML. What permanent agents hear in one they know in the next.

    scenario = load_scenario("prisoners_dilemma")
    transcript = run_scenario(scenario, service)

A transcript says which phases are over, and is plain JSON: given back, the run goes on after them, also in another
process.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from agent_memory_core import InvalidRequest
from agent_memory_core.coordination.books import Event
from agent_memory_core.coordination.service import CoordinationService
from agent_memory_core.coordination.session import Step
from agent_memory_core.coordination.spec import (
    AgentRole,
    DebateFormat,
    DecisionMode,
    SessionSpec,
    Spec,
    Topology,
)
from agent_memory_core.coordination.voices import TurnStats

SCENARIOS = Path(__file__).parent / "scenarios"
"""Where the scenarios of the package are."""

_PLACE = re.compile(r"\$\{([^}]*)\}")
_MESSAGES = re.compile(r"(\w+)\.messages\[([^\]]+)\]")


class Words(Spec):
    """Words that are entered at the beginning of a phase."""

    sender: str = "system"
    to: tuple[str, ...] = ()
    """Who alone hears them; empty: all."""
    content: str


class Prompt(Spec):
    """A turn of one agent, which is asked something that nobody else is told of."""

    speaker: str
    prompt: str


class Question(Spec):
    """What is decided at the end of a phase."""

    question: str
    choices: tuple[str, ...] | None = None
    """None lets the agents propose."""


class Routing(Spec):
    """Questions of which each is given to the agent that another one picks."""

    router: str
    """Who picks."""
    experts: tuple[str, ...] = Field(min_length=1)
    """Whom it picks from."""
    questions: tuple[str, ...] = ()


class Phase(Spec):
    """One session of a scenario."""

    name: str = Field(pattern=r"^\w+$")
    """Unique in the scenario; other phases refer to it."""
    label: str = ""
    """Its name for people, which the agents hear too."""
    agents: tuple[str, ...] = Field(min_length=1)
    """Ids of those who take part, in their order."""
    topology: Topology = "turn_by_turn"
    debate_format: DebateFormat = "free_form"
    decision_mode: DecisionMode = "none"
    initial_prompt: str = ""
    per_agent_prompt_templates: Mapping[str, str] = Field(default_factory=dict)
    """What one agent alone is told, by id. ``${phase.messages[agent]}`` stands for what an agent said in public in an
    earlier phase."""
    words: tuple[Words, ...] = ()
    """What is said before the first turn."""
    auto_rounds: int = Field(default=0, ge=0)
    """How many rounds are run."""
    prompts: tuple[Prompt, ...] = ()
    """Turns after the rounds."""
    max_turns: int = Field(default=0, ge=0, le=1000)
    decide: Question | None = None
    """What is decided after the rounds."""
    routing: Routing | None = None
    """Questions that are given to experts after the rounds."""


class OutcomeSpec(Spec):
    """Each of some agents chooses in secret, in the last phase; the form of the answer is certain."""

    type: str = Field(default="decision", pattern="^decision$")
    question: str
    choices: tuple[str, ...] = Field(min_length=2)
    agents: tuple[str, ...] = Field(min_length=1)
    """Whose choices these are; the keys of the payoffs are in this order."""


class Scenario(Spec):
    """Agents, the phases they go through, and what comes of it.

    Raises:
        InvalidRequest: a field is unknown or outside its range.
    """

    name: str = Field(pattern=r"^\w+$")
    description: str = ""
    templates: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Fields of agents by a name, which an agent can take over by ``template``."""
    agents: Mapping[str, Mapping[str, Any]] = Field(min_length=1)
    """Fields of `AgentRole` by id; besides, ``template``, and ``reads``: a text file that the agent knows by heart."""
    phases: tuple[Phase, ...] = Field(min_length=1)
    sampling: Mapping[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    reasons: bool = True
    outcome: OutcomeSpec | None = None
    payoff: Mapping[str, Mapping[str, float]] = Field(default_factory=dict)
    """What each agent gets, by the choices of all, joined by ", "."""
    ui: Mapping[str, Any] = Field(default_factory=dict)
    """For who draws it."""

    def role(self, agent_id: str) -> AgentRole:
        """An agent with the fields of its template.

        Raises:
            InvalidRequest: there is no such agent or template.
        """
        if agent_id not in self.agents:
            raise InvalidRequest(
                f"{agent_id!r} is no agent of {self.name!r}: name one of {', '.join(self.agents)}."
            )
        own = dict(self.agents[agent_id])
        template = own.pop("template", None)
        if template is not None and template not in self.templates:
            raise InvalidRequest(
                f"{template!r} is no template of {self.name!r}: name one of {', '.join(self.templates)}."
            )
        return AgentRole(agent_id=agent_id, **{**self.templates.get(template or "", {}), **own})


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class PhaseRecord(_Record):
    """A phase that is over."""

    name: str
    session_id: str
    events: tuple[Event, ...]
    """All of them, private ones too."""
    stats: tuple[TurnStats, ...]
    decided: str | None = None
    """What was decided, where something was."""
    routes: tuple[tuple[str, str], ...] = ()
    """Each question, and who answered it."""


class Outcome(_Record):
    """What came of a scenario."""

    choices: Mapping[str, str | None]
    """By agent; None where it gave none."""
    payoff: Mapping[str, float] = Field(default_factory=dict)
    reasons: Mapping[str, str] = Field(default_factory=dict)
    """Why, in secret, where ballots give reasons; by agent."""


class Transcript(_Record):
    """What happened so far."""

    scenario: str
    phases: tuple[PhaseRecord, ...] = ()
    outcome: Outcome | None = None

    def said(self, phase: str, agent_id: str) -> str:
        """What an agent said in public in a phase.

        Raises:
            InvalidRequest: that phase is not over.
        """
        for record in self.phases:
            if record.name == phase:
                public = (e.content for e in record.events if e.sender_id == agent_id and not e.visible_to)
                return "\n\n".join(public)
        raise InvalidRequest(f"the phase {phase!r} is not over: refer to an earlier one.")


def load_scenario(source: str | Path) -> Scenario:
    """A scenario of the package by its name, or one from a YAML file.

    Raises:
        InvalidRequest: there is none, or it cannot be read.
    """
    try:
        import yaml
    except ImportError as error:
        raise InvalidRequest(
            "a scenario is YAML: install the extra coordination, pip install 'agent-memory-mlx[coordination]'."
        ) from error
    path = SCENARIOS / f"{source}.yaml" if re.fullmatch(r"\w+", str(source)) else Path(source).expanduser()
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        agents = {name: _with_text(fields or {}, path.parent) for name, fields in found["agents"].items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"the scenario {str(source)!r} cannot be read: {error!r}.") from error
    return Scenario(**{**found, "agents": agents})


def run_scenario(
    scenario: Scenario,
    service: CoordinationService,
    *,
    prefix: str = "",
    transcript: Transcript | None = None,
) -> Transcript:
    """Run the phases that are not over yet, and let the agents choose in the last one.

    A phase in which an earlier process was killed is closed, and run from its beginning.

    Args:
        scenario: what is run.
        service: where.
        prefix: under which name permanent agents are remembered; by default that of the scenario.
        transcript: what is over already.
    """
    run = transcript or Transcript(scenario=scenario.name)
    service.release(prefix or scenario.name)
    for phase in scenario.phases[len(run.phases) :]:
        run = run_phase(scenario, service, phase, run, prefix=prefix)
    return run


def run_phase(
    scenario: Scenario, service: CoordinationService, phase: Phase, run: Transcript, *, prefix: str = ""
) -> Transcript:
    """Run one phase in a session, which is closed at its end; return the transcript with it."""
    steps = stream_phase(scenario, service, phase, run, prefix=prefix)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            done: Transcript = end.value
            return done


def stream_phase(
    scenario: Scenario, service: CoordinationService, phase: Phase, run: Transcript, *, prefix: str = ""
) -> Generator[Step, None, Transcript]:
    """`run_phase` as it happens; the transcript is what the generator returns."""
    sid = service.create_session(_session_of(scenario, phase, run, prefix or scenario.name)).session_id
    for words in phase.words:
        service.say(sid, words.sender, words.content, words.to)
    for _ in range(phase.auto_rounds):
        if service.get(sid).is_active:
            yield from service.stream_round(sid)
    for asked in phase.prompts:
        yield from service.stream_turn(sid, speaker=asked.speaker, prompt=asked.prompt)
    routes = _routed(service, sid, phase.routing)
    outcome = run.outcome
    if scenario.outcome is not None and phase is scenario.phases[-1]:
        outcome = _outcome(scenario, scenario.outcome, service, sid)
    decided = None
    if phase.decide is not None:
        decided = service.decide(sid, phase.decide.question, phase.decide.choices).winner
    record = PhaseRecord(
        name=phase.name,
        session_id=sid,
        events=tuple(service.events(sid)),
        stats=tuple(service.stats(sid)),
        decided=decided,
        routes=routes,
    )
    service.close_session(sid)
    return Transcript(scenario=scenario.name, phases=(*run.phases, record), outcome=outcome)


def _session_of(scenario: Scenario, phase: Phase, run: Transcript, prefix: str) -> SessionSpec:
    agents = tuple(scenario.role(agent_id) for agent_id in phase.agents)
    label = f"{phase.label}: " if phase.label and phase.initial_prompt else ""
    told = {name: _filled(text, run) for name, text in phase.per_agent_prompt_templates.items()}
    permanent = any(agent.lifecycle == "permanent" for agent in agents)
    return SessionSpec(
        topology=phase.topology,
        debate_format=phase.debate_format,
        decision_mode=phase.decision_mode,
        agents=agents,
        initial_prompt=label + _filled(phase.initial_prompt, run),
        per_agent_prompts=told,
        max_turns=phase.max_turns,
        persistent_cache_prefix=prefix if permanent else "",
        sampling=scenario.sampling,
        seed=scenario.seed,
        reasons=scenario.reasons,
        ends_on_decision=False,
    )


def _filled(text: str, run: Transcript) -> str:
    def said(place: re.Match[str]) -> str:
        if (found := _MESSAGES.fullmatch(place[1].strip())) is None:
            raise InvalidRequest(f"{place[0]!r} is not valid: write ${{phase.messages[agent]}}.")
        return run.said(found[1], found[2])

    return _PLACE.sub(said, text)


def _routed(service: CoordinationService, sid: str, routing: Routing | None) -> tuple[tuple[str, str], ...]:
    if routing is None:
        return ()
    return tuple((question, route(service, sid, routing, question)[0]) for question in routing.questions)


def route(service: CoordinationService, sid: str, routing: Routing, question: str) -> tuple[str, str]:
    """Let the router pick who answers a question, and let that one answer; return both.

    In the topology whisper the router alone hears the answer, so that no expert reads what another one said.
    """
    picked = service.choose(sid, routing.router, f"Who knows the answer? {question}", routing.experts).choice
    expert = picked or routing.experts[0]
    whispered = service.get(sid).spec.topology == "whisper"
    event = service.turn(sid, speaker=expert, to=routing.router if whispered else None, prompt=question)
    return expert, event.content


def _outcome(scenario: Scenario, wanted: OutcomeSpec, service: CoordinationService, sid: str) -> Outcome:
    ballots = [service.choose(sid, agent, wanted.question, wanted.choices) for agent in wanted.agents]
    choices = {agent: ballot.choice for agent, ballot in zip(wanted.agents, ballots, strict=True)}
    cell = ", ".join(choice or "" for choice in choices.values())
    reasons = {ballot.agent_id: ballot.reason for ballot in ballots if ballot.reason}
    return Outcome(choices=choices, payoff=scenario.payoff.get(cell, {}), reasons=reasons)


def _with_text(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of an agent; what it reads is a conversation that it had before."""
    found = dict(fields)
    if (name := found.pop("reads", None)) is not None:
        text = (folder / name).read_text(encoding="utf-8")
        found["prior_messages"] = _read(text)
    return found


def _read(text: str) -> Sequence[Mapping[str, str]]:
    return (
        {"role": "user", "content": f"Read this and remember it.\n\n{text.strip()}"},
        {"role": "assistant", "content": "I will remember that."},
    )
