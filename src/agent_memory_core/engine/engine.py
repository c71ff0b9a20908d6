"""The engine connects the rooms: the scheduler says, the runner does, the disk keeps.

One turn's way: `submit` makes a turn of the request and queues it; `step`, called again and again on one thread,
admits it, loads and restores what is stored of its prompt, prefills the rest, decodes, and retires it: full blocks
are sealed, the unfinished one becomes the branch's tail, and both are committed in one transaction before the last
delta is handed out. What the disk's threads did comes back through `take`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from agent_memory_core.blocks.block import Block
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.config import EngineConfig
from agent_memory_core.engine import events
from agent_memory_core.engine.committing import Ended
from agent_memory_core.engine.gpu_memory import weight_bytes
from agent_memory_core.engine.in_flight import InFlight
from agent_memory_core.engine.misses import ColdLanes
from agent_memory_core.engine.model_runner import Step
from agent_memory_core.engine.results import Loaded, Prepared, Result, Results, Saved
from agent_memory_core.engine.rooms import make_rooms
from agent_memory_core.engine.scheduler import Chunk, joint_groups
from agent_memory_core.engine.sinks import CANCELLED, GuardedSink, OutputSink
from agent_memory_core.engine.stats import Counters, Stats
from agent_memory_core.engine.turn import Turn
from agent_memory_core.errors import Cancelled, OutOfGpuMemory, SessionNotFound
from agent_memory_core.messages import ChatRequest, Delta, FinishReason, SessionKey, Transcript
from agent_memory_core.models.loader import LoadedModel
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.structured.tool_calls import model_parser
from agent_memory_core.text.token_text import TokenText
from agent_memory_core.text.transcript import TranscriptReader


class Engine:
    """One model, one pool, one store. Not thread-safe: one thread owns it.

    Args:
        memory_bytes: the budget for keys and values in memory.
        store: where turns outlast the engine; None keeps them in memory only.
        results: takes what the disk's threads did; whoever reads it hands each result to `take`.
        observers: who is told of what happens.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        memory_bytes: int,
        store: BlockStore | None,
        results: Results,
        observers: events.Observers,
    ) -> None:
        rooms = make_rooms(loaded, config, memory_bytes, store, results)
        self.loaded = loaded
        self.config = config
        self.counters = Counters()
        self.parity, self.template, self.blocks = rooms.parity, rooms.template, rooms.blocks
        self.pool, self.limits, self.scheduler = rooms.pool, rooms.limits, rooms.scheduler
        self.runner, self.disk, self.sessions = rooms.runner, rooms.disk, rooms.sessions
        self.intake, self.restoring, self.retention = rooms.intake, rooms.restoring, rooms.retention
        self.committing, self.background, self.gpu = rooms.committing, rooms.background, rooms.gpu
        self.preparer, self.pace, self.working_set = rooms.preparer, rooms.pace, rooms.working_set
        self.in_flight = InFlight(self.intake, self.preparer, self.scheduler, self.background, observers)
        self.turns = self.in_flight.turns
        self._observers = observers
        self._eos = frozenset(loaded.tokenizer.eos_token_ids)
        self._evicted = 0
        self._cold_lanes = ColdLanes()

    # -- a turn's beginning -------------------------------------------------------------------------------

    def submit(
        self,
        request: ChatRequest,
        key: SessionKey,
        sink: OutputSink,
        *,
        prewarm: bool = False,
        arrived: float = 0,
    ) -> int:
        """Queue a turn, for which background work makes way, and return its id; its deltas go to ``sink``.

        With ``prewarm`` only the prompt is evaluated. ``arrived`` is when the caller asked, by `time.perf_counter`.

        A long request is prepared on another thread; what is wrong with it then reaches the sink.

        Raises:
            InvalidRequest: the template cannot render it, its form cannot be held to, or it can never fit.
        """
        self.cancel(self.background.withdraw())
        return self.in_flight.submit(request, key, sink, prewarm=prewarm, arrived=arrived)

    # -- a step -------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do one round of work; return whether there is more that can be done now."""
        batch = self.scheduler.schedule()
        self.counters.steps += 1
        for sequence in batch.admitted:
            self._for_turn(self.turns[sequence.seq_id], self._restore)
        for sequence in batch.joining:
            self._for_turn(self.turns[sequence.seq_id], self._join)
        steps: list[Step] = []
        self._survive(self._decoding(), self.gpu.attempt(lambda: steps.extend(self.runner.decode())))
        for step in steps:
            if (turn := self.turns.get(step.slot.seq_id)) is not None:
                self._decoded(turn, step)
        for chunks in self._passes(batch.chunks):
            self._prefill(chunks)
        self._withdraw_unread()
        if evicted := self.pool.evicted - self._evicted:
            self._evicted += evicted
            self._observers.tell(events.BlocksEvicted(evicted))
        return self.scheduler.has_work() or (not self.turns and self.in_flight.begin_background())

    def _withdraw_unread(self) -> None:
        """Give back the places of turns whose readers are gone."""
        for turn in list(self.turns.values()):
            if isinstance(turn.sink, GuardedSink) and turn.sink.is_gone:
                self.cancel(turn.seq_id)

    def take(self, result: Result) -> None:
        """Go on with what another thread has done."""
        if isinstance(result, Prepared):
            self.in_flight.prepared(result)
        elif isinstance(result, Saved):
            ended = self.committing.saved(result)
            if ended is not None:
                self._ended(ended)
        elif (turn := self.turns.get(result.seq_id)) is not None:
            self._for_turn(turn, self._restore, result)

    def _restore(self, turn: Turn, result: Loaded | None = None) -> None:
        is_ready = self.restoring.begin(turn) if result is None else self.restoring.loaded(turn, result)
        if is_ready:
            self._observers.tell(events.TurnAdmitted(turn.info, turn.sequence.num_cached, turn.tier))

    def _passes(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        """The chunks of a step in groups that are evaluated together."""
        alone = [[chunk] for chunk in chunks]
        if not self.runner.may_prefill_together:
            return alone
        groups = joint_groups(chunks, self.scheduler.largest_chunk)
        if len(groups) < len(chunks) and self.runner.batches is None:
            self.runner.batches = self.parity.may_batch()
        return groups if self.runner.batches else alone

    def _prefill(self, chunks: list[Chunk]) -> None:
        found = [(self.turns.get(chunk.sequence.seq_id), chunk) for chunk in chunks]
        work = [(turn, chunk) for turn, chunk in found if turn is not None]
        if len(work) == 1:
            self._for_turn(work[0][0], self._prefill_one, work[0][1])
        elif work:
            self._prefill_together(work)

    def _prefill_together(self, work: list[tuple[Turn, Chunk]]) -> None:
        """Evaluate chunks of several turns in one pass. What that lacks fails all of them, and nobody else."""
        self._survive(self._decoding(), self.gpu.attempt(self.runner.settle))
        logits: list[mx.array] = []
        evaluate = partial(self.runner.prefill_together, [(turn.row, chunk.ids) for turn, chunk in work])
        self._survive([turn for turn, _ in work], self.gpu.attempt(lambda: logits.extend(evaluate())))
        for (turn, chunk), row in zip(work, logits, strict=False):
            self._for_turn(turn, self._prefilled, chunk, row if chunk.wants_token else None)

    def _prefill_one(self, turn: Turn, chunk: Chunk) -> None:
        started = time.perf_counter()
        logits = self.runner.prefill(turn.row, chunk.ids, logits=chunk.wants_token)
        if self.pace is not None:
            self.pace.took(chunk.stop - chunk.start, time.perf_counter() - started)
            self.scheduler.chunk_tokens = self.pace.tokens
        self._prefilled(turn, chunk, logits)

    def _prefilled(self, turn: Turn, chunk: Chunk, logits: mx.array | None) -> None:
        """Go on after a chunk: with the first token, the end of a prewarming, or what is to be kept of the prompt."""
        sequence = turn.sequence
        self.scheduler.computed(chunk)
        self._observers.tell(events.TurnProgress(turn.info, chunk.start, chunk.stop, sequence.num_prompt))
        if logits is not None:
            if self._first_token(turn, logits):
                return
        elif chunk.is_last:
            self._finish(turn, turn.row.cache, "stop")
            return
        self._seal(turn, turn.row.cache, chunk.stop)
        is_due = self.committing.is_due(turn)
        if chunk.is_checkpoint or is_due:
            tail = self._checkpoint(turn, turn.row.cache, chunk.stop)
            if is_due:
                self.committing.keep(turn, tail)

    def _first_token(self, turn: Turn, logits: mx.array) -> bool:
        """Sample the first token; return whether it ends the answer."""
        token = self.runner.sample(turn.row, logits, turn.sequence.token_ids)
        turn.first_token = time.perf_counter()
        self._observers.tell(events.FirstToken(turn.info, token, logits))
        self.scheduler.update(turn.sequence, token)
        ended = token in self._eos or turn.hand_out(token, turn.row.logprobs)
        if ended or turn.sequence.max_tokens == 1:
            self._finish(turn, turn.row.cache, "stop" if ended else "length")
            return True
        return False

    def _join(self, turn: Turn) -> None:
        ids = turn.sequence.token_ids
        if self.runner.must_decide(len(ids)):
            self.runner.batches = self.parity.may_batch()
        self.runner.join(turn.row, ids, turn.sequence.max_tokens - 1)

    def _decoded(self, turn: Turn, step: Step) -> None:
        self.scheduler.update(turn.sequence, step.token)
        ended = step.token in self._eos or turn.hand_out(step.token, step.logprobs)
        if ended or step.cache is not None or self.retention.completes_window(turn):
            self._for_turn(turn, self._keep, step, ended)

    def _keep(self, turn: Turn, step: Step, ended: bool) -> None:
        if self.retention.completes_window(turn):
            self.retention.take_window(turn, self.runner.peek(step.slot))
        if step.cache is not None:
            self._finish(turn, step.cache, "stop" if ended else "length")
        elif ended:
            self._finish(turn, self.runner.stop(step.slot), "stop")

    def _seal(self, turn: Turn, cache: list[Any], length: int) -> None:
        """Put the full blocks of the first ``length`` tokens to rest."""
        sequence = turn.sequence
        first, last = sequence.num_sealed, length // self.config.block_tokens
        if first < last and not self.blocks.resume.unsupported:
            fresh = self.retention.seal(turn, cache, first, last)
            persist = turn.session is not None and self.disk.keeps_turns
            self.scheduler.sealed(sequence, last, fresh, persist=persist)

    # -- a turn's end -------------------------------------------------------------------------------------

    def _finish(self, turn: Turn, cache: list[Any], reason: FinishReason) -> None:
        sequence = turn.sequence
        completion = len(sequence.generated)
        if (rest := turn.rest(reason)) is not None:
            # What is left to do takes longer than reading the end of an answer should.
            turn.sink.deliver(rest)
        if turn.tool_calls and reason == "stop":
            reason = "tool_calls"
        self.scheduler.keep(sequence, turn.answered)
        self._seal(turn, cache, sequence.num_computed)
        tail = self.retention.checkpoint(turn, cache, sequence.num_computed)
        report = turn.report(reason, completion, self.loaded.name)
        if turn.call_mask is not None:
            turn.call_mask.end()
            self.counters.calls_held += turn.call_mask.held
            self.counters.calls_saved += turn.call_mask.saved
        if not sequence.background:
            self._cold_lanes.add(turn.key, report)
        self._observers.tell(events.TurnFinished(turn.info, report))
        branch = self.committing.settle(turn, tail)
        if branch is not None:
            self.background.ended(turn, branch)
        ended = self.committing.commit(turn, branch, tail, report)
        self.in_flight.close(turn)
        # Counted once it is on its way to the disk, so that whoever sees the count can wait for it.
        self.counters.add(report, background=sequence.background)
        if ended is not None:
            self._ended(ended)
        self.retention.keep_live(turn, cache, tail)

    def _ended(self, ended: Ended) -> None:
        if ended.is_saved:
            self._observers.tell(events.TurnSaved(ended.turn.info, ended.report))
        ended.turn.sink.deliver(Delta(report=ended.report))

    # -- a turn cut short ---------------------------------------------------------------------------------

    def cancel(self, seq_id: int | None) -> None:
        """Free the place of a turn, if it is in flight, and tell its reader `Cancelled`.

        Its whole blocks stay findable in memory; its session is as it was.
        """
        turn = self.turns.get(seq_id) if seq_id is not None else None
        if turn is None:
            self.counters.cancelled += self.in_flight.withdraw(seq_id)
            return
        report = turn.report("cancelled", len(turn.sequence.generated), self.loaded.name)
        if turn.slot is not None:
            self._for_turn(turn, self._keep_computed)
        if seq_id in self.turns:
            self.in_flight.close(turn)
            self.counters.cancelled += not turn.sequence.background
            turn.sink.fail(Cancelled(CANCELLED))
            self._observers.tell(events.TurnCancelled(turn.info, report))

    def cancel_all(self) -> None:
        """Withdraw every turn in flight as `cancel` does."""
        for seq_id in self.in_flight.ids:
            self.cancel(seq_id)

    def _keep_computed(self, turn: Turn) -> None:
        cache = self.runner.stop(turn.row)
        self.scheduler.keep(turn.sequence, max(turn.sequence.num_computed, turn.row.fed))
        self._seal(turn, cache, turn.sequence.num_computed)
        self.committing.keep(turn, self._checkpoint(turn, cache, turn.sequence.num_computed))

    def _checkpoint(self, turn: Turn, cache: list[Any], position: int) -> Block | None:
        """Keep what it takes to resume at ``position``, where blocks alone are not enough; return the tail."""
        if self.blocks.resume.at_any_token:
            return None
        return self.retention.checkpoint(turn, cache, position)

    def fail_all(self, error: Exception) -> None:
        """Give every turn in flight the same error and start afresh; what is at rest stays."""
        self.runner.close()
        self.counters.failed += self.in_flight.refuse_preparing(error)
        for turn in list(self.turns.values()):
            self._fail(turn, error)

    def _fail(self, turn: Turn, error: Exception) -> None:
        self.in_flight.close(turn)
        self.counters.failed += 1
        turn.sink.fail(error)
        self._observers.tell(events.TurnFailed(turn.info, error))

    # -- a lack of memory on the GPU ----------------------------------------------------------------------

    def _decoding(self) -> list[Turn]:
        return [self.turns[row.seq_id] for row in self.runner.rows()]

    def _for_turn(self, turn: Turn, work: Callable[..., None], *args: Any) -> None:
        """Work for one turn. The decode steps under way end first, so that what they lack is not blamed on it."""
        self._survive(self._decoding(), self.gpu.attempt(self.runner.settle))
        if turn.seq_id in self.turns:
            self._survive([turn], self.gpu.attempt(work, turn, *args))

    def _survive(self, turns: list[Turn], lack: OutOfGpuMemory | None) -> None:
        """If the GPU lacked memory for some turns, fail these and free what can be freed, so that others go on."""
        if lack is not None:
            self.runner.drop([turn.slot for turn in turns if turn.slot is not None])
            for turn in turns:
                self._fail(turn, lack)
            self.pool.evict_all()
            self.gpu.clear_cache()

    # -- the rest -----------------------------------------------------------------------------------------

    def forget(self, owner: tuple[str, str]) -> bool:
        """Drop a session, given as namespace and session id, from memory; say whether it had a branch there."""
        self.cancel(self.background.forget(owner))
        return self.sessions.forget(owner)

    def release(self, owner: tuple[str, str]) -> int:
        """Drop from memory what is on disk and only one session needs; return how many bytes that freed."""
        self.cancel(self.background.forget(owner))
        before = self.pool.used
        self.pool.discard(self.disk.stored(list(self.sessions.exclusive(owner))))
        return before - self.pool.used

    def transcript(self, owner: tuple[str, str], branch_id: int | None) -> Transcript:
        """The conversation of a branch of a session, by default of the one that was used last.

        Raises:
            SessionNotFound: there is no such branch that this model can read.
        """
        branch = self.branch(owner, branch_id)
        reader = TranscriptReader(self.loaded.tokenizer, self.template, model_parser(self.loaded.tokenizer))
        return reader.read(branch.token_ids)

    def branch(self, owner: tuple[str, str], branch_id: int | None) -> Branch[TokenText]:
        """A branch of a session, by default the one that was used last.

        Raises:
            SessionNotFound: there is no such branch that this model can read.
        """
        branches = self.sessions.open(self.intake.root(owner[0]), owner).branches
        fitting = [branch for branch in branches if branch_id in (None, branch.branch_id)]
        if not fitting:
            raise SessionNotFound(
                f"there is nothing of session {owner[1]!r} in namespace {owner[0]!r} that {self.loaded.name} has read."
            )
        return max(fitting, key=lambda branch: branch.used)

    def sessions_in_use(self) -> set[tuple[str, str]]:
        """Namespace and session id of every turn that is in flight or being written."""
        in_flight = {turn.owner for turn in self.turns.values() if turn.key.session_id is not None}
        return in_flight | self.in_flight.owners_preparing() | self.sessions.in_use()

    @property
    def running(self) -> int:
        """How many turns have their place. Any thread may ask."""
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        """How many turns wait for their place. Any thread may ask."""
        return self.scheduler.waiting + self.in_flight.preparing

    def stats(self) -> Stats:
        """What was done and what memory holds; of the store only its owner can tell. Any thread may ask."""
        return Stats(
            **self.counters.snapshot(),
            model=self.loaded.name,
            waiting=self.waiting,
            running=self.running,
            unsaved_turns=self.disk.failed,
            memory=self.gpu.stats(self.pool, self._working_bytes()),
        )

    def _working_bytes(self) -> int:
        running = self.scheduler.running
        return self.working_set.nbytes(
            tokens=self.scheduler.largest_chunk if running else 0,
            longest=max((sequence.capacity for sequence in running), default=0),
            rows=max(len(running), self.config.block_tokens) if running else 0,
            copied=self.pool.reserved,
        )

    @property
    def weights_bytes(self) -> int:
        """What the model's weights take of the device's memory."""
        return weight_bytes(self.loaded.model)

    def close(self, *, keep_store: bool = False) -> None:
        """Write what is queued and let go of everything. The last turns' results are still to be taken.

        Args:
            keep_store: leave the store open, for whom it serves without an engine.
        """
        self.runner.close()
        self.preparer.close()
        self.disk.close(keep_store=keep_store)
        self.gpu.close()
