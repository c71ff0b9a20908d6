"""What was said in a session, and what each agent knows of it: plain data, no model, file or clock.

An agent's view is a list of messages that only grows. What it hears waits outside the view until it speaks; then that
and the cue are one user message, and its answer the next. Nothing is ever written again, so that a prompt begins with
all of the prompt before it, and only what is new is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from agent_memory_core import Message
from agent_memory_core.coordination.formats import rules
from agent_memory_core.coordination.spec import SYSTEM, AgentRole, Said, SessionSpec

EventKind = Literal["public", "whisper", "system", "decision"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was said, announced or decided."""

    seq: int
    """Its place in the session, from 0 on."""
    kind: EventKind
    sender_id: str
    """An agent, anybody else, or "system"."""
    content: str
    turn: int
    """How many turns there were before it."""
    visible_to: frozenset[str] = frozenset()
    """Who knows of it; empty: all."""
    interrupted: bool = False
    """Whether somebody cut in before the end."""

    @property
    def event_id(self) -> str:
        """Its name in the session."""
        return f"event-{self.seq}"

    def is_known_to(self, agent_id: str) -> bool:
        """Whether an agent knows of it."""
        return not self.visible_to or agent_id in self.visible_to


@dataclass(frozen=True, slots=True)
class Spoken:
    """One time that an agent spoke: up to where it had heard, and what it said."""

    agent_id: str
    upto: int
    """How many events there were when it began."""
    cue: str
    """What it was asked."""
    said: str
    """What the model wrote."""
    seq: int
    """The event that this became."""
    compacted: bool = False
    """Whether the agent's view was made shorter before."""
    is_turn: bool = True
    """Whether it counts as a turn; a coordinator's decision does not."""
    cut_by: str | None = None
    """Who cut in, and speaks next."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user message and its answer, in an agent's view."""

    heard: str
    cue: str
    said: str


@dataclass(frozen=True, slots=True)
class Mind:
    """What an agent brings with it into a session."""

    shared: str
    """The first part of its system message."""
    exchanges: tuple[Exchange, ...] = ()
    waiting: str = ""
    """What it has heard and not yet answered."""
    role: str = ""
    """The last part of its system message."""


@dataclass(frozen=True, slots=True)
class Book:
    """A session: what it is, and all that happened in it so far."""

    spec: SessionSpec
    minds: Mapping[str, Mind]
    """What each agent brought."""
    events: tuple[Event, ...] = ()
    spoken: tuple[Spoken, ...] = ()

    @property
    def turns(self) -> int:
        """How many turns there were."""
        return sum(once.is_turn for once in self.spoken)


@dataclass(frozen=True, slots=True)
class View:
    """What an agent has in mind: the messages so far, and what it has heard since."""

    system: str
    exchanges: tuple[Exchange, ...]
    waiting: str

    def messages(self) -> tuple[Message, ...]:
        """The messages so far, the system message first."""
        pairs = (
            message
            for each in self.exchanges
            for message in (Message("user", joined(each.heard, each.cue)), Message("assistant", each.said))
        )
        return (*([Message("system", self.system)] if self.system else ()), *pairs)

    def prompt(self, cue: str) -> tuple[Message, ...]:
        """The messages with which the agent is asked."""
        return (*self.messages(), Message("user", joined(self.waiting, cue)))


@dataclass(frozen=True)
class Draft:
    """Events and turns that are about to happen together; they are numbered as they are added."""

    book: Book
    events: list[Event] = field(default_factory=list)
    spoken: list[Spoken] = field(default_factory=list)

    def add(
        self,
        kind: EventKind,
        sender_id: str,
        content: str,
        to: Iterable[str] = (),
        *,
        interrupted: bool = False,
    ) -> Event:
        """Add an event; ``to`` names those who know of it beside the sender, and nobody means all."""
        seen = frozenset(to)
        if seen and sender_id != SYSTEM:
            seen |= {sender_id}
        turn = self.book.turns + sum(once.is_turn for once in self.spoken)
        seq = len(self.book.events) + len(self.events)
        event = Event(seq, kind, sender_id, content, turn, seen, interrupted)
        self.events.append(event)
        return event

    def done(self) -> Book:
        """The book with these in it."""
        book = self.book
        return replace(book, events=(*book.events, *self.events), spoken=(*book.spoken, *self.spoken))


def begin(spec: SessionSpec, minds: Mapping[str, Mind] | None = None) -> Book:
    """A session that begins; ``minds`` are those of agents that go on from an earlier one.

    They are told the scenario as an event: their system message stays as it is, and so does all that follows it.
    """
    known = minds or {}
    shared = shared_text(spec)
    first = {
        agent.agent_id: known.get(agent.agent_id) or Mind(shared, *_primed(spec.prior(agent)))
        for agent in spec.speakers
    }
    roles = {agent.agent_id: replace(first[agent.agent_id], role=role_text(agent)) for agent in spec.speakers}
    draft = Draft(Book(spec, roles))
    if known and shared:
        everybody = len(known) == len(spec.agents)
        draft.add("system", SYSTEM, shared, () if everybody else known)
    for agent in spec.agents:
        if told := spec.told(agent):
            draft.add("system", SYSTEM, told, [agent.agent_id])
    return draft.done()


