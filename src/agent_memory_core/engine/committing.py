"""What outlasts a turn: its branch in the session book, its records and its branch on disk.

A turn that has ended is settled at once: its branch in the book is as the turn left it. Then its commit goes to the
writer, and the reader's last delta waits for the outcome, which comes back as a `Saved`. What the catalog says of a
branch (its id and generation) is written into the book here, on the engine's thread, and nowhere else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from agent_memory_core.blocks.block import Block
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.branch import Branch
from agent_memory_core.engine.block_io import Save
from agent_memory_core.engine.persistence import Persistence
from agent_memory_core.engine.results import Saved
from agent_memory_core.engine.retention import KvRetention
from agent_memory_core.engine.session_book import LiveSession, PendingCommit, SessionBook
from agent_memory_core.engine.turn import Turn
from agent_memory_core.messages import TurnReport
from agent_memory_core.storage.branches import BranchCommit, SessionOwner
from agent_memory_core.text.token_text import ExactTokenizer, TokenText

KEEP_EVERY = 1024
"""Prompt tokens after which what was computed is written, though the turn has not ended."""

KEEP_STATE_EVERY = 8192
"""The same where a state has to be written too, which may be as large as the keys and values of thousands of tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """A turn with nothing left to do but to hand out its last delta."""

    turn: Turn
    report: TurnReport
    is_saved: bool
    """Whether the turn's commit was tried."""


@dataclass(frozen=True, slots=True, eq=False)
class _Unanswered:
    """A turn whose commit is on its way."""

    turn: Turn
    session: LiveSession
    pending: PendingCommit
    report: TurnReport
    is_told: bool = False
    """Whether the turn was ended without waiting for it."""


class Committing:
    """Settles and saves the ended turns of one engine."""

    def __init__(
        self,
        disk: Persistence,
        sessions: SessionBook,
        retention: KvRetention,
        pool: BlockPool,
        tokenizer: ExactTokenizer,
    ) -> None:
        self._disk = disk
        self._sessions = sessions
        self._retention = retention
        self._pool = pool
        self._tokenizer = tokenizer
        self._unanswered: dict[int, _Unanswered] = {}

    def settle(self, turn: Turn, tail: Block | None) -> Branch[TokenText] | None:
        """Move the branch that a turn continued, or add the one it began; None if the turn owns nothing."""
        session = turn.session
        if session is None or session.forgotten:
            return None
        sequence = turn.sequence
        ids = tuple(sequence.token_ids[: sequence.num_computed])
        branch = turn.branch
        if branch is None:
            branch = Branch(ids, self._tokenizer.text_of(ids), 0, [], None)
            session.add(branch)
        else:
            branch.text = self._text(branch.text, ids)
        before = self._retention.exclusive_records(branch)
        branch.dependencies = self._retention.dependencies(turn)
        branch.token_ids = ids
        branch.prompt_tokens = min(sequence.num_prompt, len(ids))
        branch.hashes = list(sequence.hashes)
        branch.tail = tail.hash if tail is not None else None
        branch.lane = turn.key.lane
        branch.used = self._sessions.clock()
        session.is_thread = session.is_thread and turn.key.is_thread
        if before:
            self._pool.discard(before - self._sessions.needed())
        return branch

    def commit(
        self,
        turn: Turn,
        branch: Branch[TokenText] | None,
        tail: Block | None,
        report: TurnReport,
    ) -> Ended | None:
        """Save a settled turn; None says that it ends when the writer has answered."""
        session = turn.session
        if session is None or branch is None:
            return Ended(turn, report, is_saved=False)
        save = Save(
            seq_id=turn.seq_id,
            blocks=tuple(self._retention.unsaved(turn, branch, tail)),
            commit=to_commit(turn, session, branch),
            after=session.last_pending(branch),
        )
        saved = self._disk.save(save)
        # Noted after it was handed over, because nothing would ever answer a save that could not be. Answers are
        # taken on this thread, so none comes before this.
        pending = PendingCommit(branch, save.commit, save.position)
        session.pending.append(pending)
        self._unanswered[turn.seq_id] = _Unanswered(turn, session, pending, report)
        return self.saved(saved) if saved is not None else None

    def is_due(self, turn: Turn) -> bool:
        """Whether so much of a prompt was computed that it is worth writing before the turn has ended."""
        sequence = turn.sequence
        since = sequence.num_computed - max(turn.kept_tokens, sequence.num_cached)
        return self._keeps(turn) and since >= (
            KEEP_STATE_EVERY if sequence.stops_at_checkpoints else KEEP_EVERY
        )

    def _keeps(self, turn: Turn) -> bool:
        return turn.session is not None and not turn.session.forgotten and self._disk.keeps_turns

    def keep(self, turn: Turn, tail: Block | None) -> None:
        """Write what was computed of a prompt, so that a retry goes on there though the turn never ends.

        ``tail`` is what it takes, besides blocks and what was retained of them, to be resumed there.
        """
        if not self._keeps(turn):
            return
        assert turn.session is not None
        blocks = {block.hash: block for block in (*turn.sequence.unsaved, *turn.retained.values())}
        if tail is not None and tail.kind == "tail":
            blocks[tail.hash] = tail
        turn.kept_tokens = turn.sequence.num_computed
        new = [block for name, block in blocks.items() if name not in turn.kept]
        turn.kept |= blocks.keys()
        if new:
            self._disk.keep(to_owner(turn, turn.session), new)

    def saved(self, result: Saved) -> Ended | None:
        """The writer has answered: note what the catalog says of the branch now. None: the turn has ended already."""
        waiting = self._unanswered.pop(result.seq_id, None)
        if waiting is None or (waiting.is_told and not result.is_final):
            return None
        branch, row = waiting.pending.branch, result.row
        if result.is_final:
            waiting.session.pending.remove(waiting.pending)
        else:
            self._unanswered[result.seq_id] = dataclasses.replace(waiting, is_told=True)
        if row is not None:
            branch.branch_id, branch.generation = row.branch_id, row.generation
        if waiting.is_told:
            return None
        report = dataclasses.replace(
            waiting.report,
            branch_id=branch.branch_id,
            persisted=row is not None and not result.reason,
            save_error=result.reason,
        )
        return Ended(waiting.turn, report, is_saved=self._disk.keeps_turns)

    def _text(self, known: TokenText, ids: tuple[int, ...]) -> TokenText:
        if ids[: len(known.token_ids)] == known.token_ids:
            return self._tokenizer.extend(known, ids[len(known.token_ids) :])
        return self._tokenizer.text_of(ids)


def to_owner(turn: Turn, session: LiveSession) -> SessionOwner:
    """Whose records a turn's are, as the catalog has it."""
    namespace, session_id = turn.owner
    return SessionOwner(
        root=session.root, namespace=namespace, session_id=session_id, is_thread=session.is_thread
    )


def to_commit(turn: Turn, session: LiveSession, branch: Branch[TokenText]) -> BranchCommit:
    """What the catalog should say of a branch as it stands now."""
    namespace, session_id = turn.owner
    return BranchCommit(
        root=session.root,
        namespace=namespace,
        session_id=session_id,
        branch_id=branch.branch_id,
        generation=branch.generation,
        head=branch.hashes[-1] if branch.hashes else session.root,
        tail=branch.tail,
        tokens=len(branch.token_ids),
        prompt_tokens=branch.prompt_tokens,
        lane=branch.lane,
        max_branches=session.max_branches,
        token_ids=branch.token_ids,
        dependencies=tuple(branch.dependencies),
        is_thread=session.is_thread,
    )
