"""Where a sequence can be resumed, by what the layers of its model keep.

    append alone   at any token of a block or tail
    window too     where the window records of the last ``window`` tokens are stored as well; inside a block or tail
                   only if windows are no shorter than blocks, since a part holds the end of its block
    whole state    exactly at the end of a tail, which then holds the state
    neither        nowhere: some layer keeps what cannot be stored

Models of the last three kinds are given *checkpoints*: positions of a prompt at which a later prompt is likely to
differ from it. Its prefill stops there, and a tail is kept.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ResumePolicy:
    """What decides where a model can be resumed.

    Args:
        block_tokens: tokens in a full block.
        window: tokens that the longest window reaches back; 0 where every layer keeps all tokens or a whole state.
        whole: whether some layer can only be resumed where its whole state was kept.
        in_blocks: whether some layer keeps all tokens, so that blocks hold anything.
        unsupported: whether some layer cannot be stored at all.
    """

    block_tokens: int
    window: int = 0
    whole: bool = False
    in_blocks: bool = True
    unsupported: bool = False

    @property
    def at_any_token(self) -> bool:
        """Whether blocks and tails alone decide, down to the token."""
        return not (self.window or self.whole or self.unsupported)

    @property
    def inside_block(self) -> bool:
        """Whether a part of a block or tail can be taken."""
        return (
            not self.whole and not self.unsupported and (not self.window or self.window >= self.block_tokens)
        )

    def window_blocks(self, position: int) -> range:
        """The blocks, full or not, that hold the window before ``position``."""
        if not self.window:
            return range(0)
        return range(max(0, position - self.window) // self.block_tokens, -(-position // self.block_tokens))