def view(book: Book, agent_id: str) -> View:
    """What an agent has in mind. It follows from the book alone, and later views begin with its messages."""
    if book.spec.view == "shared":
        return _shared_view(book)
    mind = book.minds[agent_id]
    exchanges, waiting, start = mind.exchanges, mind.waiting, 0
    own = {once.seq for once in book.spoken if once.agent_id == agent_id}
    for once in book.spoken:
        if once.agent_id == agent_id:
            heard = joined(waiting, _heard(book, agent_id, own, start, once.upto))
            if once.compacted:
                heard, exchanges = joined(_retold(book, agent_id, exchanges), heard), ()
            exchanges, waiting, start = (*exchanges, Exchange(heard, once.cue, once.said)), "", once.upto
    waiting = joined(waiting, _heard(book, agent_id, own, start, len(book.events)))
    return View(joined(mind.shared, mind.role), exchanges, waiting)


def compacted(book: Book, agent_id: str) -> View:
    """The view of an agent made shorter: its last third, told in one message, and what it has heard since."""
    full = view(book, agent_id)
    if book.spec.view == "shared":
        return replace(full, waiting=_transcript(book, 2 * len(book.events) // 3))
    return View(full.system, (), joined(_retold(book, agent_id, full.exchanges), full.waiting))


def last_prompt(book: Book, agent_id: str) -> tuple[Message, ...]:
    """The messages with which an agent was asked in its last turn; none where it had no turn."""
    seen = view(book, agent_id)
    if seen.exchanges and any(once.agent_id == agent_id for once in book.spoken):
        return seen.messages()[:-1]
    return ()


def mind_after(book: Book, agent_id: str) -> Mind:
    """What an agent takes with it into the next session."""
    last = view(book, agent_id)
    mind = book.minds[agent_id]
    return replace(mind, exchanges=last.exchanges, waiting=last.waiting)


def known_events(book: Book, agent_id: str | None = None) -> list[Event]:
    """The events that an agent knows of, or those that all know of."""
    return [
        event
        for event in book.events
        if (not event.visible_to if agent_id is None else event.is_known_to(agent_id))
    ]


def shared_text(spec: SessionSpec) -> str:
    """What all agents know from the beginning: the same words for all, so that it is computed and stored once."""
    names = ", ".join(agent.name for agent in spec.agents)
    cast = f"Those who talk here: {names}." if len(spec.agents) > 1 else ""
    return joined(spec.initial_prompt, rules(spec.debate_format), cast)


def role_text(agent: AgentRole) -> str:
    """What an agent is told about itself."""
    return f"You are {agent.name}. {agent.system_prompt}".strip()


def joined(*parts: str) -> str:
    """Parts of a text, a blank line between them, empty ones left out."""
    return "\n\n".join(part for part in parts if part)


def name_of(spec: SessionSpec, sender_id: str) -> str:
    """What a sender is called, whether it is one of the agents or not."""
    return next((agent.name for agent in spec.agents if agent.agent_id == sender_id), sender_id)


def _primed(prior: Sequence[Said]) -> tuple[tuple[Exchange, ...], str]:
    """The exchanges of a conversation, and what of it was not answered."""
    exchanges: list[Exchange] = []
    waiting = ""
    for message in prior:
        if message.role == "user":
            waiting = joined(waiting, message.content)
        elif waiting or not exchanges:
            exchanges.append(Exchange(waiting or "Begin.", "", message.content))
            waiting = ""
        else:
            last = exchanges[-1]
            exchanges[-1] = replace(last, said=joined(last.said, message.content))
    return tuple(exchanges), waiting


def _heard(book: Book, agent_id: str, own: set[int], start: int, stop: int) -> str:
    return joined(
        *(
            _as_heard(book.spec, event, agent_id)
            for event in book.events[start:stop]
            if event.seq not in own and event.is_known_to(agent_id)
        )
    )


def _as_heard(spec: SessionSpec, event: Event, agent_id: str) -> str:
    name = name_of(spec, event.sender_id)
    if event.kind == "decision":
        return f"[decided] {event.content}"
    if event.sender_id == SYSTEM:
        return event.content
    if event.kind != "whisper":
        return f"{name}: {event.content}" if event.sender_id != agent_id else f"[you said] {event.content}"
    if event.sender_id != agent_id:
        return f"[whisper from {name}] {event.content}"
    others = ", ".join(name_of(spec, other) for other in sorted(event.visible_to - {agent_id}))
    return f"[you whispered to {others}] {event.content}"


def _retold(book: Book, agent_id: str, exchanges: Sequence[Exchange]) -> str:
    """The last third of what an agent has in mind, as one text."""
    name = name_of(book.spec, agent_id)
    kept = exchanges[len(exchanges) - len(exchanges) // 3 :]
    return joined("[what was said before]", *(joined(each.heard, f"{name}: {each.said}") for each in kept))


def _shared_view(book: Book) -> View:
    start = 0
    for once in book.spoken:
        if once.compacted:
            start = 2 * once.upto // 3
    cast = " ".join(
        f"{agent.name}: {agent.system_prompt}" for agent in book.spec.agents if agent.system_prompt
    )
    return View(joined(shared_text(book.spec), cast), (), _transcript(book, start))


def _transcript(book: Book, start: int) -> str:
    return joined(*(_as_heard(book.spec, event, "") for event in book.events[start:] if not event.visible_to))
