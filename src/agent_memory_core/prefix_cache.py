"""How much of a prompt is known, and where: the longest stored prefix, found by hash, verified by ids.

The walk goes block by block while a block of the prompt's own hash is in memory or in the tier. Past the last
full block it looks among the blocks and tails that follow, for the one that shares most leading tokens with
what is left: layers that keep every token can resume inside it. One prompt token is always left to evaluate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent_memory_core.block import Block, BlockHash, common_prefix
from agent_memory_core.block_pool import BlockPool

MIN_BLOCK_PART = 32
MIN_TAIL_PART = 8
"""A part of a block or of a tail smaller than this is computed rather than restored.

Rules of sizes and not of measured rates, so that memory and disk are reused alike to the token. A block's is
the larger one, since its KV is rounded: prompts that merely begin alike do not start on each other's rounding.
"""


class Stored(Protocol):
    """What a tier says of one block it holds."""

    @property
    def key(self) -> BlockHash:
        """Its name."""
        ...

    @property
    def tokens(self) -> tuple[int, ...]:
        """Its token ids; empty where the tier lost them."""
        ...

    @property
    def is_tail(self) -> bool:
        """Whether it is the unfinished end of a branch, kept unrounded."""
        ...


class Tier(Protocol):
    """Where blocks lie beside memory. Ancestors are stored before, and dropped after, their children."""

    def known_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading hashes it holds."""
        ...

    def children(self, parent: BlockHash) -> Sequence[Stored]:
        """The blocks and tails that directly follow ``parent``."""
        ...


@dataclass(slots=True)
class Hit:
    """One matched block or tail: in memory if ``block`` is set, else to be loaded from the tier.

    The first ``take`` of its tokens are wanted; ``stored`` says that the tier holds it too.
    """

    key: BlockHash
    take: int
    block: Block | None
    stored: bool


@dataclass(slots=True)
class Match:
    """The known prefix of one prompt: whole blocks in token order, then perhaps a part of one more."""

    blocks: list[Hit] = field(default_factory=list)
    end: Hit | None = None

    @property
    def hits(self) -> list[Hit]:
        """All hits in token order."""
        return self.blocks if self.end is None else [*self.blocks, self.end]

    @property
    def tokens(self) -> int:
        """How many prompt tokens are known."""
        return sum(hit.take for hit in self.hits)

    @property
    def stored_blocks(self) -> int:
        """How many leading whole blocks the tier holds."""
        return next((i for i, hit in enumerate(self.blocks) if not hit.stored), len(self.blocks))

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` hits only: what followed a hit that failed is of no use."""
        if count <= len(self.blocks):
            self.end = None
        del self.blocks[count:]


class PrefixCache:
    """Finds known prefixes in one pool and, where a request may read it, in one tier."""

    def __init__(self, pool: BlockPool, block_tokens: int) -> None:
        self._pool = pool
        self._block_tokens = block_tokens

    def match(
        self, root: BlockHash, token_ids: Sequence[int], hashes: Sequence[BlockHash], tier: Tier | None
    ) -> Match:
        """Find the longest known prefix of ``token_ids`` that leaves one of them to evaluate.

        Args:
            root: the root the chain starts from.
            token_ids: the prompt.
            hashes: names of the prompt's full blocks, see `block.chain`.
            tier: where to look beside memory; None looks in memory only.
        """
        usable = hashes[: (len(token_ids) - 1) // self._block_tokens]
        in_tier = tier.known_prefix(usable) if tier is not None else 0
        match = Match()
        for index, key in enumerate(usable):
            block = self._verified(key, token_ids, index)
            if block is None and index >= in_tier:
                break
            match.blocks.append(Hit(key, self._block_tokens, block, index < in_tier))
        parent = match.blocks[-1].key if match.blocks else root
        start = len(match.blocks) * self._block_tokens
        match.end = self._partial(parent, token_ids[start : len(token_ids) - 1], tier)
        return match

    def _verified(self, key: BlockHash, token_ids: Sequence[int], index: int) -> Block | None:
        block = self._pool.get(key)
        start = index * self._block_tokens
        if block is not None and block.tokens != tuple(token_ids[start : start + self._block_tokens]):
            return None
        return block

    def _partial(self, parent: BlockHash, rest: Sequence[int], tier: Tier | None) -> Hit | None:
        # Candidates are ordered by name, so that memory and disk settle a tie in the same way.
        rest = tuple(rest[: self._block_tokens])
        stored = {row.key: row for row in tier.children(parent)} if tier is not None else {}
        known: dict[BlockHash, Block | Stored] = {block.hash: block for block in self._pool.children(parent)}
        known |= stored
        best: Hit | None = None
        for key in sorted(known):
            shared = common_prefix(known[key].tokens, rest)
            least = MIN_TAIL_PART if known[key].is_tail else MIN_BLOCK_PART
            if shared < least and shared < len(known[key].tokens):
                continue
            if shared > (best.take if best else 0):
                best = Hit(key, shared, self._pool.get(key), key in stored)
        return best
