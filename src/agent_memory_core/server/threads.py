"""Conversations that the server holds: a request names what it goes on from, and sends only what is new."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from agent_memory_core import Usage
from agent_memory_core.server.comparing import Finding, Outline, compared
from agent_memory_core.server.errors import NOT_FOUND, ApiError, Kind
from agent_memory_core.server.ids import new_id
from agent_memory_core.server.records import Record, Records
from agent_memory_core.server.sessions import NO_THREAD, Thread
from agent_memory_core.server.turns import Call

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request says of its conversation."""

    prefix: str
    """How the ids of answers begin in its dialect."""
    missing: Kind
    """The error where it goes on from an answer that is not there."""
    previous: str | None = None
    """The answer from which it goes on."""
    conversation: str | None = None
    """The conversation to which it is added."""
    keeps: bool = False
    """Whether a later request may go on from its answer."""
    outlines: bool = False
    """Whether a later request may ask what it could not reuse of this one."""
    compare: str | None = None
    """The answer to which it is compared: what could not be reused of that one's prompt."""
    held: Mapping[str, Any] = field(default_factory=dict)
    """Fields that later requests do not repeat."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands: what was said before it, and what becomes of its answer."""

    records: Records
    namespace: str
    wanted: Wanted
    answer_id: str
    earlier: list[Item] = field(default_factory=list)
    """What was said before, as the dialect writes it."""
    thread: Thread = NO_THREAD
    """Whose memory has read it; without a name where nothing is to be held."""
    held: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request that began it."""
    conversation: Record | None = None
    """What the answer is added to."""
    comparison: Outline | None = None
    """The prompt to which this one is compared, if there is a record of it."""

    @property
    def is_kept(self) -> bool:
        """Whether a later request can go on from the answer."""
        return self.wanted.keeps or self.conversation is not None

    def finding(self, call: Call, cached_tokens: int) -> Finding | None:
        """What could not be reused; None where nobody asks."""
        if self.wanted.compare is None:
            return None
        return compared(self.comparison, Outline.of(call.request, call.model), cached_tokens)

    def keep(
        self, call: Call, said: Sequence[Item], output: Sequence[Item], usage: Usage, answer: Item
    ) -> None:
        """Keep an answer, as far as somebody may ask for it.

        Args:
            call: what was asked.
            said: the new entries of the conversation before the answer.
            output: those that the answer added.
            usage: the tokens of the turn.
            answer: the object that the client gets.
        """
        if not (self.is_kept or self.wanted.outlines):
            return
        outline = Outline.of(call.request, call.model, usage.total_tokens)
        record = Record(self.answer_id, call.key.session_id or "", [], prompt=asdict(outline))
        if self.is_kept:
            history = [*self.earlier, *said]
            record = replace(
                record, history=[*history, *output], answer=answer, held=dict(self.held), asked=len(history)
            )
        self.records.put(self.namespace, record)
        if self.conversation is not None:
            self.records.put(self.namespace, replace(self.conversation, history=record.history))


class Threads:
    """Finds where requests stand."""

    def __init__(self, records: Records) -> None:
        self.records = records

    async def place(self, namespace: str, wanted: Wanted) -> Place:
        """Where a request stands.

        Raises:
            ApiError: what it goes on from is not there.
        """
        place = Place(self.records, namespace, wanted, new_id(wanted.prefix), held=wanted.held)
        if wanted.keeps:
            place = replace(place, thread=Thread(new_id("thread:"), is_new=True))
        if wanted.previous is not None:
            found = await self.records.get(namespace, wanted.previous)
            if found is None or not found.history:
                message = (
                    f"Previous response with id {wanted.previous!r} not found: send the whole conversation."
                )
                raise ApiError(wanted.missing, message, param="previous_response_id")
            thread = Thread(found.session_id, is_new=False)
            place = replace(place, earlier=found.history, thread=thread, held=found.held)
        elif wanted.conversation is not None:
            held = await self.conversation(namespace, wanted.conversation)
            thread = Thread(held.session_id, is_new=False)
            place = replace(place, earlier=held.history, thread=thread, conversation=held)
        if wanted.compare is not None:
            place = replace(place, comparison=_outline(await self.records.get(namespace, wanted.compare)))
        return place

    async def answer(self, namespace: str, answer_id: str) -> Record | None:
        """What is kept of an answer; None where there is nothing, or only its outline."""
        found = await self.records.get(namespace, answer_id)
        return found if found is not None and found.answer else None

    async def conversation(self, namespace: str, conversation_id: str) -> Record:
        """A conversation that was begun with `begin`.

        Raises:
            ApiError: there is none.
        """
        found = await self.records.get(namespace, conversation_id)
        if found is None or not conversation_id.startswith("conv_"):
            raise ApiError(NOT_FOUND, f"Conversation with id {conversation_id!r} not found.")
        return found

    def begin(self, namespace: str, items: list[Item], metadata: object) -> Record:
        """Begin a conversation."""
        name = new_id("conv_")
        about = {"id": name, "object": "conversation", "created_at": int(time.time()), "metadata": metadata}
        record = Record(name, f"conversation:{name}", items, answer=about)
        self.records.put(namespace, record)
        return record


def _outline(record: Record | None) -> Outline | None:
    if record is None or not record.prompt:
        return None
    return Outline(**{**record.prompt, "messages": tuple(record.prompt["messages"])})
