"""Keeps what was said to agents in step with the object store, so that an agent goes on by its name on any machine.

Its session moves by itself, with the cold tier. Here it is the book that moves: before a turn what is there is fetched,
after it what was said is put there. With ``cold_ack="local"`` that happens in a thread of its own; what could not be
uploaded stays marked in the book, and is tried again with the next turn, the next start and at the end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from agent_memory_core import AgentMemory, InvalidRequest, StoreError
from agent_memory_core.agents.book import AgentBook
from agent_memory_core.agents.shared import SharedAgent, merged

log = logging.getLogger("agent_memory")

KIND = "agents"
FRESH = 60.0
"""Seconds for which what was looked at is not looked at again."""

_MOST_LOOKED = 10_000
_ATTEMPTS = 20


class AgentMirror:
    """The agents of one namespace in the object store. Without one, nothing happens. Any thread may use it."""

    def __init__(self, memory: AgentMemory, book: AgentBook, namespace: str) -> None:
        self._memory = memory
        self._book = book
        self._namespace = namespace
        self.is_on = memory.config.cold_url is not None and memory.config.cache_dir is not None
        self._waits = memory.config.cold_ack == "remote"
        self._lock = threading.Lock()
        self._looked: OrderedDict[str, float] = OrderedDict()
        self._queued: set[str] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="agent-memory-agents")
        if self.is_on:
            for agent_id in book.unsent():
                self._soon(agent_id)

    def look(self, agent_id: str) -> None:
        """Fetch what other machines have said to an agent, unless that was done a moment ago."""
        if not self.is_on:
            return
        with self._lock:
            looked = self._looked.get(agent_id)
        if looked is None or time.monotonic() - looked > FRESH:
            self._try(agent_id)

    def changed(self, agent_id: str) -> bool:
        """See that the object store gets what is new here; say whether it has it, or nobody is to wait for that."""
        if not self.is_on:
            return True
        if self._waits:
            return self._try(agent_id)
        self._soon(agent_id)
        return True

    def sync(self, agent_id: str) -> bool:
        """Bring an agent here and in the object store to the same state; say whether there is one.

        Raises:
            StoreError: the object store cannot be reached.
            InvalidRequest: it has another agent of that id, or something that is none.
        """
        for _ in range(_ATTEMPTS):
            here, deleted = self._book.local(agent_id)
            found = self._memory.cold.read_text(KIND, agent_id, self._namespace)
            there = SharedAgent.from_bytes(found[0]) if found is not None else None
            wanted = merged(here, deleted, there)
            if wanted is None:
                return False
            if wanted != there and not self._write(agent_id, wanted, found[1] if found is not None else None):
                continue
            if self._book.settle(agent_id, here, wanted.local(here)):
                return wanted.record is not None
        raise StoreError(f"others keep changing agent {agent_id!r} in the object store.")

    def sync_all(self) -> None:
        """`sync` for every agent of which the object store lacks something.

        Raises as `sync` does.
        """
        for agent_id in self._book.unsent():
            self.sync(agent_id)

    def close(self) -> None:
        """Put there what is not there yet, until something fails. What is left is put there by the next start."""
        self._worker.shutdown(cancel_futures=True)
        if self.is_on and not self._memory.closed:
            try:
                self.sync_all()
            except (StoreError, InvalidRequest) as error:
                log.warning("not all agents are in the object store: %s", error)

    def _write(self, agent_id: str, wanted: SharedAgent, e_tag: str | None) -> bool:
        return self._memory.cold.write_text(KIND, agent_id, wanted.to_bytes(), e_tag, self._namespace)

    def _try(self, agent_id: str) -> bool:
        try:
            self.sync(agent_id)
        except (StoreError, InvalidRequest) as error:
            log.warning("agent %r is not in step with the object store: %s", agent_id, error)
            done = False
        else:
            done = True
        with self._lock:
            # Also where it failed: a store that is gone must not make every turn wait.
            self._looked[agent_id] = time.monotonic()
            self._looked.move_to_end(agent_id)
            while len(self._looked) > _MOST_LOOKED:
                self._looked.popitem(last=False)
        return done

    def _soon(self, agent_id: str) -> None:
        with self._lock:
            if agent_id in self._queued:
                return
            self._queued.add(agent_id)
        self._worker.submit(self._from_queue, agent_id)

    def _from_queue(self, agent_id: str) -> None:
        with self._lock:
            # Whatever comes from here on is not seen by this turn of the queue.
            self._queued.discard(agent_id)
        self._try(agent_id)
