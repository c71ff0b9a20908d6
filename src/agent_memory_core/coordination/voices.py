"""The agents' words: prompts that become requests of a memory, and the answers as they are made."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from agent_memory_core import (
    AgentMemory,
    Cancelled,
    ChatRequest,
    ChatStream,
    InvalidRequest,
    Message,
    SamplingParams,
    SessionKey,
    TurnReport,
    sampling_for,
)
from agent_memory_core.coordination import turns
from agent_memory_core.coordination.books import Book, view
from agent_memory_core.coordination.spec import AgentRole, SessionSpec
from agent_memory_core.coordination.turns import Asked

BALLOT_TOKENS = 512
"""Most tokens of a ballot."""

WARMER = 0.2
"""By how much the temperature is raised where a model says nothing, once."""


@dataclass(frozen=True, slots=True)
class TurnStats:
    """What one answer cost. Tokens, and seconds."""

    turn: int
    """The turn's number in the session, from 0 on; for a ballot, how many turns there were."""
    agent_id: str
    kind: str
    """"turn" or "ballot"."""
    prompt: int
    """Tokens of the prompt."""
    cache_read: int
    """Those of them that were known and not computed."""
    new: int
    """Those that were computed."""
    ttft: float
    """Seconds to the first token, waiting included."""
    answer: int
    """Tokens of the answer; 0 where somebody cut in."""
    hit_tier: str
    """Where the known tokens came from; see `TurnReport.hit_tier`."""
    miss_reason: str
    """Why tokens were computed that the session had before; see `TurnReport.miss_reason`."""
    compacted: bool = False
    """Whether the agent's view was made shorter for this turn."""


def stats_of(
    turn: int, agent_id: str, kind: str, report: TurnReport, compacted: bool = False
) -> dict[str, Any]:
    """A report as it is kept."""
    usage = report.usage
    row = TurnStats(
        turn,
        agent_id,
        kind,
        usage.prompt_tokens,
        usage.cache_read,
        usage.cache_creation,
        report.time_to_first_token,
        usage.completion_tokens,
        report.hit_tier,
        report.miss_reason,
        compacted,
    )
    return asdict(row)


