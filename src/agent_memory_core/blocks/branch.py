"""Branches of a session: what it remembers, and which of them a new turn continues.

A branch is a chain of blocks plus a tail, with the exact ids of its tokens. How much of it a new prompt shares decides:

    extend   all of it                                        the branch becomes longer
    rewind   at least its last prompt, but not all of the     the branch gets the new tokens: the turn is a retry, or
             answer                                           the template writes the answer in another way
    fork     less, or the branch is busy                      a new branch begins, and the old one stays
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from agent_memory_core.blocks.block import BlockHash, common_prefix

Text = TypeVar("Text")


@dataclass(slots=True, eq=False)
class Branch(Generic[Text]):
    """One branch of a session."""

    token_ids: tuple[int, ...]
    text: Text
    """The template's record of the token ids and of the text that they stand for."""
    prompt_tokens: int
    """Where the last answer begins."""
    hashes: list[BlockHash]
    """Names of its full blocks."""
    tail: BlockHash | None
    lane: str = ""
    branch_id: int | None = None
    """Its id in the catalog; None while it is not stored."""
    generation: int = 0
    """How often it was written, as the catalog counts."""
    busy: bool = False
    """Whether a turn of it is in flight."""
    used: int = 0
    """When it was last used, by the session's clock."""
    dependencies: frozenset[BlockHash] = frozenset()
    """The records that it needs in order to be resumed, besides its blocks and its tail."""

    def goes_on_with(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt extends or rewinds this branch, and the branch is free."""
        return not self.busy and common_prefix(self.token_ids, token_ids) >= self.prompt_tokens


@dataclass(slots=True, eq=False)
class Session(Generic[Text]):
    """The branches of one session in one engine, and how many of them it may keep."""

    branches: list[Branch[Text]] = field(default_factory=list)
    max_branches: int = 16

    def continued_by(self, token_ids: Sequence[int], lane: str) -> Branch[Text] | None:
        """The branch that a prompt continues: the one that shares most tokens; between equals the lane decides."""
        fitting = [b for b in self.branches if b.goes_on_with(token_ids)]
        return max(
            fitting,
            key=lambda b: (common_prefix(b.token_ids, token_ids), b.lane == lane, b.used),
            default=None,
        )

    def add(self, branch: Branch[Text]) -> None:
        """Add a branch; if there are too many, forget the least recently used one that is not busy."""
        self.branches.append(branch)
        others = [b for b in self.branches if not b.busy and b is not branch]
        if len(self.branches) > self.max_branches and others:
            self.branches.remove(min(others, key=lambda b: b.used))
