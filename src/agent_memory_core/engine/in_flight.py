"""The turns in flight of one engine: from when they are queued until their place is free again."""

from __future__ import annotations

from contextlib import suppress

from agent_memory_core.engine import events
from agent_memory_core.engine.intake import Intake
from agent_memory_core.engine.prewarm import BackgroundPrewarm
from agent_memory_core.engine.scheduler import Scheduler
from agent_memory_core.engine.sinks import OutputSink
from agent_memory_core.engine.turn import Turn
from agent_memory_core.errors import AgentMemoryError
from agent_memory_core.messages import ChatRequest, SessionKey


class InFlight:
    """Queues turns and frees their places."""

    def __init__(
        self, intake: Intake, scheduler: Scheduler, background: BackgroundPrewarm, observers: events.Observers
    ) -> None:
        self.turns: dict[int, Turn] = {}
        """The turns by their id."""
        self._intake = intake
        self._scheduler = scheduler
        self._background = background
        self._observers = observers
        self._next_id = 0

    def submit(
        self, request: ChatRequest, key: SessionKey, sink: OutputSink, *, prewarm: bool, arrived: float
    ) -> int:
        """Queue the turn of a request and return its id; `Engine.submit` names arguments and errors."""
        return self._queue(
            self._intake.turn(self._next_id, request, key, sink, prewarm=prewarm, arrived=arrived)
        )

    def begin_background(self) -> bool:
        """Queue background work, if there is any that can be done."""
        while (work := self._background.next()) is not None:
            # Nobody asked for it: what does not fit is left to the next turn.
            with suppress(AgentMemoryError):
                turn = self._intake.background_turn(self._next_id, work)
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

    def _queue(self, turn: Turn) -> int:
        sequence = turn.sequence
        self._scheduler.match(sequence)
        self._scheduler.add(sequence)
        self._next_id += 1
        self.turns[turn.seq_id] = turn
        if turn.branch is not None:
            turn.branch.busy = True
        self._observers.tell(events.TurnQueued(turn.info, sequence.num_prompt, sequence.max_tokens))
        return turn.seq_id
