"""Whose turn it is, and how a turn becomes a part of the book."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent_memory_core import Message
from agent_memory_core.coordination import books, formats
from agent_memory_core.coordination.books import Book, Draft, Event, Spoken
from agent_memory_core.coordination.errors import InvalidTurn
from agent_memory_core.coordination.spec import SYSTEM, AgentRole

SILENCE = "(says nothing)"
"""The event of an agent whose model wrote nothing."""


@dataclass(frozen=True, slots=True)
class Asked:
    """An agent that is about to speak."""

    agent: AgentRole
    cue: str
    messages: tuple[Message, ...]
    stop: tuple[str, ...]
    """Texts that end the answer: the beginnings of what others would say."""
    number: int
    """The turn's number in the session, from 0 on: what is added to the session's seed."""
    upto: int
    """How many events the agent knows of, or could know of."""
    to: str | None = None
    """To whom alone it speaks."""
    compacted: bool = False


def position(book: Book) -> int:
    """How many turns of the order are over; a speaker who was named out of order moves it to its own place."""
    order, place = formats.order(book.spec), 0
    for once in book.spoken:
        if not once.is_turn:
            continue
        if once.agent_id == order[place % len(order)]:
            place += 1
        else:
            place += (order.index(once.agent_id) - place) % len(order) + 1
    return place


def next_speaker(book: Book) -> str:
    """The id of who speaks next if nobody is named: who cut in, or else the next of the order."""
    if book.spoken and (cut_by := book.spoken[-1].cut_by) is not None:
        return cut_by
    order = formats.order(book.spec)
    return order[position(book) % len(order)]


def is_over(book: Book) -> bool:
    """Whether the session had all its turns, or has decided."""
    spec = book.spec
    decided = spec.ends_on_decision and any(
        event.kind == "decision" and not event.visible_to and event.sender_id == SYSTEM
        for event in book.events
    )
    return decided or (spec.max_turns > 0 and book.turns >= spec.max_turns)


def chosen(book: Book, speaker: str | None, to: str | None) -> tuple[AgentRole, str | None]:
    """Who speaks, and to whom alone.

    Raises:
        InvalidTurn: it is not that agent's turn, or it is not said to whom a whisper goes.
    """
    spec = book.spec
    agent = spec.agent(speaker if speaker is not None else next_speaker(book))
    if agent.is_human:
        raise InvalidTurn(f"{agent.name!r} is a person: enter its words with say.")
    if spec.topology == "round_robin" and agent.agent_id != next_speaker(book):
        raise InvalidTurn(f"it is the turn of {next_speaker(book)!r}, not of {speaker!r}: name nobody.")
    if (to is None) == (spec.topology == "whisper"):
        raise InvalidTurn(
            "a turn of the topology whisper needs to=, an agent."
            if to is None
            else f"to={to!r} is for the topology whisper: use whisper() to whisper in any other."
        )
    target = spec.agent(to).agent_id if to is not None else None
    if target == agent.agent_id:
        raise InvalidTurn(f"{agent.name!r} cannot whisper to itself.")
    return agent, target


def announced(book: Book) -> Book:
    """The book with what is announced before the next turn."""
    text = formats.announcement(book.spec, position(book))
    if not text or any(event.sender_id == SYSTEM and event.content == text for event in book.events):
        return book
    draft = Draft(book)
    draft.add("system", SYSTEM, text)
    return draft.done()


def ask(
    book: Book,
    agent: AgentRole,
    to: str | None = None,
    prompt: str = "",
    place: int = 0,
    *,
    compact: bool = False,
) -> Asked:
    """What an agent is asked, ``place`` turns after the next one of the order."""
    spec = book.spec
    target = books.name_of(spec, to) if to is not None else ""
    cue = formats.cue(spec, agent, position(book) + place, prompt, target)
    seen = (books.compacted if compact else books.view)(book, agent.agent_id)
    return Asked(
        agent,
        cue,
        seen.prompt(cue),
        tuple(f"\n{other.name}:" for other in spec.agents if other != agent),
        book.turns + place,
        len(book.events),
        to,
        compact,
    )


def tell(draft: Draft, asked: Asked, said: str, cut_by: str | None = None) -> Event:
    """Add what an agent said, until somebody cut in."""
    event = draft.add(
        "whisper" if asked.to is not None else "public",
        asked.agent.agent_id,
        said.strip() or SILENCE,
        [asked.to] if asked.to is not None else [],
        interrupted=cut_by is not None,
    )
    once = Spoken(
        asked.agent.agent_id, asked.upto, asked.cue, said, event.seq, asked.compacted, cut_by=cut_by
    )
    draft.spoken.append(once)
    return event


def round_of(book: Book, pairs: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str | None]]:
    """Who speaks in the rest of this round, and to whom: each once, in order.

    In the topology whisper ``pairs`` says who whispers to whom; otherwise each whispers to the next.
    """
    order = formats.order(book.spec)
    place = position(book) % len(order)
    if book.spec.topology != "whisper":
        return [
            (agent_id, None) for agent_id in (order[place:] if book.spec.topology != "broadcast" else order)
        ]
    if pairs:
        return [(book.spec.agent(a).agent_id, book.spec.agent(b).agent_id) for a, b in pairs]
    everybody = [agent.agent_id for agent in book.spec.agents]
    return [(a, everybody[(everybody.index(a) + 1) % len(everybody)]) for a in order[place:]]


def upcoming(book: Book) -> list[tuple[str, str | None]]:
    """Who speaks next and to whom alone, if nobody is named; all, in a broadcast."""
    if book.spec.topology == "broadcast":
        return round_of(book)
    _, to = round_of(book)[0]
    return [(next_speaker(book), to)]
