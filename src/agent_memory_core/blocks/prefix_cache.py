"""How much of a prompt is known, and where: the longest stored prefix, found by hash, verified by ids.

The walk goes block by block while a block of the prompt's own hash is in memory or in the tier. Past the last
full block it looks among the blocks and tails that follow, for the one that shares most leading tokens with
what is left: layers that keep every token can resume inside it. Where other layers cannot, the match ends at the
deepest place that all of them can restore, see `resume`. One prompt token is always left to evaluate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent_memory_core.blocks.block import Block, BlockHash, RecordKind, common_prefix, record_hash
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.resume_policy import ResumePolicy

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
    def parent(self) -> BlockHash:
        """What it follows."""
        ...

    @property
    def tokens(self) -> tuple[int, ...]:
        """Its token ids; empty where the tier lost them."""
        ...

    @property
    def kind(self) -> RecordKind:
        """What it holds, see `block`."""
        ...


class Tier(Protocol):
    """Where blocks lie beside memory. Ancestors are stored before, and dropped after, their children."""

    def known_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading hashes it holds."""
        ...

    def children(self, parent: BlockHash) -> Sequence[Stored]:
        """The blocks and tails that directly follow ``parent``."""
        ...

    def tails(self, parents: Sequence[BlockHash]) -> Sequence[Stored]:
        """The tails that directly follow one of ``parents``."""
        ...

    def stored(self, keys: Sequence[BlockHash]) -> Collection[BlockHash]:
        """Which of these it holds."""
        ...


@dataclass(slots=True)
class Hit:
    """One matched record: in memory if ``block`` is set, else to be loaded from the tier.

    The first ``take`` of its tokens are wanted; ``stored`` says that the tier holds it too.
    """

    key: BlockHash
    take: int
    block: Block | None
    stored: bool
    kind: RecordKind = "block"


@dataclass(slots=True)
class Match:
    """The known prefix of one prompt: whole blocks in token order, then perhaps a part of one more.

    ``windows`` are the window records of the last blocks, in token order. ``in_blocks`` False says that the blocks
    hold nothing and need not be loaded.
    """

    blocks: list[Hit] = field(default_factory=list)
    end: Hit | None = None
    windows: list[Hit] = field(default_factory=list)
    in_blocks: bool = True

    @property
    def hits(self) -> list[Hit]:
        """All hits, those of tokens in their order and then those of windows."""
        return [*self.blocks, *([self.end] if self.end is not None else []), *self.windows]

    @property
    def missing(self) -> list[Hit]:
        """What has to be loaded."""
        return [hit for hit in self.hits[0 if self.in_blocks else len(self.blocks) :] if hit.block is None]

    @property
    def tokens(self) -> int:
        """How many prompt tokens are known."""
        return sum(hit.take for hit in self.blocks) + (self.end.take if self.end is not None else 0)


@dataclass(frozen=True, slots=True)
class _Query:
    """What one match looks for, and where; ``without`` names records that cannot be had."""

    root: BlockHash
    token_ids: Sequence[int]
    hashes: Sequence[BlockHash]
    tier: Tier | None
    without: Collection[BlockHash]


