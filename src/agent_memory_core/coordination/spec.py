"""What a session of several agents is: who takes part, who speaks when, and how they decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent_memory_core import InvalidRequest

Topology = Literal["turn_by_turn", "round_robin", "broadcast", "whisper", "interrupt"]
"""Who speaks next and who hears it; see `SessionSpec.topology`."""

DebateFormat = Literal["free_form", "structured", "socratic", "devils_advocate", "parliamentary"]
"""What is asked of a speaker, and in which order; see `SessionSpec.debate_format`."""

DecisionMode = Literal["none", "majority_vote", "ranked_choice", "consensus", "coordinator_decides"]
"""How a question is decided; see `SessionSpec.decision_mode`."""

Name = Annotated[str, Field(min_length=1, max_length=50, pattern=r"^[^:\x00-\x1f\x7f-\x9f]+$")]
"""A name as it stands before what somebody said: 1 to 50 characters, no colon and no control characters."""

T = TypeVar("T")

SYSTEM = "system"
"""The sender of what nobody who takes part has said."""


class Spec(BaseModel):
    """Frozen and checked when made: a wrong value is one sentence that names the field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # type checkers see one keyword for each field

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as wrong:
                raise InvalidRequest(f"{type(self).__name__} is not valid: {_sentence(wrong)}") from None


class Said(Spec):
    """One message of a conversation that an agent had before."""

    role: Literal["user", "assistant"]
    """Who wrote it: the agent is the assistant."""
    content: str


class AgentRole(Spec):
    """One of those who take part.

    Raises:
        InvalidRequest: a field is unknown or outside its range.
    """

    agent_id: Name
    """Unique in the session."""
    display_name: str = Field(default="", max_length=50, pattern=r"^[^:\x00-\x1f\x7f-\x9f]*$")
    """The name that others see, unique too; empty: the id."""
    role: str = "participant"
    """"moderator", "critic", "advocate" and "coordinator" have a place in some formats; any other word has none."""
    system_prompt: str = Field(default="", max_length=2000)
    """What only this agent is told about itself."""
    lifecycle: Literal["ephemeral", "permanent"] = "ephemeral"
    """Whether its memory ends with the session, or goes on in the next one of the same `persistent_cache_prefix`."""
    sampling: Mapping[str, Any] = Field(default_factory=dict)
    """Fields of `SamplingParams`, before those of the session."""
    model: str | None = None
    """One of the models that the service was given by name; None is its first."""
    is_human: bool = False
    """Whether it is a person, who speaks by `say` and votes by `vote`, and is never given the turn."""
    prior_messages: tuple[Said, ...] = ()
    """A conversation that primes the agent: it remembers it as its own. Used where it remembers nothing yet."""

    @property
    def name(self) -> str:
        """What others call it."""
        return self.display_name or self.agent_id


