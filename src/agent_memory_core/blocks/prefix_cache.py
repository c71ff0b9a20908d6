"""How much of a prompt is stored, and where: the longest stored prefix, found by hash and verified by token ids.

The search goes block by block while a block with the prompt's own hash is in memory or in the tier. After the last one
it also looks at the blocks and tails that follow and begin as the rest of the prompt does: those that the caller can
name, and of all others the newest few, so that a search takes no longer where thousands of sessions begin alike. Every
place found so is a candidate; the match ends at the deepest candidate at which the model can be resumed, as its
`ResumePolicy` says. One prompt token is always left to evaluate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent_memory_core.blocks.block import (
    START_TOKENS,
    Block,
    BlockHash,
    RecordKind,
    common_prefix,
    record_hash,
    start_names,
)
from agent_memory_core.blocks.block_pool import BlockPool
from agent_memory_core.blocks.match import Hit, Match
from agent_memory_core.blocks.resume_policy import ResumePolicy

MIN_BLOCK_PART = 32
MIN_TAIL_PART = START_TOKENS
"""If fewer tokens than this of a block or tail can be used, they are computed rather than restored.

These limits are sizes and not measured speeds, so that the same tokens are reused from memory and from disk. The
limit of a block is larger because its KV is rounded: two prompts that only begin with the same few tokens should not
start from each other's rounding errors.
"""

MAX_SIBLINGS = 64
"""Of the records that follow the same block and begin alike, so many at most are looked at, the newest ones."""


class Stored(Protocol):
    """What a tier knows about one record it holds."""

    @property
    def key(self) -> BlockHash:
        """Its name."""
        ...

    @property
    def parent(self) -> BlockHash:
        """Name of the block it follows."""
        ...

    @property
    def tokens(self) -> tuple[int, ...]:
        """Its token ids; empty if the tier lost them."""
        ...

    @property
    def kind(self) -> RecordKind:
        """What it holds; see ``block.py``."""
        ...


class Tier(Protocol):
    """A place other than memory where records lie. A block is stored before, and dropped after, what follows it."""

    def known_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading hashes it holds."""
        ...

    def starting(self, starts: Sequence[BlockHash], most: int) -> Sequence[Stored]:
        """Records that have one of these starts, see `block.start_name`; at least the ``most`` newest of each."""
        ...

    def named(self, keys: Sequence[BlockHash]) -> Sequence[Stored]:
        """Those of the records with these names that it holds."""
        ...

    def stored(self, keys: Sequence[BlockHash]) -> Collection[BlockHash]:
        """Which of these it holds."""
        ...