class PrefixCache:
    """Finds known prefixes in one pool and, where a request may read it, in one tier."""

    def __init__(self, pool: BlockPool, resume: ResumePolicy) -> None:
        self._pool = pool
        self._resume = resume
        self._block_tokens = resume.block_tokens

    def match(
        self,
        root: BlockHash,
        token_ids: Sequence[int],
        hashes: Sequence[BlockHash],
        tier: Tier | None,
        without: Collection[BlockHash] = (),
    ) -> Match:
        """Find the longest known prefix of ``token_ids`` that leaves one of them to evaluate.

        Args:
            root: the root the chain starts from.
            token_ids: the prompt.
            hashes: names of the prompt's full blocks, see `block.chain`.
            tier: where to look beside memory; None looks in memory only.
            without: names of records that turned out not to be there.
        """
        if self._resume.unsupported:
            return Match()
        query = _Query(root, token_ids, hashes[: (len(token_ids) - 1) // self._block_tokens], tier, without)
        blocks = self._chain(query)
        if self._resume.at_any_token:
            return Match(
                blocks, max(self._partials(query, len(blocks)), key=lambda hit: hit.take, default=None)
            )
        return self._deepest(query, blocks)

    def _chain(self, query: _Query) -> list[Hit]:
        in_tier = query.tier.known_prefix(query.hashes) if query.tier is not None else 0
        blocks: list[Hit] = []
        for index, key in enumerate(query.hashes):
            block = self._verified(key, query.token_ids, index)
            if key in query.without or (block is None and index >= in_tier):
                break
            blocks.append(Hit(key, self._block_tokens, block, index < in_tier))
        return blocks

    def _verified(self, key: BlockHash, token_ids: Sequence[int], index: int) -> Block | None:
        block = self._pool.get(key)
        start = index * self._block_tokens
        if block is not None and block.tokens != tuple(token_ids[start : start + self._block_tokens]):
            return None
        return block

    def _partials(self, query: _Query, count: int) -> Iterator[Hit]:
        """The blocks and tails behind ``count`` blocks that share enough tokens with what follows.

        They are ordered by name, so that memory and disk settle a tie in the same way.
        """
        parent, start = self._parent(query, count), count * self._block_tokens
        rest = tuple(query.token_ids[start : len(query.token_ids) - 1][: self._block_tokens])
        stored = {row.key: row for row in query.tier.children(parent)} if query.tier is not None else {}
        known: dict[BlockHash, Block | Stored] = {**stored}
        # Last, since memory never loses the words of what it holds.
        known |= {block.hash: block for block in self._pool.children(parent)}
        for key in sorted(known.keys() - set(query.without)):
            if known[key].kind not in ("block", "tail"):
                continue
            shared = common_prefix(known[key].tokens, rest)
            least = MIN_TAIL_PART if known[key].kind == "tail" else MIN_BLOCK_PART
            if shared and (shared >= least or shared == len(known[key].tokens)):
                yield Hit(key, shared, self._pool.get(key), key in stored, known[key].kind)

    def _parent(self, query: _Query, count: int) -> BlockHash:
        return query.hashes[count - 1] if count else query.root

    # -- models whose layers do not keep every token ------------------------------------------------------

    def _deepest(self, query: _Query, blocks: list[Hit]) -> Match:
        """The deepest place that every layer can restore."""
        ends = list(self._ends(query, len(blocks)))
        names = [*query.hashes[: len(blocks)], *(end.key for _, end in ends if end and end.kind == "block")]
        windows = self._windows(query, names)
        for count, end in sorted(ends, key=self._position, reverse=True):
            reached = self._resume.window_blocks(self._position((count, end)))
            needed = [query.hashes[index] for index in reached if index < count]
            if end is not None and end.kind == "block":
                needed.append(end.key)
            if all(name in windows for name in needed):
                parts = [windows[name] for name in needed]
                return Match(blocks[:count], end, parts, in_blocks=self._resume.in_blocks)
        return Match()

    def _position(self, place: tuple[int, Hit | None]) -> int:
        count, end = place
        return count * self._block_tokens + (end.take if end is not None else 0)

    def _ends(self, query: _Query, count: int) -> Iterator[tuple[int, Hit | None]]:
        """Places to resume at as far as tokens tell: how many blocks, and what of the record behind them."""
        yield from self._tails(query, count)
        if self._resume.inside_block:
            yield from ((count, partial) for partial in self._partials(query, count))
        if not self._resume.whole:
            yield from ((known, None) for known in range(1, count + 1))

    def _tails(self, query: _Query, count: int) -> Iterator[tuple[int, Hit | None]]:
        """Tails that the prompt goes on behind, after each of ``count`` blocks."""
        parents = [query.root, *query.hashes[:count]]
        found: dict[BlockHash, tuple[Stored | Block, int]] = {}
        stored: set[BlockHash] = set()
        places = {parent: index for index, parent in enumerate(parents)}
        for row in query.tier.tails(parents) if query.tier is not None else ():
            found[row.key] = row, places[row.parent]
            stored.add(row.key)
        for index, parent in enumerate(parents):
            for block in self._pool.children(parent):
                if block.kind == "tail":
                    found[block.hash] = block, index
        for key in sorted(found.keys() - set(query.without)):
            record, index = found[key]
            start, length = index * self._block_tokens, len(record.tokens)
            rest = query.token_ids[start : min(start + length, len(query.token_ids) - 1)]
            if record.tokens == tuple(rest) and key == record_hash("tail", parents[index], record.tokens):
                yield index, Hit(key, length, self._pool.get(key), key in stored, "tail")

    def _windows(self, query: _Query, names: Sequence[BlockHash]) -> dict[BlockHash, Hit]:
        """The window records at hand, by the names of their blocks."""
        if not self._resume.window:
            return {}
        keys = {name: record_hash("window", name) for name in names}
        stored = query.tier.stored(list(keys.values())) if query.tier is not None else ()
        return {
            name: Hit(key, 0, self._pool.get(key), key in stored, "window")
            for name, key in keys.items()
            if key not in query.without and (key in self._pool or key in stored)
        }