class SessionSpec(Spec):
    """A session of one to thirty agents.

    Raises:
        InvalidRequest: a field is unknown or outside its range, or does not go with another.
    """

    topology: Topology = "turn_by_turn"
    """turn_by_turn: whoever is named speaks next, or else the next in order. round_robin: always the next in order, a
    moderator first. broadcast: all answer the same words at once and hear each other afterwards. whisper: each turn is
    said to one other, and only these two know of it. interrupt: as turn_by_turn, and others may cut in."""
    debate_format: DebateFormat = "free_form"
    """structured: opening, rebuttal and closing rounds. socratic: the first asks and the others answer, in turn.
    devils_advocate: critics speak last and object. parliamentary: a moderator opens and closes, advocates and critics
    alternate between."""
    decision_mode: DecisionMode = "none"
    """majority_vote: most votes, with one run-off. ranked_choice: instant run-off. consensus: all agree, or a share of
    them. coordinator_decides: the coordinator sees the others' ballots and chooses."""
    agents: tuple[AgentRole, ...] = Field(min_length=1, max_length=30)
    """Those who take part, in the order in which they speak."""
    initial_prompt: str = Field(default="", max_length=50_000)
    """The scenario: known to all."""
    per_agent_prompts: Mapping[str, str] = Field(default_factory=dict)
    """What one agent alone is told at the beginning, by its id or its name."""
    prior_agent_messages: Mapping[str, tuple[Said, ...]] = Field(default_factory=dict)
    """`AgentRole.prior_messages` by id or name."""
    max_turns: int = Field(default=0, ge=0, le=1000)
    """After how many turns the session ends; 0 is never."""
    coordinator: str | None = None
    """Whose choice decides ties, and all in coordinator_decides; None: the first agent with that role."""
    persistent_cache_prefix: str = Field(default="", max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
    """Under which name permanent agents are remembered."""
    view: Literal["own", "shared"] = "own"
    """Whether each agent has its own memory, or all share one transcript, which takes the room of one."""
    sampling: Mapping[str, Any] = Field(default_factory=dict)
    """Fields of `SamplingParams` for every turn; the model's own values stand where none is given."""
    seed: int | None = Field(default=None, ge=0)
    """Makes sampled sessions repeatable: turn n is sampled with this number plus n."""
    threshold: float = Field(default=1.0, gt=0, le=1)
    """Which share of the votes a consensus needs."""
    max_rounds: int = Field(default=3, ge=1, le=20)
    """How often a consensus is tried."""
    reasons: bool = True
    """Whether a ballot gives a reason before its choice."""
    ends_on_decision: bool = True
    """Whether the session is over when it has decided."""
    interrupt_every: int = Field(default=0, ge=0)
    """In the topology interrupt: after how many pieces of an answer the others are asked whether they cut in; 0 is
    never."""

    @classmethod
    def of(cls, spec: SessionSpec | Mapping[str, Any]) -> SessionSpec:
        """A specification, from one or from a mapping of its fields."""
        return spec if isinstance(spec, SessionSpec) else cls(**spec)

    def agent(self, who: str) -> AgentRole:
        """The agent of an id or a name.

        Raises:
            InvalidRequest: nobody is called that.
        """
        for agent in self.agents:
            if who in (agent.agent_id, agent.name):
                return agent
        names = ", ".join(agent.agent_id for agent in self.agents)
        raise InvalidRequest(f"{who!r} takes no part in this session: name one of {names}.")

    @property
    def speakers(self) -> tuple[AgentRole, ...]:
        """The agents that are models, in order."""
        return tuple(agent for agent in self.agents if not agent.is_human)

    @property
    def coordinator_id(self) -> str | None:
        """Who decides in the end; None where nobody does."""
        if self.coordinator is not None:
            return self.agent(self.coordinator).agent_id
        return next((agent.agent_id for agent in self.speakers if agent.role == "coordinator"), None)

    def prior(self, agent: AgentRole) -> tuple[Said, ...]:
        """The conversation that an agent had before."""
        return _of(self.prior_agent_messages, agent, agent.prior_messages)

    def told(self, agent: AgentRole) -> str:
        """What an agent alone is told at the beginning."""
        return _of(self.per_agent_prompts, agent, "")

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [name for agent in self.agents for name in {agent.agent_id, agent.name}]
        if len(set(names)) < len(names) or SYSTEM in names:
            raise ValueError(f"ids and names of agents must differ, and none may be {SYSTEM!r}: {names}")
        known = [
            *self.per_agent_prompts,
            *self.prior_agent_messages,
            *([self.coordinator] if self.coordinator else ()),
        ]
        if unknown := [name for name in known if name not in names]:
            raise ValueError(f"{unknown[0]!r} takes no part: name one of {names}")
        if not self.speakers:
            raise ValueError("all agents are people: at least one must be a model")
        return self

    @model_validator(mode="after")
    def _memory(self) -> Self:
        permanent = [agent.agent_id for agent in self.agents if agent.lifecycle == "permanent"]
        if permanent and not self.persistent_cache_prefix:
            raise ValueError(f"{permanent[0]!r} is permanent: give a persistent_cache_prefix")
        if self.view == "shared" and (permanent or self.topology == "whisper" or self.per_agent_prompts):
            raise ValueError("a shared view has no room for whispers, per_agent_prompts and permanent agents")
        return self

    @model_validator(mode="after")
    def _roles(self) -> Self:
        if self.topology == "whisper" and len(self.agents) < 2:
            raise ValueError("a whisper needs two agents")
        if self.decision_mode == "coordinator_decides" and self.coordinator_id is None:
            raise ValueError("coordinator_decides needs a coordinator, or an agent with that role")
        return self


def _of(table: Mapping[str, T], agent: AgentRole, otherwise: T) -> T:
    return table.get(agent.agent_id, table.get(agent.name, otherwise))


def _sentence(wrong: ValidationError) -> str:
    error = wrong.errors()[0]
    place = ".".join(map(str, error["loc"]))
    return f"{place}: {error['msg']}." if place else f"{error['msg'].removeprefix('Value error, ')}."
