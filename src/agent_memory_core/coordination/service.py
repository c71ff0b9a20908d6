"""CoordinationService: agents that talk, vote and remember.

    with AgentMemory() as memory, CoordinationService(memory) as service:
        session = service.create_session({"agents": [{"agent_id": "ann"}, {"agent_id": "bob"}]})
        for event in service.round(session.session_id):
            print(event.sender_id, event.content)

Each agent's memory is a session of `AgentMemory`. A turn computes what the agent has heard since its last one, and
nothing of what it knew, also after a restart.
"""

from __future__ import annotations

import logging
import threading
import uuid
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent_memory_core import AgentMemory, InvalidSetting, Message, TurnReport
from agent_memory_core.closing import Closing
from agent_memory_core.coordination import books, turns
from agent_memory_core.coordination.aio import asynchronous, streamed
from agent_memory_core.coordination.ballots import choice_schema
from agent_memory_core.coordination.books import Draft, Event, Mind
from agent_memory_core.coordination.council import Council, checked_choices, checked_vote
from agent_memory_core.coordination.errors import AgentBusy, InvalidTurn
from agent_memory_core.coordination.session import Session, Step, TurnComplete
from agent_memory_core.coordination.spec import SYSTEM, AgentRole, SessionSpec
from agent_memory_core.coordination.status import SessionStatus, is_active, status_of
from agent_memory_core.coordination.store import Store, Stored
from agent_memory_core.coordination.tallies import Ballot, Decision
from agent_memory_core.coordination.voices import TurnStats, Voices

log = logging.getLogger("agent_memory")


