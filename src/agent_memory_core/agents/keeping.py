"""An agent's life between memory and disk: made, brought in, continued, saved, let go.

The book says who the agent is and what was said; the session of the same id holds what the model made of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from agent_memory_core import (
    AgentMemory,
    InvalidRequest,
    Message,
    SessionKey,
    SessionNotFound,
    StoreError,
    TurnReport,
)
from agent_memory_core.agents.book import AgentBook, AgentRecord
from agent_memory_core.agents.contexts import AgentContext, SavedAgent
from agent_memory_core.agents.errors import AgentNotFound, AgentNotSaved
from agent_memory_core.agents.mirror import AgentMirror

LANE = "agent"


@dataclass(eq=False)
class Agent:
    """An agent in memory."""

    context: AgentContext
    unwritten: list[Message] = field(default_factory=list)
    """What was said and could not be written into the book yet."""

    @property
    def agent_id(self) -> str:
        """Its id, which is its session's, too."""
        return self.context.agent_id

    @property
    def order(self) -> tuple[object, str]:
        """The least of all leaves memory first."""
        return self.context.last_access, self.agent_id


class Keeping:
    """Makes, saves and continues the agents of one namespace. One thread at a time works on an agent."""

    def __init__(self, memory: AgentMemory, book: AgentBook, namespace: str, mirror: AgentMirror) -> None:
        self._memory = memory
        self._book = book
        self._namespace = namespace
        self._mirror = mirror

    def key(self, agent_id: str) -> SessionKey:
        """The session of an agent."""
        return SessionKey(agent_id, namespace=self._namespace, lane=LANE)

    def find(self, agent_id: str) -> AgentRecord | None:
        """Who an agent is, here or in the object store; None if there is none."""
        self._mirror.look(agent_id)
        return self._book.get(agent_id)

    def bring(self, agent_id: str) -> Agent:
        """An agent that was made before, as it stands in the book. Its keys and values are read with its next turn.

        Raises:
            AgentNotFound: there is none.
        """
        record = self.find(agent_id)
        if record is None:
            raise AgentNotFound(f"there is no agent {agent_id!r}: create it first.")
        context = _context(record)
        context.conversation_history = _shown(self._book.messages(agent_id))
        context.cache_tokens = self._known_tokens(agent_id)
        return Agent(context)

    def make(self, record: AgentRecord, said: Sequence[Message] = ()) -> Agent:
        """A new agent, whose system prompt, and what was said so far, is read now, so that its first turn need not.

        Raises:
            AgentExists: the id is taken.
        """
        agent = Agent(_context(record))
        agent.context.state = "prefilled"
        try:
            self._read(agent, self.prompt(agent, said))
        except InvalidRequest:
            # There is none, or the chat template writes no system message alone: the first turn reads it.
            agent.context.cache_tokens = 0
        self._book.add(record, said)
        self._mirror.changed(record.agent_id)
        agent.context.conversation_history = _shown(said)
        return agent

    def prompt(self, agent: Agent, said: Sequence[Message]) -> tuple[Message, ...]:
        """The whole conversation with what is said now. Brings the agent in step with other processes and machines."""
        self._mirror.look(agent.agent_id)
        history = [*self._book.messages(agent.agent_id), *agent.unwritten]
        agent.context.conversation_history = _shown(history)
        prompt = agent.context.system_prompt
        return (*([Message("system", prompt)] if prompt else []), *history, *said)

    def answered(self, agent: Agent, said: Sequence[Message], answer: Message, report: TurnReport) -> None:
        """Write a turn down that has ended. Where that fails, it is kept in memory and tried again."""
        agent.unwritten += [*said, answer]
        context = agent.context
        context.conversation_history = context.conversation_history + _shown([*said, answer])
        context.state = "active"
        _note(context, report)
        try:
            self._write(agent)
        except StoreError:
            context.persisted = False
            return
        context.persisted &= self._mirror.changed(agent.agent_id)

    def save(self, agent: Agent) -> SavedAgent:
        """See that all of an agent is on disk.

        Raises:
            AgentNotSaved: it cannot be written, or there is no folder for it.
        """
        started = time.perf_counter()
        if self._memory.config.cache_dir is None:
            raise AgentNotSaved(f"agent {agent.agent_id!r} cannot be saved: there is no cache_dir.")
        self.save_text(agent)
        self._memory.flush()
        if not agent.context.persisted:
            self._save_again(agent)
        tokens = self._known_tokens(agent.agent_id)
        nbytes = self.disk_bytes().get(agent.agent_id, 0)
        return SavedAgent(agent.agent_id, tokens, nbytes, True, time.perf_counter() - started)

    def save_text(self, agent: Agent) -> None:
        """See that the book has all that was said.

        Raises:
            AgentNotSaved: it cannot be written.
        """
        try:
            self._write(agent)
        except StoreError as error:
            raise AgentNotSaved(f"agent {agent.agent_id!r} cannot be saved: {error}") from error

    def leave(self, agent: Agent) -> None:
        """Save an agent and free what only it has in memory.

        Raises:
            AgentNotSaved: it cannot be written; nothing was freed.
        """
        self.save(agent)
        self._memory.release(agent.agent_id, self._namespace)
        agent.context.state = "evicted"

    def forget(self, agent_id: str) -> bool:
        """Delete an agent from memory and disk, and say whether there was one."""
        forgotten = self._memory.forget(agent_id, self._namespace)
        found = self._book.delete(agent_id, mark=self._mirror.is_on)
        self._mirror.changed(agent_id)
        return found or forgotten

    def fork(self, agent_id: str, new_id: str) -> None:
        """Write a new agent down that begins as another one is; its keys and values are shared, not copied.

        Raises:
            AgentExists: the new id is taken.
        """
        self._mirror.look(new_id)
        self._book.copy(agent_id, new_id)
        try:
            # Where nothing of it is stored, it is computed with the next turn.
            with suppress(SessionNotFound):
                self._memory.fork(agent_id, new_id, self._namespace)
        except BaseException:
            self._book.delete(new_id)
            raise
        self._mirror.changed(new_id)

    def warm(self, agent: Agent) -> TurnReport:
        """Read all that was said, as far as it is not in memory."""
        self._read(agent, self.prompt(agent, ()))
        assert agent.context.last_report is not None
        return agent.context.last_report

    def clear(self, agent: Agent) -> None:
        """Delete what was said to an agent and what it answered; its system prompt is still known afterwards."""
        agent.unwritten.clear()
        self._book.clear(agent.agent_id)
        self._mirror.changed(agent.agent_id)
        self._memory.forget(agent.agent_id, self._namespace)
        agent.context.conversation_history = []
        agent.context.state = "prefilled"
        self._read(agent, self.prompt(agent, ()))

    def disk_bytes(self) -> dict[str, int]:
        """Bytes of every session of the namespace, by id; what several share counts for each."""
        return {info.session_id: info.nbytes for info in self._memory.sessions(self._namespace)}

    def _read(self, agent: Agent, messages: Sequence[Message]) -> None:
        _note(agent.context, self._memory.prewarm(messages, self.key(agent.agent_id)))

    def _save_again(self, agent: Agent) -> None:
        self._read(agent, self.prompt(agent, ()))
        report = agent.context.last_report
        if report is not None and not report.persisted:
            why = report.save_error or "its turn was not kept"
            raise AgentNotSaved(f"agent {agent.agent_id!r} cannot be saved and stays in memory: {why}")

    def _write(self, agent: Agent) -> None:
        if agent.unwritten:
            self._book.append(agent.agent_id, agent.unwritten, self._memory.model_name)
            agent.unwritten.clear()

    def _known_tokens(self, agent_id: str) -> int:
        if self._memory.config.cache_dir is None:
            return 0
        try:
            return max(branch.tokens for branch in self._memory.branches(agent_id, self._namespace))
        except SessionNotFound:
            return 0


def _context(record: AgentRecord) -> AgentContext:
    return AgentContext(
        agent_id=record.agent_id,
        agent_type=record.agent_type,
        system_prompt=record.system_prompt,
        created=datetime.fromtimestamp(record.created, UTC),
        last_access=datetime.now(UTC),
        metadata=dict(record.metadata),
        template=record.template,
    )


def _note(context: AgentContext, report: TurnReport) -> None:
    context.last_access = datetime.now(UTC)
    context.cache_tokens = report.usage.total_tokens
    context.persisted = report.persisted
    context.last_report = report


def _shown(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
