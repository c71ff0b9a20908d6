"""One generation in flight, and the map of its tokens.

    token_ids   |<- num_cached ->|<- evaluated here ->|<- to evaluate ->|<- generated ->|
                0                num_cached           num_computed      num_prompt      len

The KV of tokens [0, num_computed) is in the live cache: ``num_cached`` of them were restored, the rest were
evaluated here. The last generated token gets its KV when the one after it is sampled. Blocks
[0, num_sealed) of the chain are at rest; those of them that the disk still lacks are in ``unsaved``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field

from agent_memory_core.blocks.block import Block, BlockHash, record_hash
from agent_memory_core.blocks.chain import TokenChain
from agent_memory_core.blocks.match import Match

SHORT_PROMPT = 512
"""Tokens of the longest prompt that counts as short."""


class Status(enum.Enum):
    """Where a sequence stands. It moves downwards only."""

    WAITING = enum.auto()
    LOADING = enum.auto()
    PREFILL = enum.auto()
    READY = enum.auto()
    DECODE = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence(TokenChain):
    """One generation in flight. Written by the scheduler alone.

    Args:
        root, token_ids, block_tokens, hashes: see `TokenChain`. The ids are the prompt; generated ones are appended.
    """

    seq_id: int
    """Unique in one engine, growing with arrival."""
    max_tokens: int
    """Most tokens to generate; 0 only fills the cache."""
    reads_tier: bool = False
    """Whether blocks on disk may be matched, besides those in memory."""
    background: bool = False
    """Whether nobody waits for it."""
    checkpoints: tuple[int, ...] = ()
    """Positions in the prompt at which later prompts may part from it, in ascending order."""
    stops_at_checkpoints: bool = True
    """Whether its prefill stops there, so that something of the live cache can be kept."""
    branch_tail: BlockHash | None = None
    """Name of the tail at which the branch ends that it continues."""
    num_prompt: int = field(init=False)
    """Tokens of the prompt."""
    num_cached: int = 0
    """Prompt tokens that were restored."""
    num_computed: int = 0
    """Tokens with KV in the live cache."""
    status: Status = Status.WAITING
    match: Match = field(default_factory=Match)
    """What is stored of the prompt, as far as is known by now."""
    matched_at: int = -1
    """How much had changed in memory when that was found, see `BlockPool.changes`."""
    num_sealed: int = 0
    """Leading blocks that are at rest."""
    unsaved: list[Block] = field(default_factory=list, repr=False)
    """Those of them that the disk lacks."""
    held: list[Block] = field(default_factory=list, repr=False)
    """Blocks that are kept from eviction for it."""
    reserved: int = 0
    """Bytes set aside for its live cache."""
    waited: int = 0
    """Steps since it was queued, or since its last chunk."""

    def __post_init__(self) -> None:
        TokenChain.__post_init__(self)
        self.num_prompt = len(self.token_ids)

    @property
    def remaining(self) -> int:
        """Prompt tokens still to evaluate; before admission, as far as is known."""
        return max(0, self.num_prompt - max(self.num_computed, self.match.tokens))

    @property
    def is_short(self) -> bool:
        """Whether its prompt may be evaluated together with others, for which their caches are copied twice."""
        return self.num_prompt <= SHORT_PROMPT

    @property
    def stops(self) -> tuple[int, ...]:
        """Positions at which its prefill stops."""
        return self.checkpoints if self.stops_at_checkpoints else ()

    def known_tails(self) -> list[BlockHash]:
        """Names of the tails that it most likely continues: its branch's, and those at its checkpoints."""
        tails = [self.tail_at(checkpoint) for checkpoint in self.checkpoints]
        return [self.branch_tail, *tails] if self.branch_tail is not None else tails

    def tail_at(self, position: int) -> BlockHash:
        """Name of the tail that ends after so many tokens."""
        full = position // self.block_tokens
        rest = self.token_ids[full * self.block_tokens : position]
        return record_hash("tail", self.parent_of(full), rest)

    @property
    def generated(self) -> ReadOnly[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt :]

    @property
    def capacity(self) -> int:
        """Most tokens its live cache can come to hold."""
        return self.num_prompt + self.max_tokens
