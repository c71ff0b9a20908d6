"""The sessions one engine is using: their branches with the exact tokens, in step with the catalog.

The catalog is the truth between processes. A branch whose last turn is still being written is newer here than
there; any other branch that differs from its row was moved, evicted or forgotten by somebody else.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from agent_memory_core.blocks.block import BlockHash, chain
from agent_memory_core.blocks.branch import Branch, Session
from agent_memory_core.storage.branches import BranchCommit, BranchRow
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.token_text import TokenText

Owner = tuple[str, str]
"""Namespace and session id."""


@dataclass(slots=True, eq=False)
class LiveSession(Session[TokenText]):
    """A session in use. ``writing`` holds the branches whose last turn is not yet committed.

    ``is_thread``: no turn of this process has named it otherwise than by a framework's thread id.
    """

    root: BlockHash = b""
    writing: list[Branch[TokenText]] = field(default_factory=list)
    forgotten: bool = False
    is_thread: bool = True
    created: float = field(default_factory=time.time)
    last_use: float = field(default_factory=time.time)

    @property
    def is_unused(self) -> bool:
        """Whether no turn is in flight or being written."""
        return not self.writing and not any(branch.busy for branch in self.branches)


class SessionBook:
    """Live sessions by owner. Where a catalog can bring them back, the least recently used ones are let go."""

    def __init__(
        self, template: ChatTemplate, catalog: Catalog | None, block_tokens: int, max_live: int = 256
    ) -> None:
        self._template = template
        self._block_tokens = block_tokens
        self._catalog = catalog
        self._max_live = max_live
        self._live: OrderedDict[Owner, LiveSession] = OrderedDict()
        self._turns = 0

    def __iter__(self) -> Iterator[tuple[Owner, LiveSession]]:
        return iter(list(self._live.items()))

    def open(self, root: BlockHash, owner: Owner) -> LiveSession:
        """Return a session as it stands now, empty if there is none."""
        session = self._live.setdefault(owner, LiveSession(root=root))
        self._live.move_to_end(owner)
        session.last_use = time.time()
        if self._catalog is not None:
            # Taken first: a turn that is committed while the rows are read is newer here than there.
            newer = [branch for branch in session.branches if branch in session.writing or branch.busy]
            self._refresh(session, self._catalog.branches.of_session(*owner, root), newer)
            self._let_go()
        return session

    def forget(self, owner: Owner) -> LiveSession | None:
        """Drop a session; a turn of it that is still in flight will not be committed."""
        session = self._live.pop(owner, None)
        if session is not None:
            session.forgotten = True
        return session

    def clock(self) -> int:
        """A number that grows with every call, to tell what was used last."""
        self._turns += 1
        return self._turns

    def _refresh(self, session: LiveSession, rows: list[BranchRow], newer: list[Branch[TokenText]]) -> None:
        known = {branch.branch_id: branch for branch in session.branches if branch.branch_id is not None}
        by_id = {row.branch_id: row for row in rows}
        session.branches = [
            branch for branch in session.branches if branch in newer or branch.branch_id in by_id
        ]
        for row in rows:
            branch = known.get(row.branch_id)
            if branch is None:
                session.branches.append(self._load(row))
            elif branch.generation != row.generation and branch not in newer:
                session.branches[session.branches.index(branch)] = self._load(row)

    def _load(self, row: BranchRow) -> Branch[TokenText]:
        assert self._catalog is not None
        token_ids = self._catalog.branches.tokens(row)
        return Branch(
            token_ids=token_ids,
            text=self._template.tokenizer.text_of(token_ids),
            prompt_tokens=min(row.prompt_tokens, len(token_ids)),
            hashes=chain(row.root, token_ids, self._block_tokens),
            tail=row.tail,
            lane=row.lane,
            branch_id=row.branch_id,
            generation=row.generation,
            dependencies=frozenset(self._catalog.branches.dependencies(row.branch_id)),
        )

    def needed(self) -> set[BlockHash]:
        """The dependencies and tails that some branch in use needs."""
        branches = [branch for session in self._live.values() for branch in session.branches]
        tails = {branch.tail for branch in branches if branch.tail is not None}
        return tails.union(*(branch.dependencies for branch in branches))

    def _let_go(self) -> None:
        for owner, session in list(self._live.items())[: max(0, len(self._live) - self._max_live)]:
            if session.is_unused:
                del self._live[owner]


def snapshot(session: LiveSession, owner: Owner, branch: Branch[TokenText]) -> BranchCommit:
    """What the catalog should hold of a branch as it stands now.

    Its id and generation are filled in by the writer, when the turns before have been committed.
    """
    namespace, session_id = owner
    return BranchCommit(
        root=session.root,
        namespace=namespace,
        session_id=session_id,
        branch_id=None,
        generation=0,
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
