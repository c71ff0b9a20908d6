"""Token ids, and the names of the full blocks that they fill."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent_memory_core.blocks.block import BlockHash, block_hash, chain


@dataclass(slots=True, eq=False)
class TokenChain:
    """Token ids, and the names of their full blocks.

    Args:
        root: the name that the first block follows.
        token_ids: the tokens so far; more may be appended.
        block_tokens: tokens in a full block.
        hashes: names of the first blocks, if they are known already; the other names are computed.
    """

    root: BlockHash
    token_ids: list[int]
    block_tokens: int
    hashes: list[BlockHash] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.hashes = chain(self.root, self.token_ids, self.block_tokens, self.hashes)

    def append(self, token_id: int) -> None:
        """Add a generated token, and the name of the block if it completes one."""
        self.token_ids.append(token_id)
        start = len(self.hashes) * self.block_tokens
        if len(self.token_ids) == start + self.block_tokens:
            self.hashes.append(block_hash(self.parent_of(len(self.hashes)), self.token_ids[start:]))

    def keep(self, length: int) -> None:
        """Forget the tokens after the first ``length``, and the names of the blocks that they completed."""
        assert length <= len(self.token_ids)
        del self.token_ids[length:]
        del self.hashes[length // self.block_tokens :]

    def parent_of(self, index: int) -> BlockHash:
        """The name that block ``index`` of the chain follows."""
        return self.hashes[index - 1] if index else self.root

    def block_range(self, index: int) -> tuple[int, int]:
        """The token range of block ``index``."""
        return index * self.block_tokens, (index + 1) * self.block_tokens
