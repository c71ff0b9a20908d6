"""Branches of a session: what it remembers, and which of its memories a new turn continues.

A branch is a chain of blocks plus a tail, with the exact ids of its tokens. Three cases for a new prompt,
by the longest prefix it shares with a branch:

    extend   the branch is a prefix of the prompt                 the branch moves on
    rewind   they part at or after the branch's last prompt end   the branch moves on: a retry, or an answer
                                                                  that the template writes in another way
    fork     they part earlier, or the branch is busy             a new branch; the old one stays
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from agent_memory_core.blocks.block import BlockHash, common_prefix

Text = TypeVar("Text")


@dataclass(slots=True, eq=False)
class Branch(Generic[Text]):
    """One line of a session. ``text`` is the template's record of its ids and what they stand for; ``hashes``
    name its full blocks.

    ``branch_id`` and ``generation`` are what the catalog says; the writer alone sets them. ``prompt_tokens``
    is where the last answer begins. A ``busy`` branch has a turn in flight. ``dependencies`` are
    the records that it needs beside its blocks and its tail in order to be resumed.
    """

    token_ids: tuple[int, ...]
    text: Text
    prompt_tokens: int
    hashes: list[BlockHash]
    tail: BlockHash | None
    lane: str = ""
    branch_id: int | None = None
    generation: int = 0
    busy: bool = False
    used: int = 0
    dependencies: frozenset[BlockHash] = frozenset()

    def goes_on_with(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt extends or rewinds this branch, and may have it."""
        return not self.busy and common_prefix(self.token_ids, token_ids) >= self.prompt_tokens


@dataclass(slots=True, eq=False)
class Session(Generic[Text]):
    """The branches of one session in one engine, and how many it may keep."""

    branches: list[Branch[Text]] = field(default_factory=list)
    max_branches: int = 16

    def continued_by(self, token_ids: Sequence[int], lane: str) -> Branch[Text] | None:
        """The branch that a prompt continues: the longest common prefix decides, the lane breaks ties."""
        fitting = [b for b in self.branches if b.goes_on_with(token_ids)]
        return max(
            fitting,
            key=lambda b: (common_prefix(b.token_ids, token_ids), b.lane == lane, b.used),
            default=None,
        )

    def add(self, branch: Branch[Text]) -> None:
        """Add a branch; beyond the limit the least recently used one that is not busy is forgotten."""
        self.branches.append(branch)
        others = [b for b in self.branches if not b.busy and b is not branch]
        if len(self.branches) > self.max_branches and others:
            self.branches.remove(min(others, key=lambda b: b.used))
