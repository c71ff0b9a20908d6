"""A session at work: one thing at a time happens in it, and is kept as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agent_memory_core import Message
from agent_memory_core.coordination import books, turns
from agent_memory_core.coordination.ballots import read
from agent_memory_core.coordination.books import Book, Draft, Event
from agent_memory_core.coordination.errors import InvalidTurn
from agent_memory_core.coordination.line import Line, Place
from agent_memory_core.coordination.spec import AgentRole
from agent_memory_core.coordination.store import Store
from agent_memory_core.coordination.turns import Asked
from agent_memory_core.coordination.voices import Speech, Voices, stats_of


@dataclass(frozen=True, slots=True)
class TurnStart:
    """An agent begins to speak."""

    agent_id: str
    turn: int
    """The turn's number in the session, from 0 on."""


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of what an agent says."""

    agent_id: str
    text: str
    accumulated: str
    """All that it has said so far."""


@dataclass(frozen=True, slots=True)
class TurnComplete:
    """An agent has spoken."""

    event: Event


Step = TurnStart | Token | TurnComplete
"""What a streamed turn is made of."""

CUT_IN = "{name} is saying: {text}\n\nDo you cut in now?"


class Floor:
    """Those who speak at the moment; what they say is kept together, once, when they have ended or somebody cut in."""

    def __init__(self, session: Session, place: Place, book: Book, speeches: Sequence[Speech]) -> None:
        self.book = book
        self.speeches = speeches
        self._session = session
        self._place = place
        self._lock = threading.Lock()
        self._events: list[Event] | None = None

    def finish(self, cut_by: str | None = None) -> list[Event]:
        """Keep what was said, and let the next one into the line; return the events."""
        with self._lock:
            if self._events is None:
                draft, stats = Draft(self.book), []
                for speech in self.speeches:
                    turns.tell(draft, speech.asked, speech.end(), cut_by)
                    if (report := speech.report) is not None:
                        asked = speech.asked
                        row = stats_of(asked.number, asked.agent.agent_id, "turn", report, asked.compacted)
                        stats.append(row)
                self._session.keep(draft, stats)
                self._events = draft.events
            if cut_by is not None:
                self._place.leave()
            return self._events

    def withdraw(self) -> None:
        """End what has not ended; nothing of it is kept."""
        for speech in self.speeches:
            speech.end()


class Session:
    """One session of a store. All but `cut` and `withdraw` is done by who is inside its line."""

    def __init__(self, session_id: str, store: Store, voices: Voices) -> None:
        self.session_id = session_id
        self.line = Line()
        self.voices = voices
        self._store = store
        self._floor: Floor | None = None

    def book(self) -> Book:
        """The session as it is kept.

        Raises:
            SessionNotFound: it was deleted.
        """
        return self._store.load(self.session_id, self.voices.namespace).book

    def open_book(self) -> Book:
        """The same, of a session in which something can still happen.

        Raises:
            InvalidTurn: it is over.
        """
        stored = self._store.load(self.session_id, self.voices.namespace)
        if stored.closed or turns.is_over(stored.book):
            raise InvalidTurn(f"the session {self.session_id!r} is over: create another one.")
        return stored.book

    def keep(self, draft: Draft, stats: Sequence[dict[str, Any]] = ()) -> None:
        """Keep what happened."""
        self._store.append(self.session_id, draft, stats)

    def add(self, kind: books.EventKind, sender_id: str, content: str, to: Sequence[str] = ()) -> Event:
        """Add one event."""
        draft = Draft(self.book())
        event = draft.add(kind, sender_id, content, to)
        self.keep(draft)
        return event

    def note(self, kind: str, body: dict[str, Any]) -> None:
        """Keep an entry of another kind than events and turns."""
        self._store.note(self.session_id, kind, [body])

    # Speaking

    def speak(self, place: Place, choose: Callable[[Book], Sequence[Asked]]) -> Iterator[Step]:
        """Let those speak whom ``choose`` names, at once if they are several."""
        book = self.open_book()
        announced = turns.announced(book)
        asked = choose(announced)
        if announced is not book:
            self.keep(Draft(book, list(announced.events[len(book.events) :])))
        speeches = [self.voices.begin(self.session_id, announced, each) for each in asked]
        floor = self._floor = Floor(self, place, announced, speeches)
        try:
            for speech in speeches:
                yield from self._heard(floor, speech)
            for event in floor.finish():
                yield TurnComplete(event)
        finally:
            floor.withdraw()
            # Who cut in may have the floor by now.
            if self._floor is floor:
                self._floor = None

    def turn(self, book: Book, speaker: str | None, to: str | None, prompt: str) -> list[Asked]:
        """Who speaks in the next turn; all, in a broadcast."""
        if book.spec.topology == "broadcast":
            if speaker is not None or to is not None:
                raise InvalidTurn("in a broadcast all speak to all: name nobody.")
            speakers = book.spec.speakers
            return [self.voices.fitting(book, agent, None, prompt, n) for n, agent in enumerate(speakers)]
        agent, target = turns.chosen(book, speaker, to)
        return [self.voices.fitting(book, agent, target, prompt, 0)]

    def talk(self, place: Place) -> list[Event]:
        """One round of talk in the middle of a decision, as far as the session has turns left."""
        found: list[Event] = []
        book = self.book()
        rest = [(None, None)] if book.spec.topology == "broadcast" else turns.round_of(book)
        for speaker, to in rest:
            if turns.is_over(self.book()):
                break
            steps = self.speak(place, lambda now, speaker=speaker, to=to: self.turn(now, speaker, to, ""))  # type: ignore[misc]
            found += [step.event for step in steps if isinstance(step, TurnComplete)]
        return found

    def cut(self, agent_id: str) -> str | None:
        """Let an agent cut in on who speaks now; return on whom."""
        floor = self._floor
        if floor is None or floor.speeches[0].asked.agent.agent_id == agent_id:
            return None
        floor.finish(cut_by=agent_id)
        return floor.speeches[0].asked.agent.agent_id

    def withdraw(self) -> None:
        """End what is being said; nothing of it is kept."""
        if (floor := self._floor) is not None:
            floor.withdraw()

    def _heard(self, floor: Floor, speech: Speech) -> Iterator[Step]:
        agent = speech.asked.agent
        every = floor.book.spec.interrupt_every if floor.book.spec.topology == "interrupt" else 0
        yield TurnStart(agent.agent_id, speech.asked.number)
        for number, piece in enumerate(speech.pieces(), 1):
            yield Token(agent.agent_id, piece, speech.text)
            if every and number % every == 0 and (other := self._who_cuts_in(floor.book, speech)) is not None:
                floor.finish(cut_by=other)
                return

    def _who_cuts_in(self, book: Book, speech: Speech) -> str | None:
        """The first of the others who wants to speak now."""
        others = [agent for agent in book.spec.speakers if agent != speech.asked.agent]
        cue = CUT_IN.format(name=speech.asked.agent.name, text=speech.text)
        answers = self.votes(book, {agent.agent_id: cue for agent in others}, {"enum": ["yes", "no"]})
        return next((agent_id for agent_id, answer in answers.items() if answer[0] == "yes"), None)

    # Voting

    def votes(
        self, book: Book, cues: dict[str, str], schema: dict[str, Any], bare: dict[str, Any] | None = None
    ) -> dict[str, tuple[Any, str, str]]:
        """Ask agents at once for an answer in a form, of which their memory keeps nothing.

        Args:
            book: the session.
            cues: what each agent is asked, by its id.
            schema: the form.
            bare: a shorter form, for an agent whose answer in the first one was cut off.

        Returns:
            By id: the answer, its reason, and why there is none.
        """
        found = self._answers(book, cues, schema)
        again = {agent_id: cues[agent_id] for agent_id, answer in found.items() if answer[2]}
        if again and bare is not None:
            found |= self._answers(book, again, bare)
        return found

    def _answers(
        self, book: Book, cues: dict[str, str], schema: dict[str, Any]
    ) -> dict[str, tuple[Any, str, str]]:
        agents = [book.spec.agent(agent_id) for agent_id in cues]
        streams = [
            self.voices.vote(
                self.session_id, book, agent, self._asked(book, agent, cues[agent.agent_id]), schema
            )
            for agent in agents
        ]
        found: dict[str, tuple[Any, str, str]] = {}
        for agent, stream in zip(agents, streams, strict=True):
            text = "".join(delta.text for delta in stream)
            assert stream.report is not None
            self.note("stats", stats_of(book.turns, agent.agent_id, "ballot", stream.report))
            try:
                found[agent.agent_id] = (*read(text), "")
            except ValueError:
                found[agent.agent_id] = (None, "", f"the answer was cut off: {text[:80]!r}.")
        return found

    def _asked(self, book: Book, agent: AgentRole, cue: str) -> tuple[Message, ...]:
        return books.view(book, agent.agent_id).prompt(cue)
