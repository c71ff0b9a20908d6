"""The turns in flight of one engine: from when they are queued until their place is free again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from agent_memory_core.engine import events
from agent_memory_core.engine.intake import Intake
from agent_memory_core.engine.preparing import Preparer
from agent_memory_core.engine.prewarm import BackgroundPrewarm
from agent_memory_core.engine.results import Prepared, PreparedPrompt
from agent_memory_core.engine.scheduler import Scheduler
from agent_memory_core.engine.sinks import CANCELLED, GuardedSink, OutputSink
from agent_memory_core.engine.turn import Turn
from agent_memory_core.errors import AgentMemoryError, Cancelled
from agent_memory_core.messages import ChatRequest, SessionKey


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, as it was asked."""

    request: ChatRequest
    key: SessionKey
    sink: OutputSink
    prewarm: bool
    arrived: float


class InFlight:
    """Queues turns and frees their places."""

    def __init__(
        self,
        intake: Intake,
        preparer: Preparer,
        scheduler: Scheduler,
        background: BackgroundPrewarm,
        observers: events.Observers,
    ) -> None:
        self.turns: dict[int, Turn] = {}
        """The turns by their id."""
        self._intake = intake
        self._preparer = preparer
        self._preparing: dict[int, _Asked] = {}
        self._scheduler = scheduler
        self._background = background
        self._observers = observers
        self._next_id = 0

    def submit(
        self, request: ChatRequest, key: SessionKey, sink: OutputSink, *, prewarm: bool, arrived: float
    ) -> int:
        """Queue the turn of a request and return its id; `Engine.submit` names arguments and errors."""
        seq_id = self._new_id()
        asked = _Asked(request, key, sink, prewarm, arrived)
        if self._preparer.takes(request):
            self._preparing[seq_id] = asked
            self._preparer.submit(seq_id, request, self._intake.known(key), asks=not prewarm)
        else:
            self._begin(seq_id, asked)
        return seq_id

    def prepared(self, outcome: Prepared) -> None:
        """Queue the turn of a request that was long, unless it was withdrawn meanwhile."""
        asked = self._preparing.pop(outcome.seq_id, None)
        if asked is None:
            return
        if isinstance(asked.sink, GuardedSink) and asked.sink.is_gone:
            asked.sink.end()
            return
        if isinstance(outcome.result, AgentMemoryError):
            asked.sink.fail(outcome.result)
            return
        try:
            self._begin(outcome.seq_id, asked, outcome.result)
        except AgentMemoryError as error:
            asked.sink.fail(error)

    @property
    def preparing(self) -> int:
        """How many requests are being prepared."""
        return len(self._preparing)

    @property
    def ids(self) -> list[int]:
        """All turns and the requests that are being prepared."""
        return [*self.turns, *self._preparing]

    def owners_preparing(self) -> set[tuple[str, str]]:
        """Namespace and session id of the requests that are being prepared."""
        keys = [asked.key for asked in self._preparing.values()]
        return {(key.namespace, key.session_id) for key in keys if key.session_id is not None}

    def withdraw(self, seq_id: int | None) -> bool:
        """Drop a request that is being prepared and tell its reader; return whether there was one."""
        asked = self._preparing.pop(seq_id, None) if seq_id is not None else None
        if asked is not None:
            asked.sink.fail(Cancelled(CANCELLED))
        return asked is not None

    def refuse_preparing(self, error: Exception) -> int:
        """Give every request that is being prepared the same error; return how many there were."""
        refused, self._preparing = self._preparing, {}
        for asked in refused.values():
            asked.sink.fail(error)
        return len(refused)

    def begin_background(self) -> bool:
        """Queue background work, if there is any that can be done."""
        while (work := self._background.next()) is not None:
            # Nobody asked for it: what does not fit is left to the next turn.
            with suppress(AgentMemoryError):
                turn = self._intake.background_turn(self._new_id(), work)
                self._background.started(self._queue(turn), work)
                return True
        return False

    def close(self, turn: Turn) -> None:
        """Free a turn's place."""
        if turn.branch is not None:
            turn.branch.busy = False
        if turn.sequence.background:
            self._background.closed()
        self._scheduler.retire(turn.sequence)
        self.turns.pop(turn.seq_id, None)

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _begin(self, seq_id: int, asked: _Asked, prompt: PreparedPrompt | None = None) -> None:
        self._queue(
            self._intake.turn(
                seq_id,
                asked.request,
                asked.key,
                asked.sink,
                prewarm=asked.prewarm,
                arrived=asked.arrived,
                prepared=prompt,
            )
        )

    def _queue(self, turn: Turn) -> int:
        sequence = turn.sequence
        self._scheduler.match(sequence)
        self._scheduler.add(sequence)
        self.turns[turn.seq_id] = turn
        if turn.branch is not None:
            turn.branch.busy = True
        self._observers.tell(events.TurnQueued(turn.info, sequence.num_prompt, sequence.max_tokens))
        return turn.seq_id