@dataclass(frozen=True, slots=True)
class _Query:
    """What one match looks for, and where."""

    root: BlockHash
    token_ids: Sequence[int]
    hashes: Sequence[BlockHash]
    """Names of the prompt's full blocks, except one that would leave no token to evaluate."""
    tier: Tier | None
    without: Collection[BlockHash]
    """Names of records that turned out not to be there."""
    tails: Collection[BlockHash]
    """Names of tails that the prompt most likely continues."""

    def rest(self, count: int, block_tokens: int) -> tuple[int, ...]:
        """The tokens after ``count`` blocks that a block's or a tail's can be compared with; one is left out."""
        start = count * block_tokens
        return tuple(self.token_ids[start : min(start + block_tokens, len(self.token_ids) - 1)])

    def parent(self, count: int) -> BlockHash:
        """The name that the record after ``count`` blocks follows."""
        return self.hashes[count - 1] if count else self.root


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A place to resume at, as far as token ids tell: after ``count`` blocks and what is used of ``end``."""

    count: int
    end: Hit | None
    position: int
    """Tokens up to this place."""


class PrefixCache:
    """Finds stored prefixes in one pool and, where a request may read it, in one tier."""

    def __init__(self, pool: BlockPool, policy: ResumePolicy) -> None:
        self._pool = pool
        self._policy = policy
        self._block_tokens = policy.block_tokens

    def match(
        self,
        root: BlockHash,
        token_ids: Sequence[int],
        hashes: Sequence[BlockHash],
        tier: Tier | None,
        without: Collection[BlockHash] = (),
        tails: Collection[BlockHash] = (),
    ) -> Match:
        """Find the longest stored prefix of ``token_ids`` that leaves one of them to evaluate.

        Args:
            root: the root the chain starts from.
            token_ids: the prompt.
            hashes: names of the prompt's full blocks, see `block.chain`.
            tier: where to look besides memory; None means in memory only.
            without: names of records that turned out not to be there.
            tails: names of tails that it most likely continues: that of its branch, those of its checkpoints.
        """
        if self._policy.unsupported:
            return Match()
        hashes = hashes[: (len(token_ids) - 1) // self._block_tokens]
        query = _Query(root, token_ids, hashes, tier, without, tails)
        blocks = self._chain(query)
        candidates = list(self._candidates(query, len(blocks)))
        windows = self._windows(query, len(blocks), candidates)
        for candidate in sorted(candidates, key=lambda candidate: candidate.position, reverse=True):
            needed = self._windowed_blocks(query, candidate)
            if all(name in windows for name in needed):
                found = [windows[name] for name in needed]
                return Match(blocks[: candidate.count], candidate.end, found, self._policy.in_blocks)
        return Match()

    # -- whole blocks -------------------------------------------------------------------------------------

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

    # -- places to resume at ------------------------------------------------------------------------------

    def _candidates(self, query: _Query, count: int) -> Iterator[_Candidate]:
        """Places at which the model could be resumed, as far as the prompt's tokens and ``count`` blocks tell."""
        if not self._policy.at_any_token:
            # Otherwise the deepest place can always be resumed at, and no earlier tail is ever needed.
            for index, tail in self._tails(query, count):
                yield self._candidate(index, tail)
        if self._policy.inside_block:
            for partial in self._partials(query, count):
                yield self._candidate(count, partial)
        if self._policy.at_block_ends:
            for index in range(1, count + 1):
                yield self._candidate(index, None)

    def _candidate(self, count: int, end: Hit | None) -> _Candidate:
        return _Candidate(count, end, count * self._block_tokens + (end.take if end is not None else 0))

    def _partials(self, query: _Query, count: int) -> Iterator[Hit]:
        """The blocks and tails after ``count`` blocks that share enough tokens with what follows.

        They come in the order of their names, so that memory and disk choose the same one of two that share as much.
        """
        rest = query.rest(count, self._block_tokens)
        for key, (record, _, stored) in sorted(self._following(query, [count]).items()):
            if record.kind not in ("block", "tail") or key in query.without:
                continue
            shared = common_prefix(record.tokens, rest)
            least = MIN_TAIL_PART if record.kind == "tail" else MIN_BLOCK_PART
            if shared and (shared >= least or shared == len(record.tokens)):
                yield Hit(key, shared, self._pool.get(key), stored, record.kind)

    def _tails(self, query: _Query, count: int) -> Iterator[tuple[int, Hit]]:
        """The tails of which enough can be used, after each of up to ``count`` blocks, with the number of these."""
        for key, (record, index, stored) in sorted(self._following(query, range(count + 1)).items()):
            if record.kind != "tail":
                continue
            length = len(record.tokens)
            shared = common_prefix(record.tokens, query.rest(index, self._block_tokens)[:length])
            is_enough = shared == length or (self._policy.inside_block and shared >= MIN_TAIL_PART)
            is_proven = key == record_hash("tail", query.parent(index), record.tokens)
            if is_enough and is_proven and key not in query.without:
                yield index, Hit(key, shared, self._pool.get(key), stored, "tail")

    def _following(
        self, query: _Query, counts: Sequence[int]
    ) -> dict[BlockHash, tuple[Block | Stored, int, bool]]:
        """The records that directly follow so many blocks and begin as the prompt goes on, or that it was told of.

        Each comes with the number of blocks before it, and whether the tier holds it.
        """
        places = {query.parent(count): count for count in counts}
        starts = [
            name
            for parent, count in places.items()
            for name in start_names(parent, query.rest(count, self._block_tokens))
        ]
        rows: list[Stored] = []
        if query.tier is not None:
            rows = [*query.tier.starting(starts, MAX_SIBLINGS), *query.tier.named(list(query.tails))]
        found: dict[BlockHash, tuple[Block | Stored, int, bool]] = {
            row.key: (row, places[row.parent], True) for row in rows if row.parent in places
        }
        # Memory comes last, since it never loses the token ids of what it holds.
        named = [block for block in map(self._pool.get, query.tails) if block is not None]
        for block in (*self._pool.starting(starts, MAX_SIBLINGS), *named):
            if block.parent in places:
                found[block.hash] = (block, places[block.parent], block.hash in found)
        return found

    # -- window records -----------------------------------------------------------------------------------

    def _windowed_blocks(self, query: _Query, candidate: _Candidate) -> list[BlockHash]:
        """Names of the blocks whose window records a candidate needs. A tail needs none: it holds its own window."""
        needed = self._policy.window_blocks(candidate.position)
        names = [query.hashes[index] for index in needed if index < candidate.count]
        end = candidate.end
        if needed and end is not None and end.kind == "block":
            names.append(end.key)
        return names

    def _windows(self, query: _Query, count: int, candidates: Sequence[_Candidate]) -> dict[BlockHash, Hit]:
        """The window records at hand, by the names of their blocks."""
        if not self._policy.has_windows:
            return {}
        ends = [c.end.key for c in candidates if c.end is not None and c.end.kind == "block"]
        keys = {name: record_hash("window", name) for name in (*query.hashes[:count], *ends)}
        stored = query.tier.stored(list(keys.values())) if query.tier is not None else ()
        return {
            name: Hit(key, 0, self._pool.get(key), key in stored, "window")
            for name, key in keys.items()
            if key not in query.without and (key in self._pool or key in stored)
        }
