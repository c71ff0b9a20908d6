"""The formats of a debate: its rules, who speaks when, and what a speaker is asked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

from agent_memory_core.coordination.spec import AgentRole, DebateFormat, SessionSpec

_RULES: dict[DebateFormat, str] = {
    "free_form": "",
    "structured": "This is a debate in three rounds: opening statements, rebuttals, closing statements.",
    "socratic": "One of you asks questions, and the others answer them one after another.",
    "devils_advocate": "Whoever is a critic speaks last and must object to what the others agree on.",
    "parliamentary": "The moderator opens and closes each round; between, those for and those against alternate.",
}

STAGES = ("Opening statements.", "Rebuttals.", "Closing statements.")
"""What is announced at the beginning of each round of a structured debate; the last one stays."""


def rules(debate_format: DebateFormat) -> str:
    """What all agents are told of a format."""
    return _RULES[debate_format]


def order(spec: SessionSpec) -> tuple[str, ...]:
    """The ids of those who speak in one round, in order; some formats name one of them twice."""
    agents = spec.speakers
    if spec.debate_format == "socratic" and len(agents) > 1:
        asker, *others = _moved(agents, "moderator", to_front=True)
        return _ids(chain.from_iterable((asker, other) for other in others))
    if spec.debate_format == "devils_advocate":
        return _ids(_moved(agents, "critic", to_front=False))
    if spec.debate_format == "parliamentary":
        return _parliament(agents)
    if spec.topology == "round_robin":
        return _ids(_moved(agents, "moderator", to_front=True))
    return _ids(agents)


def announcement(spec: SessionSpec, position: int) -> str:
    """What is announced before the turn at a position of the whole session; empty where nothing is."""
    length = len(order(spec))
    if spec.debate_format != "structured" or position % length:
        return ""
    stage = position // length
    return STAGES[stage] if stage < len(STAGES) else ""


def cue(spec: SessionSpec, agent: AgentRole, position: int, prompt: str = "", to: str = "") -> str:
    """What a speaker is asked, at a position of the whole session."""
    turn = f"{agent.name}, it is your turn."
    if to:
        turn = f"{agent.name}, whisper to {to}: nobody else will hear it."
    task = prompt or _task(spec, agent, position)
    return f"{turn}\n\n{task}" if task else turn


def _task(spec: SessionSpec, agent: AgentRole, position: int) -> str:
    if spec.debate_format == "socratic":
        return "Answer the question." if position % 2 else "Ask one question."
    if spec.debate_format == "devils_advocate" and agent.role == "critic":
        return "Object."
    return ""


def _parliament(agents: Sequence[AgentRole]) -> tuple[str, ...]:
    moderators = [agent for agent in agents if agent.role == "moderator"][:1]
    others = [agent for agent in agents if agent not in moderators]
    for_it = [agent for agent in others if agent.role == "advocate"]
    against = [agent for agent in others if agent.role == "critic"]
    for agent in others:
        if agent not in for_it and agent not in against:
            min(for_it, against, key=len).append(agent)
    pairs = chain.from_iterable(zip_longest(for_it, against))
    return _ids(chain(moderators, (agent for agent in pairs if agent is not None), moderators))


def _moved(agents: Sequence[AgentRole], role: str, *, to_front: bool) -> list[AgentRole]:
    return sorted(agents, key=lambda agent: (agent.role == role) != to_front)


def _ids(agents: chain[AgentRole] | Sequence[AgentRole]) -> tuple[str, ...]:
    return tuple(agent.agent_id for agent in agents)
