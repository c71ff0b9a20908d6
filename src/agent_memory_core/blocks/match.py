"""What is stored of one prompt: the records that hold its longest stored prefix, in memory or not."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent_memory_core.blocks.block import Block, BlockHash, RecordKind


@dataclass(slots=True)
class Hit:
    """One matched record."""

    key: BlockHash
    """Its name."""
    take: int
    """How many of its tokens are used, from its first on; 0 for a window record."""
    block: Block | None
    """The record itself if it is in memory; if None, it has to be loaded from the tier."""
    stored: bool
    """Whether the tier holds it."""
    kind: RecordKind = "block"


@dataclass(slots=True)
class Match:
    """The stored prefix of one prompt."""

    blocks: list[Hit] = field(default_factory=list)
    """Whole blocks, in token order."""
    end: Hit | None = None
    """The record after the last whole block: a tail, or a block of which only some tokens are used."""
    windows: list[Hit] = field(default_factory=list)
    """Window records of the last blocks, in token order; that of ``end`` is the last of them if ``end`` is a block."""
    in_blocks: bool = True
    """Whether block records hold anything; if not, they need not be loaded."""

    @property
    def hits(self) -> list[Hit]:
        """All hits: first those with tokens, in their order, then the window records."""
        return [*self.blocks, *([self.end] if self.end is not None else []), *self.windows]

    @property
    def missing(self) -> list[Hit]:
        """What has to be loaded."""
        return [hit for hit in self.hits[0 if self.in_blocks else len(self.blocks) :] if hit.block is None]

    @property
    def tokens(self) -> int:
        """How many prompt tokens are stored."""
        return sum(hit.take for hit in self.blocks) + (self.end.take if self.end is not None else 0)
