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

from agent_memory_core.blocks.block import Block
from agent_memory_core.blocks.chain import TokenChain
from agent_memory_core.blocks.prefix_cache import Match


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
        seq_id: unique in one engine, growing with arrival.
        max_tokens: most tokens to generate; 0 only fills the cache.
        reads_tier: whether blocks on disk may be matched, beside those in memory.
        background: whether nobody waits for it.
        checkpoints: positions in the prompt at which its prefill stops, for something to be kept there; sorted.
    """

    seq_id: int
    max_tokens: int
    reads_tier: bool = False
    background: bool = False
    checkpoints: tuple[int, ...] = ()
    num_prompt: int = field(init=False)
    num_cached: int = 0
    num_computed: int = 0
    status: Status = Status.WAITING
    match: Match = field(default_factory=Match)
    num_sealed: int = 0
    unsaved: list[Block] = field(default_factory=list, repr=False)
    held: list[Block] = field(default_factory=list, repr=False)
    reserved: int = 0
    waited: int = 0

    def __post_init__(self) -> None:
        TokenChain.__post_init__(self)
        self.num_prompt = len(self.token_ids)

    @property
    def remaining(self) -> int:
        """Prompt tokens still to evaluate; before admission, as far as is known."""
        return max(0, self.num_prompt - max(self.num_computed, self.match.tokens))

    @property
    def generated(self) -> ReadOnly[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt :]

    @property
    def capacity(self) -> int:
        """Most tokens its live cache can come to hold."""
        return self.num_prompt + self.max_tokens
