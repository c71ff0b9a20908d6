"""Agents that come from elsewhere, or go there: files of this package, and prompt caches of mlx-lm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from agent_memory_core import AgentMemory, Message, validate_session_id
from agent_memory_core.agents.book import AgentBook, AgentRecord
from agent_memory_core.agents.contexts import AgentContext
from agent_memory_core.agents.errors import AgentExists
from agent_memory_core.agents.keeping import Agent, Keeping
from agent_memory_core.agents.mirror import AgentMirror
from agent_memory_core.agents.poc import prompt_caches, read_prompt_cache, to_words
from agent_memory_core.agents.portable import has_session, read_agent, write_agent
from agent_memory_core.agents.seats import Seats

log = logging.getLogger("agent_memory")


class AgentTransfers:
    """The imports and exports of a manager, which sets what is declared here."""

    memory: AgentMemory
    namespace: str
    _book: AgentBook
    _keeping: Keeping
    _mirror: AgentMirror
    _seats: Seats[Agent]

    def pull_agent(self, agent_id: str) -> bool:
        """Bring an agent up to what other machines have said to it, and say whether there is one.

        Turns do that by themselves; its session comes with them.

        Raises:
            StoreError: there is no cold tier, or it cannot be reached.
            AgentExists: the agent of that id in the object store is another one.
        """
        with self._seats.turn(agent_id):
            return self._mirror.sync(agent_id)

    def push_agents(self) -> int:
        """Upload what the object store lacks of agents, and return how many it has of this namespace then.

        Raises as `pull_agent` does.
        """
        self._mirror.sync_all()
        return len(self._book.all())

    def export_agent(self, agent_id: str, path: str | Path) -> Path:
        """Write an agent to a file, with all that is stored of it, for another machine. Nothing in it is encrypted.

        Raises:
            AgentNotFound: there is none of that id.
            StoreError: the agent cannot be saved, or the file not be written.
        """
        with self._seats.turn(agent_id):
            agent = self._seats.sitting().get(agent_id) or self._keeping.bring(agent_id)
            self._keeping.save(agent)
            record = self._book.get(agent_id)
            assert record is not None, "it was brought or is in memory"
            write_agent(self.memory, self.namespace, record, self._book.messages(agent_id), Path(path))
        return Path(path)

    def import_agent(self, path: str | Path, new_id: str | None = None) -> AgentContext:
        """Make an agent from a file that `export_agent` wrote, here or elsewhere.

        With the same model it goes on where it was; with another one its text is computed anew.

        Raises:
            InvalidRequest: the file is none of these, or is damaged.
            AgentExists: the id is taken.
        """
        with read_agent(Path(path), new_id) as (record, said, file):

            def fetch() -> None:
                if self.memory.config.cache_dir is not None and has_session(file):
                    self.memory.import_session(record.agent_id, file, self.namespace)

            return self._import(record, fetch, said)

    def import_poc(self, path: str | Path) -> list[AgentContext]:
        """Make agents from prompt caches that mlx-lm saved: a file, or all files of a folder.

        Id, type, system prompt and what was said are taken from the metadata. Keys and values are computed anew, since
        such a file does not say of which tokens they are.

        Raises:
            InvalidRequest: a file is no such cache, or an agent of its id exists; those before it are made.
        """
        imported = []
        for file in prompt_caches(Path(path)):
            found = read_prompt_cache(file)
            log.info(
                "%s: the text of agent %r is taken, its keys and values are computed", file, found.agent_id
            )
            record = AgentRecord(
                agent_id=found.agent_id,
                agent_type=found.agent_type,
                system_prompt=found.system_prompt,
                model=self.memory.model_name,
            )
            imported.append(self._import(record, lambda: None, found.messages))
        return imported

    def export_poc(self, agent_id: str, path: str | Path) -> Path:
        """Write an agent as a prompt cache of mlx-lm, with its words in the metadata; `import_poc` reads them again.

        Raises:
            AgentNotFound: there is none of that id.
            InvalidRequest: the path does not end in .safetensors.
            StoreError: what is stored is gone, or the file cannot be written.
        """
        with self._seats.turn(agent_id):
            agent = self._seats.sitting().get(agent_id) or self._keeping.bring(agent_id)
            self._keeping.prompt(agent, ())
            words = to_words(agent.context)
            self.memory.export_prompt_cache(agent_id, path, self.namespace, metadata=words)
        return Path(path)

    def _import(
        self, record: AgentRecord, fetch: Callable[[], None], said: Sequence[Message]
    ) -> AgentContext:
        """Make an agent that has a past; ``fetch`` brings what is known of it besides the text."""
        validate_session_id(record.agent_id)
        with self._seats.turn(record.agent_id):
            if self._keeping.find(record.agent_id) is not None:
                raise AgentExists(
                    f"agent {record.agent_id!r} exists already: delete it, or import the other under a new id."
                )

            def come() -> Agent:
                fetch()
                return self._keeping.make(record, said)

            return self._seats.seat(record.agent_id, come).context
