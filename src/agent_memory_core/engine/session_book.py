"""The sessions one engine is using: their branches with the exact tokens.

There are two books. Without a disk the book itself is all that is known of a session. With one, the catalog is the
truth between processes, and the book is brought in step with it whenever a session is opened: a branch with a turn
in flight or on its way to the disk is newer here than there; any other branch that differs from its row was moved,
evicted or forgotten by somebody else.

The engine's thread alone reads and writes a book.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from agent_memory_core.blocks.block import BlockHash, chain
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.branch import Branch, Session
from agent_memory_core.engine.block_io import BranchPosition
from agent_memory_core.errors import InvalidRequest, SessionNotFound
from agent_memory_core.messages import MissReason, SessionInfo
from agent_memory_core.storage.branches import BranchCommit, Branches, BranchRow
from agent_memory_core.text.token_text import ExactTokenizer, TokenText

Owner = tuple[str, str]
"""Namespace and session id."""

MAX_LIVE = 256
"""Sessions that a book with a catalog holds at once; the least recently used ones are let go and read again."""

_HINTS: dict[str, MissReason] = {
    "new": "new",
    "live": "new",
    "evicted": "evicted",
    "other_model": "model_changed",
}


@dataclass(frozen=True, slots=True, eq=False)
class PendingCommit:
    """A branch on its way to the disk, as one turn left it."""

    branch: Branch[TokenText]
    commit: BranchCommit
    """What the catalog will say of it."""
    position: Future[BranchPosition]
    """Its row id and generation once the writer came to it."""


@dataclass(slots=True, eq=False)
class LiveSession(Session[TokenText]):
    """A session in use."""

    root: BlockHash = b""
    """What the chains of its namespace start from."""
    pending: list[PendingCommit] = field(default_factory=list)
    """Commits that the writer has not answered yet, oldest first."""
    forgotten: bool = False
    """Whether it was forgotten while a turn was in flight; such a turn is not committed."""
    is_thread: bool = True
    """Whether every turn so far named it by a framework's thread id."""
    created: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    last_use: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def is_unused(self) -> bool:
        """Whether no turn is in flight or being written."""
        return not self.pending and not any(branch.busy for branch in self.branches)

    def last_pending(self, branch: Branch[TokenText]) -> Future[BranchPosition] | None:
        """What the next commit of a branch waits for, if one of its commits is still on its way."""
        return next((p.position for p in reversed(self.pending) if p.branch is branch), None)


