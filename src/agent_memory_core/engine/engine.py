"""The engine connects the rooms: the scheduler says, the runner does, the store keeps.

One turn's way: `submit` encodes the request and queues a sequence; `step`, called again and again on one
thread, admits it, loads and restores its known prefix, prefills what is new, decodes, and retires it: full
blocks are sealed, the unfinished one becomes the branch's tail, and both are committed in one transaction
before the last delta is handed out.
"""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable, Collection, Sequence as ReadOnly
from typing import Any

import mlx.core as mx

from agent_memory_core.blocks.block import Block, BlockHash, common_prefix, root_hash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.blocks.prefix_cache import Match, PrefixCache
from agent_memory_core.config import EngineConfig
from agent_memory_core.engine.block_io import BlockReader, BlockWriter, Save
from agent_memory_core.engine.model_runner import ModelRunner, Step
from agent_memory_core.engine.prewarm import BackgroundPrewarm
from agent_memory_core.engine.retention import KvRetention
from agent_memory_core.engine.scheduler import Chunk, Limits, Scheduler
from agent_memory_core.engine.sequence import Sequence
from agent_memory_core.engine.session_book import LiveSession, Owner, SessionBook, snapshot
from agent_memory_core.engine.sinks import DISCARD, OutputSink
from agent_memory_core.engine.turn import Counters, Turn
from agent_memory_core.errors import Cancelled, InvalidRequest, SessionNotFound
from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.kv.records import KvBlocks
from agent_memory_core.messages import (
    ChatRequest,
    Delta,
    FinishReason,
    MissReason,
    SessionInfo,
    SessionKey,
    TurnReport,
)
from agent_memory_core.models.cache_spec import cache_spec
from agent_memory_core.models.loader import LoadedModel
from agent_memory_core.models.parity import ParityCheck
from agent_memory_core.models.profile import Profile
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import BranchRow
from agent_memory_core.storage.record import Record
from agent_memory_core.structured.grammar import Grammars
from agent_memory_core.structured.tool_calls import parser_for
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.checkpoints import CheckpointFinder
from agent_memory_core.text.detokenizer import Detokenizer, starts_in_reasoning
from agent_memory_core.text.token_text import Prompt, TokenText

FORMAT = "1"
"""Version of what blocks hold; part of every root."""


