"""An agent as the object store has it, for all machines: who it is and what was said. Pure data.

Each machine has a copy, and notes how much of it is there. What it has said since then comes after what is there, as
with several processes that share one book: nothing is lost, whoever comes first. How many messages each copy has given
stands there too, so a machine that was killed before it could note that gives nothing twice. An agent that was deleted
leaves a mark, so that no machine brings it back.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from agent_memory_core import InvalidRequest, Message
from agent_memory_core.agents.book import AgentRecord, LocalAgent, from_json, to_json
from agent_memory_core.agents.errors import AgentExists

_VERSION = 1


@dataclass(frozen=True, slots=True)
class SharedAgent:
    """An agent, or the mark that one leaves."""

    record: AgentRecord | None
    """None where it was deleted"""
    messages: tuple[Message, ...] = ()
    clearings: int = 0
    """how often its history was cleared"""
    deleted: float = 0.0
    """when it was deleted last; 0 if it never was"""
    given: Mapping[str, int] = field(default_factory=dict)
    """how many messages each copy has given"""

    def local(self, here: LocalAgent | None) -> LocalAgent | None:
        """What a machine is to have then, whose copy is ``here``; None where the agent was deleted."""
        if self.record is None:
            return None
        copy = here.copy if here is not None else uuid.uuid4().hex
        count, given = len(self.messages), self.given.get(copy, 0)
        return LocalAgent(self.record, self.messages, count, self.clearings, copy, given)

    def to_bytes(self) -> bytes:
        """It as JSON."""
        return json.dumps(
            {
                "version": _VERSION,
                "record": asdict(self.record) if self.record is not None else None,
                "messages": [to_json(message) for message in self.messages],
                "clearings": self.clearings,
                "deleted": self.deleted,
                "given": dict(self.given),
            }
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> SharedAgent:
        """The inverse of `to_bytes`.

        Raises:
            InvalidRequest: it is none, or one of a newer release.
        """
        try:
            said = json.loads(data)
            if said["version"] != _VERSION:
                raise ValueError(f"it has version {said['version']}, and this release reads {_VERSION}")
            record = AgentRecord(**said["record"]) if said["record"] is not None else None
            messages = tuple(map(from_json, said["messages"]))
            given = {str(copy): int(count) for copy, count in said["given"].items()}
            return cls(record, messages, int(said["clearings"]), float(said["deleted"]), given)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"what the object store has is no agent: {error}.") from error


def merged(here: LocalAgent | None, deleted: float, there: SharedAgent | None) -> SharedAgent | None:
    """What the object store, and this machine, is to have of an agent; None if nobody ever had one.

    Args:
        here: what this machine has.
        deleted: when it was deleted on this machine, if nobody was told yet; else 0.
        there: what the object store has.

    Raises:
        AgentExists: another machine has made another agent of that id.
    """
    deleted = max(deleted, there.deleted if there is not None else 0.0)
    if here is not None and here.record.created <= deleted:
        # A new agent of that name is no deleted one, whatever the clock of the machine that deleted it said.
        later = replace(here.record, created=math.nextafter(deleted, math.inf))
        here = replace(here, record=later) if here.is_new else None
    if there is not None and (there.record is None or there.record.created <= deleted):
        there = None
    if here is None:
        if there is not None:
            return replace(there, deleted=deleted)
        return SharedAgent(None, deleted=deleted) if deleted else None
    if there is None or there.record is None:
        given = {here.copy: here.given + len(here.unsent)}
        return SharedAgent(here.record, here.messages, here.clearings, deleted, given)
    _check_same(here.record, there.record)
    kept = there.messages if there.clearings >= here.clearings else ()
    # What it has of this copy already, though nobody could note that here.
    unsent = here.unsent[max(0, there.given.get(here.copy, 0) - here.given) :]
    return SharedAgent(
        max(here.record, there.record, key=lambda record: record.last_access),
        (*kept, *unsent),
        max(here.clearings, there.clearings),
        deleted,
        {**there.given, here.copy: here.given + len(here.unsent)} if here.unsent else there.given,
    )


def _check_same(here: AgentRecord, there: AgentRecord) -> None:
    if (here.agent_type, here.system_prompt) != (there.agent_type, there.system_prompt):
        raise AgentExists(
            f"agent {here.agent_id!r} is another one in the object store, with another type or system prompt: "
            "export it, delete it here, and import it under a new id."
        )