class Voices:
    """Gives the agents of sessions their words.

    Args:
        memory: the model of every agent that names none.
        models: other memories by the name that an agent may give as its model.
        namespace: where the agents' memory is kept.
    """

    def __init__(self, memory: AgentMemory, models: Mapping[str, AgentMemory], namespace: str) -> None:
        self._memory = memory
        self._models = models
        self.namespace = namespace

    def check(self, spec: SessionSpec) -> None:
        """Refuse a specification with a model that is not there, or a sampling value that cannot be used."""
        for agent in spec.speakers:
            self.sampling(spec, agent)

    def memory(self, agent: AgentRole) -> AgentMemory:
        """The memory of an agent's model."""
        if agent.model in (None, self._memory.model_name):
            return self._memory
        if agent.model not in self._models:
            known = ", ".join([self._memory.model_name, *self._models])
            raise InvalidRequest(
                f"the agent {agent.agent_id!r} has the model {agent.model!r}: give one of {known}."
            )
        return self._models[agent.model]

    def sampling(self, spec: SessionSpec, agent: AgentRole, **more: Any) -> SamplingParams:
        """How an agent's answers are sampled."""
        return sampling_for(self.memory(agent).config.model, {**spec.sampling, **agent.sampling, **more})

    def key(
        self, session_id: str, spec: SessionSpec, agent: AgentRole, *, ephemeral: bool = False
    ) -> SessionKey:
        """Where an agent's memory is kept."""
        name = session_name(session_id, spec, agent)
        return SessionKey(name, self.namespace, lane=agent.agent_id, ephemeral=ephemeral)

    def fitting(self, book: Book, agent: AgentRole, to: str | None, prompt: str, place: int) -> Asked:
        """What an agent is asked; with a shorter view where the whole one leaves no room for an answer."""
        asked = turns.ask(book, agent, to, prompt, place)
        most = self.sampling(book.spec, agent).max_tokens
        if self._fits(agent, asked, most):
            return asked
        return turns.ask(book, agent, to, prompt, place, compact=True)

    def _fits(self, agent: AgentRole, asked: Asked, most: int) -> bool:
        memory = self.memory(agent)
        room = memory.context_length - most
        # A token has at least one byte, and a template adds a few tokens to a message.
        if sum(len(message.content.encode()) + 32 for message in asked.messages) <= room:
            return True
        return memory.count_tokens(asked.messages) <= room

    def begin(self, session_id: str, book: Book, asked: Asked, **sampling: Any) -> Speech:
        """Let an agent speak."""
        spec, agent = book.spec, asked.agent
        if spec.seed is not None:
            sampling = {"seed": (spec.seed + asked.number) % 2**64, **sampling}
        own = self.sampling(spec, agent, **sampling)
        request = ChatRequest(asked.messages, sampling=own.replace(stop=(*own.stop, *asked.stop)))
        return Speech(self.memory(agent), request, self.key(session_id, spec, agent), asked)

    def vote(
        self,
        session_id: str,
        book: Book,
        agent: AgentRole,
        messages: tuple[Message, ...],
        schema: Mapping[str, Any],
    ) -> ChatStream:
        """Let an agent answer in a form, and forget it."""
        sampling = self.sampling(book.spec, agent, temperature=0.0, max_tokens=BALLOT_TOKENS)
        request = ChatRequest(messages, sampling=sampling, response_schema=schema)
        key = self.key(session_id, book.spec, agent, ephemeral=True)
        return self.memory(agent).chat(request, key, stream=True)

    def prime(self, session_id: str, book: Book, agent: AgentRole) -> TurnReport:
        """Compute what an agent knows before it is asked."""
        seen = view(book, agent.agent_id)
        messages = seen.messages()
        if seen.waiting or not seen.exchanges:
            messages = turns.ask(book, agent).messages
        return self.memory(agent).prewarm(ChatRequest(messages), self.key(session_id, book.spec, agent))

    def forget(self, session_id: str, spec: SessionSpec) -> None:
        """Forget the agents whose memory ends with their session."""
        for agent in spec.speakers:
            if agent.lifecycle == "ephemeral":
                key = self.key(session_id, spec, agent)
                assert key.session_id is not None
                self.memory(agent).forget(key.session_id, self.namespace)

    def forget_permanent(self, prefix: str, agent_id: str) -> None:
        """Forget a permanent agent, whichever model it had."""
        for memory in (self._memory, *self._models.values()):
            memory.forget(permanent_id(prefix, agent_id), self.namespace)


def permanent_id(prefix: str, agent_id: str) -> str:
    """The memory's session of a permanent agent."""
    return f"persist/{prefix}/{agent_id}"


def session_name(session_id: str, spec: SessionSpec, agent: AgentRole) -> str:
    """The memory's session in which an agent of a session is kept."""
    if agent.lifecycle == "permanent":
        return permanent_id(spec.persistent_cache_prefix, agent.agent_id)
    return f"coord/{session_id}" if spec.view == "shared" else f"coord/{session_id}/{agent.agent_id}"


class Speech:
    """An answer as it is made."""

    def __init__(self, memory: AgentMemory, request: ChatRequest, key: SessionKey, asked: Asked) -> None:
        self.asked = asked
        self.text = ""
        self._memory, self._request, self._key = memory, request, key
        self._stream = memory.chat(request, key, stream=True)
        self._lock = threading.Lock()
        self._ended = False

    @property
    def report(self) -> TurnReport | None:
        """What it cost; None before it has ended."""
        return self._stream.report

    def pieces(self) -> Iterator[str]:
        """The pieces of the answer, until it ends or somebody ends it."""
        yield from self._read()
        if not self.text.strip() and not self._ended:
            # The same prompt once more, a little less sure of itself.
            warmer = self._request.sampling.replace(temperature=self._request.sampling.temperature + WARMER)
            request = ChatRequest(self._request.messages, sampling=warmer)
            self.text, self._stream = "", self._memory.chat(request, self._key, stream=True)
            yield from self._read()

    def end(self) -> str:
        """End it here, if it has not ended; return what was said."""
        with self._lock:
            self._ended = True
            self._stream.close()
            return self.text

    def _read(self) -> Iterator[str]:
        try:
            for delta in self._stream:
                with self._lock:
                    if self._ended:
                        return
                    self.text += delta.text
                if delta.text:
                    yield delta.text
        except Cancelled:
            if not self._ended:
                raise