class Engine:
    """One model, one pool, one store. Not thread-safe: one thread owns it."""

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, memory_bytes: int, store: BlockStore | None
    ) -> None:
        self.loaded = loaded
        self.config = config
        self.store = store
        self.counters = Counters()
        layout = KvLayout(loaded.model)
        catalog = store.catalog if store is not None else None
        self.parity = ParityCheck(
            loaded.model, layout, loaded.fingerprint, loaded.tokenizer.vocab_size, catalog
        )
        self.blocks = KvBlocks(layout, config.kv_bits, config.block_tokens, resumes=self.parity.resumes)
        self.resume = self.blocks.resume
        self.pool = BlockPool(memory_bytes)
        self.prefixes = PrefixCache(self.pool, self.resume)
        self.retention = KvRetention(self.blocks, self.pool, catalog, config.block_tokens)
        self.limits = _limits(loaded, config, layout)
        self.scheduler = Scheduler(self.pool, self.limits, self._match)
        eos = sorted(loaded.tokenizer.eos_token_ids)
        self._eos = frozenset(eos)
        self.runner = ModelRunner(loaded.model, layout, eos, config.max_batch_size, self.parity.may_batch)
        self.template = ChatTemplate(loaded.tokenizer)
        self.checkpoints = CheckpointFinder(self.template)
        self.grammars = Grammars(loaded.tokenizer, self.template)
        self.sessions = SessionBook(self.template, catalog, config.block_tokens)
        self.background = BackgroundPrewarm(
            config.prewarm == "idle" and not self.resume.unsupported,
            self.template,
            self._branches,
            self._start_background,
            self.cancel,
        )
        self.reader = BlockReader(store) if store else None
        self.writer = BlockWriter(store) if store else None
        self._turns: dict[int, Turn] = {}
        self._next_id = 0
        self._roots: dict[str, BlockHash] = {}
        self._loads: queue.SimpleQueue[tuple[int, list[Record[Any]]]] = queue.SimpleQueue()
        self.on_load: Callable[[], None] = lambda: None

    # -- a turn's beginning -------------------------------------------------------------------------------

    def submit(
        self,
        request: ChatRequest,
        key: SessionKey,
        sink: OutputSink,
        *,
        prewarm: bool = False,
        arrived: float | None = None,
        background: Prompt | None = None,
    ) -> int:
        """Queue a turn and return its id. ``arrived`` is when the caller asked, by `time.perf_counter`.

        ``background`` is the prompt of background work, for which nobody waits; any other turn
        makes such work give way.

        Raises:
            InvalidRequest: the template cannot render it, its form cannot be held to, or it can never fit.
            StoreFull: its session could not be saved.
        """
        if background is None:
            self.background.give_way()
        root = self.root(key.namespace)
        session = self.sessions.open(root, (key.namespace, key.session_id)) if key.session_id else None
        branches = session.branches if session else []
        prompt = background or self.template.encode(
            request, [b.text for b in branches], generation_prompt=not prewarm
        )
        turn = self._turn(
            request, key, sink, session, prompt, prewarm=prewarm, is_background=background is not None
        )
        turn.arrived = arrived if arrived is not None else turn.arrived
        sequence = turn.sequence
        sequence.match = self._match(sequence)
        if turn.session is not None and self.store is not None:
            self.store.ensure_room(self._estimate(sequence))
        self.scheduler.add(sequence)
        self._next_id += 1
        self._turns[sequence.seq_id] = turn
        if turn.branch is not None:
            turn.branch.busy = True
        return sequence.seq_id

    def _turn(
        self,
        request: ChatRequest,
        key: SessionKey,
        sink: OutputSink,
        session: LiveSession | None,
        prompt: Prompt,
        *,
        prewarm: bool,
        is_background: bool,
    ) -> Turn:
        root, ids = self.root(key.namespace), list(prompt.token_ids)
        branches = session.branches if session else []
        nearest = max(branches, key=lambda b: common_prefix(b.token_ids, ids), default=None)
        known = common_prefix(nearest.token_ids, ids) if nearest else 0
        state = self._state(root, key, nearest, known)
        owned = session if not key.ephemeral else None
        turn = Turn(
            sequence=Sequence(
                seq_id=self._next_id,
                root=root,
                token_ids=ids,
                max_tokens=0 if prewarm else request.sampling.max_tokens,
                block_tokens=self.config.block_tokens,
                hashes=nearest.hashes[: known // self.config.block_tokens] if nearest else [],
                reads_tier=self.store is not None and session is not None,
                background=is_background,
            ),
            sink=sink,
            key=key,
            detokenizer=self._detokenizer(request, prompt),
            request=request,
            session=owned,
            branch=owned.continued_by(ids, key.lane) if owned else None,
            known=self._promised(known, state),
            state=state,
            arrived=time.perf_counter(),
            processors=[] if prewarm else self.grammars.processors(request, prompt),
        )
        if not (self.resume.at_any_token or self.resume.unsupported):
            turn.checkpoints = self.checkpoints.find(request, prompt)
            turn.sequence.checkpoints = () if self.resume.inside_block else turn.checkpoints
        return turn

    def _detokenizer(self, request: ChatRequest, prompt: Prompt) -> Detokenizer:
        tokenizer = self.loaded.tokenizer
        return Detokenizer(
            tokenizer,
            stop=request.sampling.stop,
            calls=parser_for(tokenizer, request),
            in_reasoning=starts_in_reasoning(tokenizer, prompt.text),
        )

    def root(self, namespace: str) -> BlockHash:
        """What the chains of a namespace start from; walls between namespaces begin here."""
        if namespace not in self._roots:
            identity = {
                "format": FORMAT,
                "model": self.loaded.fingerprint,
                "namespace": namespace,
                **self.blocks.identity(),
            }
            self._roots[namespace] = root_hash(identity)
            if self.store is not None:
                self.store.identify(self._roots[namespace], identity | {"name": self.loaded.name}, namespace)
        return self._roots[namespace]

    def _match(self, sequence: Sequence, without: Collection[BlockHash] = ()) -> Match:
        tier = self.store.catalog.records if self.store is not None and sequence.reads_tier else None
        return self.prefixes.match(sequence.root, sequence.token_ids, sequence.hashes, tier, without)

    def _estimate(self, sequence: Sequence) -> int:
        new_blocks = sequence.num_prompt // self.config.block_tokens + 1 - len(sequence.match.blocks)
        return new_blocks * self.blocks.block_bytes + (1 + len(sequence.checkpoints)) * self.blocks.tail_bytes

    def _state(
        self, root: BlockHash, key: SessionKey, nearest: Branch[TokenText] | None, shared: int
    ) -> MissReason:
        """Why this prompt may know less than it could."""
        if self.resume.unsupported:
            return "unsupported"
        if nearest is not None:
            if shared == len(nearest.token_ids):
                return "boundary" if self.retention.ends_in_token_tail(root, nearest) else ""
            return "template" if shared >= nearest.prompt_tokens else "diverged"
        if self.store is None or key.session_id is None:
            return "new"
        return _STATES[self.store.catalog.branches.session_state(root, key.namespace, key.session_id)]

    def _promised(self, known: int, state: MissReason) -> int:
        """How many of the tokens that a branch knows can be expected to be reused."""
        return 0 if state and not self.resume.at_any_token else known

    # -- a step -------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do one round of work; return whether there is more that can be done now."""
        self._take_loads()
        batch = self.scheduler.schedule()
        self.counters.steps += 1
        for sequence in batch.admitted:
            turn = self._turns[sequence.seq_id]
            turn.restore_started = time.perf_counter()
            self._load(turn)
        for sequence in batch.joining:
            self._join(self._turns[sequence.seq_id])
        for step in self.runner.decode():
            self._decoded(self._turns[step.slot.seq_id], step)
        if batch.chunk is not None:
            self._prefill(self._turns[batch.chunk.sequence.seq_id], batch.chunk)
        return self.scheduler.has_work() or (not self._turns and self.background.begin())

    def _branches(self, owner: Owner) -> ReadOnly[Branch[TokenText]]:
        return self.sessions.open(self.root(owner[0]), owner).branches

    def _start_background(self, request: ChatRequest, key: SessionKey, prompt: Prompt) -> int:
        return self.submit(request, key, DISCARD, prewarm=True, background=prompt)

    @property
    def busy(self) -> bool:
        """Whether any turn is in flight."""
        return bool(self._turns)

    def _load(self, turn: Turn) -> None:
        sequence = turn.sequence
        missing = [hit.key for hit in sequence.match.missing]
        if not missing:
            self._restore(turn)
            return
        assert self.reader is not None
        turn.tier = "warm"

        def done(loaded: list[Record[Any]]) -> None:
            self._loads.put((sequence.seq_id, loaded))
            self.on_load()

        self.reader.submit(sequence.root, missing, done)

    def _take_loads(self) -> None:
        while True:
            try:
                seq_id, loaded = self._loads.get_nowait()
            except queue.Empty:
                return
            turn = self._turns.get(seq_id)
            if turn is not None:
                self._loaded(turn, loaded)

    def _loaded(self, turn: Turn, loaded: list[Record[Any]]) -> None:
        sequence = turn.sequence
        found = {block.hash: block for block in (self._usable(sequence, x) for x in loaded) if block}
        lost = self.scheduler.loaded(sequence, found)
        if not lost:
            self._restore(turn)
            return
        turn.damaged = True
        # The first is known to be lost; those behind it were not even looked at.
        turn.lost.add(lost[0])
        self.scheduler.rematch(sequence, self._match(sequence, turn.lost))
        self._load(turn)

    def _usable(self, sequence: Sequence, loaded: Record[Any]) -> Block | None:
        """The block as the pool wants it, if its arrays are of the right form and its tokens are the prompt's."""
        tokens = self._tokens_of(sequence, loaded)
        if not self.blocks.fits(loaded.tensors, len(tokens), loaded.kind):
            return None
        return Block(loaded.key, loaded.parent, tokens, loaded.nbytes, loaded.tensors, loaded.kind)

    def _tokens_of(self, sequence: Sequence, loaded: Record[Any]) -> tuple[int, ...]:
        if loaded.key in sequence.hashes:
            # A catalog rebuilt from the files has lost the ids; the name alone proves them.
            start, stop = sequence.block_range(sequence.hashes.index(loaded.key))
            return tuple(sequence.token_ids[start:stop])
        return loaded.tokens

    def _restore(self, turn: Turn) -> None:
        sequence = turn.sequence
        if sequence.match.tokens and turn.tier == "none":
            turn.tier = "hot"
        room = min(sequence.remaining + 1, self.config.prefill_chunk)
        cache = self.blocks.restore(sequence.match, room)
        self.scheduler.restored(sequence)
        turn.slot = self.runner.slot(
            sequence.seq_id, turn.request.sampling, cache, sequence.num_cached, turn.processors
        )
        turn.restore_seconds = time.perf_counter() - turn.restore_started if sequence.num_cached else 0.0

    def _prefill(self, turn: Turn, chunk: Chunk) -> None:
        assert turn.slot is not None
        sequence = turn.sequence
        wants_token = chunk.is_last and sequence.max_tokens > 0
        logits = self.runner.prefill(
            turn.slot, sequence.token_ids[chunk.start : chunk.stop], logits=wants_token
        )
        self.scheduler.computed(chunk)
        if logits is not None:
            token = self.runner.sample(turn.slot, logits, sequence.token_ids)
            turn.first_token = time.perf_counter()
            self.scheduler.update(sequence, token)
            if self._emit(turn, token, turn.slot.logprobs) or sequence.max_tokens == 1:
                self._finish(
                    turn,
                    turn.slot.cache,
                    "stop" if turn.detokenizer.stopped or token in self._eos else "length",
                )
                return
        elif chunk.is_last:
            self._finish(turn, turn.slot.cache, "stop")
            return
        self._seal(turn, turn.slot.cache, chunk.stop)
        if chunk.stop in sequence.checkpoints:
            self.retention.checkpoint(turn, turn.slot.cache, chunk.stop)

    def _join(self, turn: Turn) -> None:
        assert turn.slot is not None
        self.runner.join(turn.slot, turn.sequence.token_ids, turn.sequence.max_tokens - 1)

    def _decoded(self, turn: Turn, step: Step) -> None:
        self.scheduler.update(turn.sequence, step.token)
        ended = self._emit(turn, step.token, step.logprobs)
        if self.retention.completes_window(turn):
            self.retention.take_window(turn, self.runner.peek(step.slot))
        if step.cache is not None:
            self._finish(turn, step.cache, "stop" if ended else "length")
        elif ended:
            self._finish(turn, self.runner.stop(step.slot), "stop")

    def _emit(self, turn: Turn, token: int, logprobs: ReadOnly[tuple[int, float]]) -> bool:
        """Hand a token's text out; return whether it ends the answer."""
        if token in self._eos:
            return True
        delta = turn.detokenizer.push(token)
        turn.tool_calls += len(delta.tool_calls)
        turn.reasoning_tokens += bool(delta.reasoning)
        turn.sampled(token, logprobs)
        if delta != _NOTHING:
            turn.sink.deliver(turn.with_tokens(delta))
        return turn.detokenizer.stopped

    # -- a turn's end -------------------------------------------------------------------------------------

    def _finish(self, turn: Turn, cache: list[Any], reason: FinishReason) -> None:
        sequence = turn.sequence
        completion = len(sequence.generated)
        last = turn.with_tokens(turn.detokenizer.finish())
        turn.tool_calls += len(last.tool_calls)
        if turn.tool_calls and reason == "stop":
            reason = "tool_calls"
        self._keep(turn)
        self._seal(turn, cache, sequence.num_computed)
        tail = self.retention.checkpoint(turn, cache, sequence.num_computed)
        report = turn.report(reason, completion, self.loaded.name)
        self.counters.add(report, background=sequence.background)
        self._commit(turn, tail, last, report)
        self._close(turn)

    def _keep(self, turn: Turn) -> None:
        """Cut the sequence to the tokens that have KV and stand for text that was handed out."""
        assert turn.slot is not None
        sequence, length = turn.sequence, turn.slot.fed
        if turn.detokenizer.stopped:
            length = min(length, sequence.num_prompt + turn.detokenizer.tokens_before_stop)
        self.scheduler.keep(sequence, length)

    def _seal(self, turn: Turn, cache: list[Any], length: int) -> None:
        sequence = turn.sequence
        first, last = sequence.num_sealed, length // self.config.block_tokens
        if first >= last or self.resume.unsupported:
            return
        fresh = self.retention.seal(turn, cache, first, last)
        self.counters.blocks_sealed += len(fresh)
        self.scheduler.sealed(
            sequence, last, fresh, persist=turn.session is not None and self.store is not None
        )

    def _commit(self, turn: Turn, tail: Block | None, last: Delta, report: TurnReport) -> None:
        session = turn.session
        if session is None or session.forgotten:
            turn.sink.deliver(dataclasses.replace(last, report=report))
            return
        branch = self._settle(turn, session, tail)
        self.background.ended(turn, branch)
        if self.writer is None:
            turn.sink.deliver(dataclasses.replace(last, report=report))
            return
        wanted = snapshot(session, turn.owner, branch)
        session.writing.append(branch)
        sink = turn.sink

        def done(row: BranchRow | None) -> None:
            if row is not None:
                branch.branch_id, branch.generation = row.branch_id, row.generation
            session.writing.remove(branch)
            sink.deliver(
                dataclasses.replace(
                    last,
                    report=dataclasses.replace(report, branch_id=branch.branch_id, persisted=row is not None),
                )
            )

        self.writer.submit(
            Save(
                tuple(self.retention.unsaved(turn, branch, tail)),
                lambda: dataclasses.replace(wanted, branch_id=branch.branch_id, generation=branch.generation),
                done,
            )
        )

    def _settle(self, turn: Turn, session: LiveSession, tail: Block | None) -> Branch[TokenText]:
        """Move the branch this turn continued, or add the one it began."""
        sequence = turn.sequence
        ids = tuple(sequence.token_ids[: sequence.num_computed])
        branch = turn.branch
        if branch is None:
            branch = Branch(ids, self.template.tokenizer.text_of(ids), 0, [], None)
            session.add(branch)
        else:
            branch.text = self._text(branch.text, ids)
        before = self.retention.exclusive_records(branch)
        branch.dependencies = self.retention.dependencies(turn)
        branch.token_ids = ids
        branch.prompt_tokens = min(sequence.num_prompt, len(ids))
        branch.hashes = list(sequence.hashes)
        branch.tail = tail.hash if tail is not None else None
        branch.lane = turn.key.lane
        branch.used = self.sessions.clock()
        session.is_thread = session.is_thread and turn.key.is_thread
        if before:
            self.pool.discard(before - self.sessions.needed())
        return branch

    def _text(self, known: TokenText, ids: tuple[int, ...]) -> TokenText:
        if ids[: len(known.token_ids)] == known.token_ids:
            return self.template.tokenizer.extend(known, ids[len(known.token_ids) :])
        return self.template.tokenizer.text_of(ids)

    def _close(self, turn: Turn) -> None:
        if turn.branch is not None:
            turn.branch.busy = False
        self.scheduler.retire(turn.sequence)
        self._turns.pop(turn.sequence.seq_id, None)

    # -- sessions -----------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Wait until every turn that has ended is on disk."""
        if self.writer is not None:
            self.writer.flush()

    def list_sessions(self, namespace: str | None) -> list[SessionInfo]:
        """The sessions on disk, or in memory where there is no disk."""
        self.flush()
        if self.store is not None:
            return self.store.catalog.branches.sessions(namespace)
        return [
            self._info(owner, s) for owner, s in self.sessions if namespace in (None, owner[0]) and s.branches
        ]

    def fork(self, old: Owner, new_session_id: str) -> None:
        """Give another session the branches of this one."""
        self.flush()
        if self.store is not None:
            self.store.catalog.branches.fork(*old, new_session_id)
            return
        source = self.sessions.open(self.root(old[0]), old)
        if not source.branches:
            raise SessionNotFound(f"there is no session {old[1]!r} in namespace {old[0]!r}.")
        target = self.sessions.open(self.root(old[0]), (old[0], new_session_id))
        if target.branches:
            raise InvalidRequest(f"session {new_session_id!r} exists already: choose another id.")
        target.branches = [
            dataclasses.replace(branch, hashes=list(branch.hashes), busy=False) for branch in source.branches
        ]

    def forget(self, owner: Owner) -> bool:
        """Delete a session from memory and disk."""
        self.background.forget(owner)
        self.flush()
        session = self.sessions.forget(owner)
        branches = session.branches if session is not None else []
        for branch in branches:
            self.pool.discard(self._keys(branch))
        on_disk = self.store.forget(*owner) if self.store is not None else False
        return on_disk or bool(branches)

    def stats(self) -> dict[str, Any]:
        """What was done and what is held, in plain numbers."""
        numbers: dict[str, Any] = dataclasses.asdict(self.counters)
        numbers["model"] = self.loaded.name
        numbers["waiting"], numbers["running"] = self.scheduler.waiting, len(self.scheduler.running)
        numbers["memory"] = {
            "budget_bytes": self.pool.budget,
            "block_bytes": self.pool.block_bytes,
            "reserved_bytes": self.pool.reserved,
            "blocks": len(self.pool),
            "evicted": self.pool.evicted,
        }
        if self.store is not None:
            numbers["store"] = self.store.stats()
            numbers["unsaved_turns"] = self.writer.failed if self.writer else 0
        return numbers

    def check_profile(self, profile: Profile) -> None:
        """Compare what a profile says of the model with the model.

        Raises:
            InvalidSetting: they differ.
        """
        profile.check(cache_spec(self.blocks.layout.groups, self.loaded.config))

    def _keys(self, branch: Branch[TokenText]) -> list[BlockHash]:
        return [*branch.hashes, *([branch.tail] if branch.tail is not None else []), *branch.dependencies]

    def _info(self, owner: Owner, session: LiveSession) -> SessionInfo:
        keys = {key for branch in session.branches for key in self._keys(branch)}
        held = [block for key in keys if (block := self.pool.get(key)) is not None]
        return SessionInfo(
            session_id=owner[1],
            namespace=owner[0],
            model=self.loaded.name,
            branches=len(session.branches),
            tokens=max(len(branch.token_ids) for branch in session.branches),
            nbytes=sum(block.nbytes for block in held),
            pinned=False,
            created=session.created,
            last_use=session.last_use,
            is_thread=session.is_thread,
        )

    # -- a turn cut short ---------------------------------------------------------------------------------

    def cancel(self, seq_id: int) -> bool:
        """Free a turn's place at once; say whether it was in flight.

        Its whole blocks stay findable in memory; its session is as it was.
        """
        turn = self._turns.get(seq_id)
        if turn is None:
            return False
        self.counters.cancelled += not turn.sequence.background
        if turn.slot is not None:
            cache = self.runner.stop(turn.slot)
            self.scheduler.keep(turn.sequence, max(turn.sequence.num_computed, turn.slot.fed))
            self._seal(turn, cache, turn.sequence.num_computed)
            if not self.resume.at_any_token:
                self.retention.checkpoint(turn, cache, turn.sequence.num_computed)
        self._close(turn)
        turn.sink.fail(Cancelled("the turn was cancelled before it ended; its session is as it was."))
        return True

    def fail_all(self, error: Exception) -> None:
        """Give every turn in flight the same error and start afresh; what is at rest stays."""
        self.runner.close()
        for turn in list(self._turns.values()):
            self.counters.failed += 1
            self._close(turn)
            turn.sink.fail(error)

    def close(self) -> None:
        """Write what is queued and let go of everything."""
        self.runner.close()
        if self.writer is not None:
            self.writer.close()
        if self.reader is not None:
            self.reader.close()
        if self.store is not None:
            self.store.close()

    def leave_thread(self) -> None:
        """Prepare the end of the thread that ran this engine: one that ran MLX and simply ends aborts the process."""
        mx.synchronize()
        mx.clear_streams()


def _limits(loaded: LoadedModel, config: EngineConfig, layout: KvLayout) -> Limits:
    live = layout.live_bytes
    return Limits(
        max_batch_size=config.max_batch_size,
        prefill_chunk=config.prefill_chunk,
        prefill_chunk_busy=config.prefill_chunk_busy,
        block_tokens=config.block_tokens,
        bytes_per_token=live.per_token,
        context_length=min(config.context_length or loaded.context_length, loaded.context_length),
        window=live.window,
        window_bytes=live.per_window_token,
        fixed_bytes=live.fixed,
    )


_NOTHING = Delta()
_STATES: dict[str, MissReason] = {
    "new": "new",
    "live": "new",
    "evicted": "evicted",
    "other_model": "model_changed",
}