class SessionBook(ABC):
    """The live sessions of one engine, by owner."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._live: OrderedDict[Owner, LiveSession] = OrderedDict()
        self._turns = 0

    @abstractmethod
    def open(self, root: BlockHash, owner: Owner) -> LiveSession:
        """Return a session as it stands now, empty if there is none."""

    @abstractmethod
    def miss_hint(self, root: BlockHash, owner: Owner) -> MissReason:
        """Why nothing is known of a session that has no branch."""

    def __iter__(self) -> Iterator[tuple[Owner, LiveSession]]:
        return iter(list(self._live.items()))

    def forget(self, owner: Owner) -> bool:
        """Drop a session and its records in memory, and say whether it had a branch.

        A turn of it that is still in flight will not be committed.
        """
        session = self._live.pop(owner, None)
        if session is None:
            return False
        session.forgotten = True
        for branch in session.branches:
            self._pool.discard(_records(branch))
        return bool(session.branches)

    def fork(self, root: BlockHash, owner: Owner, new_session_id: str) -> None:
        """Give a new session the branches of another one.

        Raises:
            SessionNotFound: there is no such session.
            InvalidRequest: the new id is taken.
        """
        namespace, session_id = owner
        source = self.open(root, owner)
        if not source.branches:
            raise SessionNotFound(f"there is no session {session_id!r} in namespace {namespace!r}.")
        target = self.open(root, (namespace, new_session_id))
        if target.branches:
            raise InvalidRequest(f"session {new_session_id!r} exists already: choose another id.")
        target.branches = [
            dataclasses.replace(branch, hashes=list(branch.hashes), busy=False) for branch in source.branches
        ]

    def infos(self, namespace: str | None, model: str) -> list[SessionInfo]:
        """The live sessions of a namespace, or of all; their bytes are those in memory."""
        return [
            self._info(owner, session, model)
            for owner, session in self._live.items()
            if namespace in (None, owner[0]) and session.branches
        ]

    def exclusive(self, owner: Owner) -> set[BlockHash]:
        """The records of a live session that no other live session needs."""
        session = self._live.get(owner)
        if session is None:
            return set()
        others = (other for name, other in self._live.items() if name != owner)
        return _all_records(session).difference(*map(_all_records, others))

    def in_use(self) -> set[Owner]:
        """The sessions of which a turn is in flight or being written."""
        return {owner for owner, session in self._live.items() if not session.is_unused}

    def clock(self) -> int:
        """A number that grows with every call, to tell which branch was used last."""
        self._turns += 1
        return self._turns

    def needed(self) -> set[BlockHash]:
        """The dependencies and tails of all live branches."""
        branches = [branch for session in self._live.values() for branch in session.branches]
        tails = {branch.tail for branch in branches if branch.tail is not None}
        return tails.union(*(branch.dependencies for branch in branches))

    def _touch(self, root: BlockHash, owner: Owner) -> LiveSession:
        session = self._live.setdefault(owner, LiveSession(root=root))
        self._live.move_to_end(owner)
        session.last_use = time.time()
        return session

    def _info(self, owner: Owner, session: LiveSession, model: str) -> SessionInfo:
        keys = {key for branch in session.branches for key in _records(branch)}
        held = [block for key in keys if (block := self._pool.get(key)) is not None]
        return SessionInfo(
            session_id=owner[1],
            namespace=owner[0],
            model=model,
            branches=len(session.branches),
            tokens=max(len(branch.token_ids) for branch in session.branches),
            nbytes=sum(block.nbytes for block in held),
            pinned=False,
            created=session.created,
            last_use=session.last_use,
            is_thread=session.is_thread,
        )


class MemorySessionBook(SessionBook):
    """Sessions that live as long as the engine."""

    def open(self, root: BlockHash, owner: Owner) -> LiveSession:
        """Return a session as it stands now, empty if there is none."""
        return self._touch(root, owner)

    def miss_hint(self, root: BlockHash, owner: Owner) -> MissReason:
        """Always "new": what is not in the book never was."""
        return "new"


class CatalogSessionBook(SessionBook):
    """Sessions that are in a catalog too, which other processes read and write."""

    def __init__(
        self,
        pool: BlockPool,
        catalog: Branches,
        tokenizer: ExactTokenizer,
        block_tokens: int,
        max_live: int = MAX_LIVE,
    ) -> None:
        super().__init__(pool)
        self._catalog = catalog
        self._tokenizer = tokenizer
        self._block_tokens = block_tokens
        self._max_live = max_live

    def open(self, root: BlockHash, owner: Owner) -> LiveSession:
        """Return a session in step with the catalog, empty if there is none."""
        session = self._touch(root, owner)
        self._refresh(session, self._catalog.of_session(*owner, root))
        self._let_go()
        return session

    def miss_hint(self, root: BlockHash, owner: Owner) -> MissReason:
        """What the catalog remembers of a session without a branch."""
        return _HINTS[self._catalog.session_state(root, *owner)]

    def _refresh(self, session: LiveSession, rows: list[BranchRow]) -> None:
        writing = [pending.branch for pending in session.pending]
        newer = [branch for branch in session.branches if branch.busy or branch in writing]
        known = {branch.branch_id: branch for branch in session.branches if branch.branch_id is not None}
        by_id = {row.branch_id: row for row in rows}
        session.branches = [
            branch for branch in session.branches if branch in newer or branch.branch_id in by_id
        ]
        for row in rows:
            branch = known.get(row.branch_id)
            if branch is None:
                if not _is_pending(session, row):
                    session.branches.append(self._load(row))
            elif branch.generation != row.generation and branch not in newer:
                session.branches[session.branches.index(branch)] = self._load(row)

    def _load(self, row: BranchRow) -> Branch[TokenText]:
        token_ids = self._catalog.tokens(row)
        return Branch(
            token_ids=token_ids,
            text=self._tokenizer.text_of(token_ids),
            prompt_tokens=min(row.prompt_tokens, len(token_ids)),
            hashes=chain(row.root, token_ids, self._block_tokens),
            tail=row.tail,
            lane=row.lane,
            branch_id=row.branch_id,
            generation=row.generation,
            dependencies=frozenset(self._catalog.dependencies(row.branch_id)),
        )

    def _let_go(self) -> None:
        unused = (owner for owner, session in list(self._live.items()) if session.is_unused)
        for owner in itertools.islice(unused, max(0, len(self._live) - self._max_live)):
            del self._live[owner]


def _is_pending(session: LiveSession, row: BranchRow) -> bool:
    """Whether a row is what one of the session's own commits made, of which the engine has not been told yet."""
    made = (row.head, row.tail, row.tokens)
    return any((p.commit.head, p.commit.tail, p.commit.tokens) == made for p in session.pending)


def _all_records(session: LiveSession) -> set[BlockHash]:
    return {key for branch in session.branches for key in _records(branch)}


def _records(branch: Branch[TokenText]) -> list[BlockHash]:
    return [*branch.hashes, *([branch.tail] if branch.tail is not None else []), *branch.dependencies]
