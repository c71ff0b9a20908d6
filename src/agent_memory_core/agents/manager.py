"""The manager of agents that outlive their process.

    with PersistentAgentManager() as manager:
        manager.create_agent("ada", "technical", "You are a technical specialist.")
        print(manager.generate("ada", "My name is Ada."))

An agent has an id, a type, a system prompt and a history. What the model has read of it is kept as the session of the
same id, so that a turn computes only what is new, after a restart, too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agent_memory_core import (
    AgentMemory,
    ChatRequest,
    InvalidSetting,
    Message,
    TurnReport,
    sampling_for,
    validate_namespace,
    validate_session_id,
)
from agent_memory_core.agents.book import AgentBook, AgentRecord
from agent_memory_core.agents.contexts import AgentContext, AgentInfo, SavedAgent
from agent_memory_core.agents.errors import AgentExists, AgentNotFound
from agent_memory_core.agents.keeping import Agent, Keeping
from agent_memory_core.agents.mirror import AgentMirror
from agent_memory_core.agents.seats import Seats
from agent_memory_core.agents.templates import AgentTemplate, find_template, read_templates
from agent_memory_core.agents.transfers import AgentTransfers
from agent_memory_core.agents.turns import AgentStream, AgentTurn, AsyncAgentStream
from agent_memory_core.agents.usage import disk_usage, memory_usage
from agent_memory_core.agents.waiting import in_thread
from agent_memory_core.closing import Closing

Said = str | Message | Sequence[Message]
"""What is said to an agent: words of the user, or messages, as the results of tools are."""


class PersistentAgentManager(AgentTransfers, Closing):
    """Agents on one model, of which a few are in memory and all on disk. Any thread may use it.

    Args:
        model_name: an embedded name, a folder or a hub id; None is what the settings say, by default tiny-chat.
        max_agents: how many agents may be in memory. One more, and the agent used longest ago is saved and leaves.
        cache_dir: the folder of everything; None is what the settings say, by default ``~/.agent_memory/caches``.
        namespace: agents of different namespaces know nothing of each other.
        memory: the memory to use, whose settings then count; it is not closed with the manager.
        templates: a folder with types of agents besides those that come with the package.
        timeout: seconds that a turn waits for its agent's turns before it, and for a place in memory.
        engine_settings: other settings of `EngineConfig`.

    Raises:
        InvalidSetting: a setting cannot be used.
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        model_name: str | None = None,
        max_agents: int = 3,
        cache_dir: str | Path | None = None,
        *,
        namespace: str = "default",
        memory: AgentMemory | None = None,
        templates: Path | None = None,
        timeout: float = 60.0,
        **engine_settings: Any,
    ) -> None:
        given = {"model": model_name, "cache_dir": cache_dir, **engine_settings}
        settings = {name: value for name, value in given.items() if value is not None}
        if max_agents < 1:
            raise InvalidSetting(
                f"max_agents={max_agents} is not valid: at least one agent has to be in memory."
            )
        if memory is not None and settings:
            raise InvalidSetting(f"{', '.join(settings)} and memory exclude each other: give one of them.")
        validate_namespace(namespace)
        self._templates = read_templates(templates)
        self._owned = AgentMemory(**settings) if memory is None else None
        self.memory = memory or self._owned or AgentMemory()
        self.max_agents = max_agents
        self.namespace = namespace
        try:
            self._book = AgentBook(self.memory.config.cache_dir, namespace, self.memory.cipher(namespace))
        except BaseException:
            if self._owned is not None:
                self._owned.close()
            raise
        self._mirror = AgentMirror(self.memory, self._book, namespace)
        self._keeping = Keeping(self.memory, self._book, namespace, self._mirror)
        self._seats = Seats[Agent](max_agents, timeout, self._keeping.leave)

    @property
    def agents(self) -> Mapping[str, AgentContext]:
        """The agents in memory now, by id."""
        return MappingProxyType({name: agent.context for name, agent in self._seats.sitting().items()})

    @property
    def templates(self) -> Mapping[str, AgentTemplate]:
        """The types of agents that have a system prompt of their own, by name."""
        return MappingProxyType(self._templates)

    # -- agents come and go -------------------------------------------------------------------------------

    def create_agent(
        self,
        agent_id: str,
        agent_type: str,
        system_prompt: str | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        exist_ok: bool = True,
    ) -> AgentContext:
        """Make an agent, and let the model read its system prompt, without an answer.

        Args:
            agent_id: any text; it is never part of a path.
            agent_type: what it is; the name of a template where there is no system prompt.
            system_prompt: None is that of the template.
            metadata: whatever should be remembered of it; fills the words in braces of a template.
            exist_ok: whether an agent of this id, type and system prompt, in memory or on disk, is returned as it is.

        Raises:
            InvalidRequest: the id cannot be used, or there is no such template.
            AgentExists: the id is taken by another agent.
            AgentNotSaved: the agent that had to make room cannot be saved. It stays, and the new one is not made.
            AgentsBusy: no agent in memory could make room.
        """
        validate_session_id(agent_id)
        template = None
        if system_prompt is None:
            template = find_template(self._templates, agent_type)
            system_prompt = template.filled(metadata or {})
        record = AgentRecord(
            agent_id=agent_id,
            agent_type=agent_type,
            system_prompt=system_prompt,
            model=self.memory.model_name,
            template=template.name if template else None,
            metadata=dict(metadata or {}),
        )
        with self._seats.turn(agent_id):
            known = self._keeping.find(agent_id)
            if known is not None:
                _check_same(known, record, exist_ok)
                return self._seats.seat(agent_id, lambda: self._keeping.bring(agent_id)).context
            return self._seats.seat(agent_id, lambda: self._made(record, exist_ok)).context

    def load_agent(self, agent_id: str) -> AgentContext:
        """Bring an agent into memory. Turns do that by themselves.

        Raises:
            AgentNotFound: there is none of that id.
            AgentNotSaved: the agent that had to make room cannot be saved, and stays.
            AgentsBusy: no agent in memory could make room.
        """
        with self._seats.turn(agent_id):
            return self._seat(agent_id).context

    def save_agent(self, agent_id: str) -> SavedAgent:
        """See that an agent is on disk. Turns are saved as they end, so there is little to do, whatever its length.

        Raises:
            AgentNotFound: there is none of that id.
            AgentNotSaved: it cannot be written.
        """
        with self._seats.turn(agent_id):
            sitting = self._seats.sitting().get(agent_id)
            return self._keeping.save(sitting or self._keeping.bring(agent_id))

    def save_all(self) -> list[SavedAgent]:
        """`save_agent` for all agents in memory."""
        return [self.save_agent(agent_id) for agent_id in self._seats.sitting()]

    async def asave_agent(self, agent_id: str) -> SavedAgent:
        """`save_agent` for coroutines."""
        return await in_thread(lambda: self.save_agent(agent_id))

    def evict_lru(self) -> str | None:
        """Save the agent used longest ago and let it leave memory; return its id, None if there is none to leave.

        Raises:
            AgentNotSaved: it cannot be written; it stays.
        """
        return self._seats.evict()

    def evict_agent(self, agent_id: str) -> None:
        """Save an agent and let it leave memory; its next turn reads it from disk.

        Raises:
            AgentNotFound: there is none of that id.
            AgentNotSaved: it cannot be written; it stays.
        """
        with self._seats.turn(agent_id):
            self._keeping.leave(self._seats.sitting().get(agent_id) or self._keeping.bring(agent_id))
            self._seats.drop(agent_id)

    def prewarm_agent(self, agent_id: str) -> TurnReport:
        """Bring an agent into memory with all that was said, so that its next turn begins at once.

        Raises as `load_agent` does.
        """
        with self._seats.turn(agent_id):
            return self._keeping.warm(self._seat(agent_id))

    def delete_agent(self, agent_id: str) -> bool:
        """Delete an agent, its history and its session; say whether there was one. Others keep what they share."""
        with self._seats.turn(agent_id):
            self._seats.drop(agent_id)
            return self._keeping.forget(agent_id)

    def fork_agent(self, agent_id: str, new_id: str) -> AgentContext:
        """Make an agent that knows what another one knows, and goes its own way from there. Nothing is copied on disk.

        Raises:
            AgentNotFound: there is none of the first id.
            InvalidRequest: the new id cannot be used.
            AgentExists: it is taken.
        """
        validate_session_id(new_id)
        with self._seats.turn(agent_id):
            source = self._seats.sitting().get(agent_id) or self._keeping.bring(agent_id)
            self._keeping.save_text(source)
            self._keeping.fork(agent_id, new_id)
        return self.load_agent(new_id)

    def clear_history(self, agent_id: str) -> None:
        """Let an agent forget what was said; who it is stays.

        Raises:
            AgentNotFound: there is none of that id.
        """
        with self._seats.turn(agent_id):
            self._keeping.clear(self._seat(agent_id))

    def agent_exists(self, agent_id: str) -> bool:
        """Whether there is an agent of that id, in memory, on disk or in the object store."""
        return self._keeping.find(agent_id) is not None

    def list_agents(self) -> list[AgentInfo]:
        """All agents, in memory and on disk; the one used last first. Loads nothing."""
        sitting = self._seats.sitting()
        return [
            AgentInfo(
                agent_id=record.agent_id,
                agent_type=record.agent_type,
                model=record.model,
                messages=messages,
                created=datetime.fromtimestamp(record.created, UTC),
                last_access=datetime.fromtimestamp(record.last_access, UTC),
                in_memory=record.agent_id in sitting,
            )
            for record, messages in self._book.all()
        ]

    # -- turns --------------------------------------------------------------------------------------------

    def generate(
        self,
        agent_id: str,
        user_input: Said,
        max_tokens: int | None = None,
        temperature: float | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        response_schema: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> str:
        """Say something to an agent and return its answer's text; both become part of its history.

        Args:
            agent_id: the agent, in memory or on disk.
            user_input: what is said.
            max_tokens: the most tokens of the answer; None is what the agent's template says, else 300.
            temperature: None is what the template says, else 0.
            tools: OpenAI function schemas. What is called stands in the deltas of `stream`.
            response_schema: a JSON schema that the answer fits.
            sampling: other fields of `SamplingParams`.

        Raises:
            AgentNotFound: there is no agent of that id.
            AgentsBusy: the agent's other turns took too long, or no agent could make room.
            AgentNotSaved: the agent that had to make room cannot be saved, and stays.
            AgentMemoryError: what a turn can raise, see `AgentMemory.chat`.
        """
        given = {"max_tokens": max_tokens, "temperature": temperature, **sampling}
        stream = self.stream(agent_id, user_input, tools=tools, response_schema=response_schema, **given)
        return "".join(delta.text for delta in stream)

    def stream(
        self,
        agent_id: str,
        user_input: Said,
        max_tokens: int | None = None,
        temperature: float | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        response_schema: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> AgentStream:
        """`generate`, with the answer as it is made. The agent's next turn waits until it was read, or closed."""
        given = {"max_tokens": max_tokens, "temperature": temperature, **sampling}
        turn = self.begin_turn(agent_id, user_input, tools=tools, response_schema=response_schema, **given)
        try:
            return AgentStream(self.memory.chat(turn.request, turn.key, stream=True), turn)
        except BaseException:
            turn.give_up()
            raise

    async def agenerate(
        self,
        agent_id: str,
        user_input: Said,
        max_tokens: int | None = None,
        temperature: float | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        response_schema: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> str:
        """`generate` for coroutines: nothing blocks the event loop."""
        given = {"max_tokens": max_tokens, "temperature": temperature, **sampling}
        stream = await self.astream(
            agent_id, user_input, tools=tools, response_schema=response_schema, **given
        )
        async with stream:
            return "".join([delta.text async for delta in stream])

    async def astream(
        self,
        agent_id: str,
        user_input: Said,
        max_tokens: int | None = None,
        temperature: float | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        response_schema: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> AsyncAgentStream:
        """`stream` for coroutines: nothing blocks the event loop."""
        given = {"max_tokens": max_tokens, "temperature": temperature, **sampling}
        turn = await self.abegin_turn(
            agent_id, user_input, tools=tools, response_schema=response_schema, **given
        )
        try:
            stream = await self.memory.achat(turn.request, turn.key, stream=True)
            return AsyncAgentStream(stream, turn)
        except BaseException:
            turn.give_up()
            raise

    def begin_turn(
        self,
        agent_id: str,
        user_input: Said,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        response_schema: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> AgentTurn:
        """Wait for an agent's turn, for whoever runs its request himself and tells it what is answered.

        The agent's next turn waits until it has finished or was given up. Arguments and errors are those of `generate`.
        """
        ticket = self._seats.begin(agent_id)
        leave = functools.partial(self._seats.end, agent_id, ticket)
        try:
            agent = self._seat(agent_id)
            new = _messages(user_input)
            request = ChatRequest(
                self._keeping.prompt(agent, new),
                tools=tuple(tools),
                sampling=sampling_for(self.memory.model_name, self._sampling(agent, sampling)),
                response_schema=response_schema,
            )
        except BaseException:
            leave()
            raise

        def ended(answer: Message, report: TurnReport) -> None:
            self._keeping.answered(agent, new, answer, report)

        return AgentTurn(request, self._keeping.key(agent_id), ended, leave)

    async def abegin_turn(self, agent_id: str, user_input: Said, **options: Any) -> AgentTurn:
        """`begin_turn` for coroutines: nothing blocks the event loop."""
        return await in_thread(
            lambda: self.begin_turn(agent_id, user_input, **options), undo=lambda turn: turn.give_up()
        )

    def generate_concurrent(self, requests: Sequence[tuple[str, str, int]]) -> list[str]:
        """Run turns of several agents at once; return the answers in the order of the requests.

        Args:
            requests: agent id, what is said, and the most tokens of the answer. Those of one agent run in their order.

        Raises:
            AgentMemoryError: what the first request raised that failed; the others ran all the same.
        """
        by_agent: dict[str, list[int]] = {}
        for place, (agent_id, _, _) in enumerate(requests):
            by_agent.setdefault(agent_id, []).append(place)
        answers: dict[int, str] = {}

        def run(places: list[int]) -> None:
            for place in places:
                answers[place] = self.generate(*requests[place])

        with ThreadPoolExecutor(self.max_agents, thread_name_prefix="agent-memory-agents") as threads:
            done = [threads.submit(run, places) for places in by_agent.values()]
        for each in done:
            each.result()
        return [answers[place] for place in range(len(requests))]

    # -- what it takes ------------------------------------------------------------------------------------

    def get_memory_usage(self) -> dict[str, Any]:
        """What the model and its agents take in memory.

        ``model_memory_gb``, ``agents`` (``cache_tokens`` and ``cache_mb`` of each agent in memory, what several share
        counted for each), ``total_cache_mb`` and ``total_gb``. All are in units of 1,024.
        """
        memory = self.memory
        return memory_usage(memory.weights_bytes, memory.stats(), self.agents, self._keeping.disk_bytes())

    def get_disk_usage(self) -> dict[str, Any]:
        """What all agents take on disk.

        ``total_bytes`` and ``total_mb`` of the whole store, ``num_agents``, ``per_agent`` (id and bytes, what several
        share counted for each, the largest first) and ``shared_bytes``, which is by how much that counts twice.
        """
        agents = [record.agent_id for record, _ in self._book.all()]
        return disk_usage(self.memory.stats(), agents, self._keeping.disk_bytes())

    def close(self) -> None:
        """Write what is queued, close the book and the memory, unless that was given."""
        self._mirror.close()
        if self._owned is not None:
            self._owned.close()
        elif not self.memory.closed:
            self.memory.flush()
        self._book.close()

    def _seat(self, agent_id: str) -> Agent:
        if not self.agent_exists(agent_id):
            # Before anybody makes room for it.
            raise AgentNotFound(f"there is no agent {agent_id!r}: create it first.")
        return self._seats.seat(agent_id, lambda: self._keeping.bring(agent_id))

    def _made(self, record: AgentRecord, exist_ok: bool) -> Agent:
        try:
            return self._keeping.make(record)
        except AgentExists:
            # Another process has made it meanwhile.
            known = self._book.get(record.agent_id)
            if known is None:
                raise
            _check_same(known, record, exist_ok)
            return self._keeping.bring(record.agent_id)

    def _sampling(self, agent: Agent, given: Mapping[str, Any]) -> dict[str, Any]:
        template = self._templates.get(agent.context.template or "")
        said = {name: value for name, value in given.items() if value is not None}
        return {"max_tokens": 300, "temperature": 0.0, **(template.sampling if template else {}), **said}


def _messages(said: Said) -> list[Message]:
    if isinstance(said, str):
        return [Message("user", said)]
    return [said] if isinstance(said, Message) else list(said)


def _check_same(known: AgentRecord, wanted: AgentRecord, exist_ok: bool) -> None:
    if not exist_ok:
        raise AgentExists(f"agent {known.agent_id!r} exists already: choose another id, or delete it.")
    if (known.agent_type, known.system_prompt) != (wanted.agent_type, wanted.system_prompt):
        raise AgentExists(
            f"agent {known.agent_id!r} exists already with another type or system prompt: choose another id, or delete "
            "it."
        )