class CoordinationService(Closing):
    """Sessions in which agents talk, kept in a file of their own.

    Any thread may call it. In one session one thing happens at a time, in the order of the calls; sessions go on
    beside each other. Every call has a twin for coroutines whose name begins with ``a``.

    Args:
        memory: the model of the agents, and where what they know is kept. It is not closed by the service.
        path: the file of the sessions; None is ``coordination.db`` in the memory's cache directory, or nothing on disk
            where that is None.
        namespace: in which namespace of the memory the agents are; nothing is shared between namespaces.
        models: memories of other models, by the names under which agents ask for them.

    Raises:
        InvalidSetting: the memory's store is encrypted and no path is given, since the file is not.
        StoreUnreadable: the file cannot be opened.
    """

    def __init__(
        self,
        memory: AgentMemory,
        path: Path | str | None = None,
        namespace: str = "default",
        models: Mapping[str, AgentMemory] | None = None,
    ) -> None:
        self._voices = Voices(memory, models or {}, namespace)
        self._store = Store(_path(memory, path))
        self._lock = threading.Lock()
        self._sessions: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()
        """Those of which something is under way."""

    # Sessions

    def create_session(self, spec: SessionSpec | Mapping[str, Any]) -> SessionStatus:
        """Begin a session, from a specification or a mapping of its fields.

        Permanent agents go on from their last session under the same prefix.

        Raises:
            InvalidRequest: a field is unknown, or outside its range.
            AgentBusy: a permanent agent is in a session that is still active.
        """
        spec = SessionSpec.of(spec)
        self._voices.check(spec)
        session_id = uuid.uuid4().hex[:16]
        # Whether its agents are free is asked in the transaction that takes them: another process may want them, too.
        with self._lock, self._store.transaction():
            book = books.begin(spec, self._minds(spec))
            empty = replace(book, events=())
            self._store.create(session_id, self._voices.namespace, book, Draft(empty, list(book.events)))
        return self.get(session_id)

    def get(self, session_id: str) -> SessionStatus:
        """Where a session stands.

        Raises:
            SessionNotFound: there is none of that id.
        """
        return status_of(self._stored(session_id))

    def list(self) -> Sequence[SessionStatus]:
        """All sessions, oldest first."""
        return [self.get(session_id) for session_id in self._store.ids(self._voices.namespace)]

    def close_session(self, session_id: str) -> None:
        """End a session: its words stay, and its ephemeral agents are forgotten."""
        session = self._session(session_id)
        with session.line.join():
            self._voices.forget(session_id, session.book().spec)
            self._store.close_session(session_id)

    def delete(self, session_id: str) -> None:
        """Delete a session and what its ephemeral agents know, also in the middle of a turn, which then fails."""
        stored = self._stored(session_id)
        session = self._session(session_id)
        session.withdraw()
        with self._lock, self._store.transaction():
            spec = stored.book.spec
            permanent = [agent.agent_id for agent in spec.speakers if agent.lifecycle == "permanent"]
            book = self._stored(session_id).book
            self._store.keep_minds(session_id, {name: books.mind_after(book, name) for name in permanent})
            self._store.delete(session_id)
            self._sessions.pop(session_id, None)
        self._voices.forget(session_id, spec)

    def delete_persistent(self, prefix: str) -> int:
        """Forget the permanent agents of a prefix; return how many there were."""
        agents = self._store.forget_minds(self._voices.namespace, prefix)
        for agent_id in agents:
            self._voices.forget_permanent(prefix, agent_id)
        return len(agents)

    def release(self, prefix: str) -> int:
        """Close the sessions that permanent agents of a prefix are still in; return how many there were.

        For what a process left behind that was killed.
        """
        found = self._store.in_sessions(self._voices.namespace, prefix)
        active = [session_id for session_id in found if is_active(self._stored(session_id))]
        for session_id in active:
            self.close_session(session_id)
        return len(active)

    def prime(self, session_id: str, agents: Sequence[str] = ()) -> Mapping[str, TurnReport]:
        """Compute what agents know before their first word, so that this comes at once; return what it cost.

        Args:
            session_id: the session.
            agents: which ones, by id or name; all by default.
        """
        session = self._session(session_id)
        with session.line.join():
            book = session.open_book()
            wanted = [book.spec.agent(each) for each in agents] or book.spec.speakers
            return {each.agent_id: self._voices.prime(session_id, book, each) for each in wanted}

    # Turns

    def turn(
        self, session_id: str, *, speaker: str | None = None, to: str | None = None, prompt: str = ""
    ) -> Event:
        """Let the next agent speak; in a broadcast all, and the last one's words are returned.

        Args:
            session_id: the session.
            speaker: who speaks; None is who is next.
            to: in the topology whisper, who alone hears it.
            prompt: what the speaker is asked beside what it has heard; nobody else is told.

        Raises:
            InvalidTurn: the session is over, or that agent cannot speak now.
            PromptTooLong: what an agent has heard does not fit its context.
        """
        return _events(self.stream_turn(session_id, speaker=speaker, to=to, prompt=prompt))[-1]

    def stream_turn(
        self, session_id: str, *, speaker: str | None = None, to: str | None = None, prompt: str = ""
    ) -> Generator[Step, None, None]:
        """`turn` as it happens. Nothing happens before the first step is read; closing it takes the turn back."""
        session = self._session(session_id)
        with session.line.join() as place:
            yield from session.speak(place, lambda book: session.turn(book, speaker, to, prompt))

    def round(self, session_id: str, pairs: Sequence[tuple[str, str]] = ()) -> Sequence[Event]:
        """Let everybody speak whose turn it still is in this round; return what was said.

        Args:
            session_id: the session.
            pairs: in the topology whisper, who whispers to whom; by default each to the next one.
        """
        return _events(self.stream_round(session_id, pairs))

    def stream_round(
        self, session_id: str, pairs: Sequence[tuple[str, str]] = ()
    ) -> Generator[Step, None, None]:
        """`round` as it happens. Between two turns of it others of the session may come in."""
        book = self._session(session_id).open_book()
        if book.spec.topology == "broadcast":
            yield from self.stream_turn(session_id)
            return
        left = turns.round_of(book, pairs)
        if book.spec.topology == "interrupt":
            yield from self._until_all_spoke(session_id, [speaker for speaker, _ in left])
            return
        for speaker, to in left:
            if turns.is_over(self._session(session_id).book()):
                return
            yield from self.stream_turn(session_id, speaker=speaker, to=to)

    def _until_all_spoke(self, session_id: str, left: Sequence[str]) -> Iterator[Step]:
        """Turns until each has spoken; who cuts in comes first, and nobody can so keep the others out for ever."""
        waiting = list(left)
        for _ in range(2 * len(left)):
            book = self._session(session_id).book()
            if not waiting or turns.is_over(book):
                return
            cut_by = book.spoken[-1].cut_by if book.spoken else None
            speaker = cut_by if cut_by is not None else waiting[0]
            yield from self.stream_turn(session_id, speaker=speaker)
            if speaker in waiting:
                waiting.remove(speaker)

    def interrupt(self, session_id: str, agent_id: str) -> Event:
        """Let an agent cut in: who speaks now ends, what it has said so far stays, and the agent speaks next.

        Raises:
            InvalidTurn: the session's topology is another, or the agent is a person.
        """
        session = self._session(session_id)
        book = session.open_book()
        if book.spec.topology != "interrupt":
            raise InvalidTurn(f"nobody can cut in: the topology is {book.spec.topology!r}, not 'interrupt'.")
        agent, _ = turns.chosen(book, agent_id, None)
        place = session.line.join(first=True)
        session.cut(agent.agent_id)
        with place:
            steps = session.speak(place, lambda now: session.turn(now, agent.agent_id, None, ""))
            return _events(steps)[-1]

    def whisper(self, session_id: str, from_: str, to: str, content: str) -> Event:
        """Enter words that only two know of, in any topology.

        Raises:
            InvalidTurn: the session is over, or has one view for all.
        """
        return self._entered(session_id, from_, content, [to], "whisper")

    def say(self, session_id: str, sender: str, content: str, to: Sequence[str] = ()) -> Event:
        """Enter words: of a person who takes part or does not, or of "system".

        Args:
            session_id: the session.
            sender: an agent, "system", or any other name, under which the agents hear it.
            content: the words.
            to: who alone hears it; by default all.
        """
        return self._entered(session_id, sender, content, to, "system" if sender == SYSTEM else "public")

    def _entered(
        self, session_id: str, sender: str, content: str, to: Sequence[str], kind: books.EventKind
    ) -> Event:
        session = self._session(session_id)
        with session.line.join():
            spec = session.open_book().spec
            if to and spec.view == "shared":
                raise InvalidTurn("all agents of this session have one view: nothing can be whispered in it.")
            sender_id = self._sender(spec, sender, kind)
            kind = "whisper" if to and kind == "public" else kind
            return session.add(kind, sender_id, content, [spec.agent(each).agent_id for each in to])

    def _sender(self, spec: SessionSpec, sender: str, kind: str) -> str:
        """The id of a sender, who need take no part except in a whisper."""
        stranger = all(sender not in (agent.agent_id, agent.name) for agent in spec.agents)
        return sender if sender == SYSTEM or (stranger and kind != "whisper") else spec.agent(sender).agent_id

    # Decisions

    def ask(self, session_id: str, question: str, choices: Sequence[str] | None = None) -> None:
        """Open a question, for which votes can be entered until it is decided."""
        session = self._session(session_id)
        with session.line.join():
            self._open_question(session, question, choices)

    def vote(
        self,
        session_id: str,
        agent_id: str,
        choice: str | None = None,
        ranking: Sequence[str] | None = None,
    ) -> None:
        """Enter a vote for the open question: a person's, or an agent's, which is then not asked. The last one counts.

        Raises:
            InvalidTurn: no question is open.
            InvalidRequest: the vote names what is no choice.
        """
        session = self._session(session_id)
        with session.line.join():
            asking = self._stored(session_id).asking
            if asking is None:
                raise InvalidTurn("no question is open: ask one first.")
            voter = session.book().spec.agent(agent_id).agent_id
            vote = checked_vote(
                ranking if ranking is not None else [choice] if choice else [], asking["choices"]
            )
            self._store.ask(session_id, {**asking, "votes": asking["votes"] | {voter: vote}})

    def decide(
        self, session_id: str, question: str | None = None, choices: Sequence[str] | None = None
    ) -> Decision:
        """Decide by the session's mode, and tell all agents. Their memory keeps nothing of their ballots.

        Args:
            session_id: the session.
            question: what is decided; None decides the question that is open.
            choices: what can be chosen; None lets the agents propose. ``"abstain"`` among them counts as no vote.

        Raises:
            InvalidTurn: the session is over or decides nothing, or no question is open.
        """
        session = self._session(session_id)
        with session.line.join() as place:
            if question is not None:
                self._open_question(session, question, choices)
            asking = self._stored(session_id).asking
            if asking is None:
                raise InvalidTurn("no question is open: give one.")
            decision = Council(session, place, asking["question"], asking["votes"]).decide(asking["choices"])
            self._store.ask(session_id, None)
            return decision

    def choose(self, session_id: str, agent_id: str, question: str, choices: Sequence[str]) -> Ballot:
        """Let one agent choose, in secret: the others are told nothing, and its own memory keeps nothing of it."""
        session = self._session(session_id)
        wanted = checked_choices(choices)
        with session.line.join():
            book = session.open_book()
            agent = book.spec.agent(agent_id)
            schemas = choice_schema(wanted, reason=book.spec.reasons), choice_schema(wanted, reason=False)
            cue = books.joined(question, f"Choose one of: {', '.join(wanted)}.")
            choice, reason, error = session.votes(book, {agent.agent_id: cue}, *schemas)[agent.agent_id]
            return Ballot(agent.agent_id, () if choice is None else (choice,), reason, error)

    def decisions(self, session_id: str) -> Sequence[dict[str, Any]]:
        """What was decided so far, with all ballots, as plain data."""
        self._stored(session_id)
        return self._store.notes(session_id, "decision")

    def _open_question(self, session: Session, question: str, choices: Sequence[str] | None) -> None:
        if session.open_book().spec.decision_mode == "none":
            raise InvalidTurn("this session decides nothing: create it with a decision_mode.")
        wanted = checked_choices(choices) if choices is not None else None
        self._store.ask(session.session_id, {"question": question, "choices": wanted, "votes": {}})

    # Looking

    def messages(self, session_id: str, *, as_agent: str | None = None) -> Sequence[Event]:
        """What all know of, or what an agent knows of, oldest first."""
        book = self._stored(session_id).book
        agent_id = book.spec.agent(as_agent).agent_id if as_agent is not None else None
        return books.known_events(book, agent_id)

    def events(self, session_id: str) -> Sequence[Event]:
        """All that happened, private words too, oldest first: for who keeps the record, not for who takes part."""
        return self._stored(session_id).book.events

    def last_prompt(self, session_id: str, agent_id: str) -> Sequence[Message]:
        """The messages with which an agent was asked in its last turn; empty where it had none."""
        book = self._stored(session_id).book
        return books.last_prompt(book, book.spec.agent(agent_id).agent_id)

    def stats(self, session_id: str, kind: str = "turn") -> Sequence[TurnStats]:
        """What each turn cost, or each "ballot", oldest first."""
        self._stored(session_id)
        rows = (TurnStats(**row) for row in self._store.notes(session_id, "stats"))
        return [row for row in rows if row.kind == kind]

    # For coroutines

    acreate_session = asynchronous(create_session)
    aget = asynchronous(get)
    alist = asynchronous(list)
    aclose_session = asynchronous(close_session)
    adelete = asynchronous(delete)
    adelete_persistent = asynchronous(delete_persistent)
    arelease = asynchronous(release)
    aprime = asynchronous(prime)
    aturn = asynchronous(turn)
    astream_turn = streamed(stream_turn)
    around = asynchronous(round)
    astream_round = streamed(stream_round)
    ainterrupt = asynchronous(interrupt)
    awhisper = asynchronous(whisper)
    asay = asynchronous(say)
    aask = asynchronous(ask)
    avote = asynchronous(vote)
    adecide = asynchronous(decide)
    achoose = asynchronous(choose)
    adecisions = asynchronous(decisions)
    aevents = asynchronous(events)
    alast_prompt = asynchronous(last_prompt)
    amessages = asynchronous(messages)
    astats = asynchronous(stats)

    def close(self) -> None:
        """Close the file of the sessions. The memory stays open."""
        self._store.close()

    def _stored(self, session_id: str) -> Stored:
        return self._store.load(session_id, self._voices.namespace)

    def _session(self, session_id: str) -> Session:
        self._stored(session_id)
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                session = self._sessions[session_id] = Session(session_id, self._store, self._voices)
            return session

    def _minds(self, spec: SessionSpec) -> dict[str, Mind]:
        """What the permanent agents bring with them."""
        found = {}
        for agent in spec.speakers:
            if agent.lifecycle == "permanent":
                mind = self._mind(spec.persistent_cache_prefix, agent)
                if mind is not None:
                    found[agent.agent_id] = mind
        return found

    def _mind(self, prefix: str, agent: AgentRole) -> Mind | None:
        kept = self._store.mind(self._voices.namespace, prefix, agent.agent_id)
        if kept is None:
            return None
        mind, session_id = kept
        if session_id:
            last = self._stored(session_id)
            if is_active(last):
                raise AgentBusy(
                    f"the agent {agent.agent_id!r} of {prefix!r} is in the session {session_id!r}: close that first."
                )
            mind = books.mind_after(last.book, agent.agent_id)
        if mind.role != books.role_text(agent):
            log.info(
                "the agent %s of %s is told something else about itself: a new branch", agent.agent_id, prefix
            )
        return mind


def _path(memory: AgentMemory, path: Path | str | None) -> Path | None:
    if path is not None:
        return Path(path).expanduser()
    if memory.config.cache_dir is None:
        return None
    if memory.config.encryption != "off":
        raise InvalidSetting(
            "the memory's store is encrypted, and the file of the sessions would not be: give a path where what agents "
            "say may lie as it is."
        )
    return memory.config.cache_dir / "coordination.db"


def _events(steps: Iterator[Step]) -> list[Event]:
    return [step.event for step in steps if isinstance(step, TurnComplete)]
