"""Where a sequence can be resumed, and which stored records that takes.

Every kind of layer contributes a `ResumeRequirement`: what its layers need in order to be resumed after a number of
tokens. A `ResumePolicy` puts the requirements of one model together: a place is good if all of them are met there.

Models that cannot be resumed after every token are given *checkpoints*: positions of a prompt at which a later prompt
is likely to differ from it. What it takes to resume there is kept; see ``engine/retention.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class ResumeRequirement(Protocol):
    """What the layers of one kind need in order to be resumed after a number of tokens."""

    @property
    def in_blocks(self) -> bool:
        """Whether block records hold something of these layers."""
        ...

    @property
    def at_block_ends(self) -> bool:
        """Whether they can be resumed at the end of a full block; if not, only where a tail ends."""
        ...

    def inside_block(self, block_tokens: int) -> bool:
        """Whether they can be resumed after only some of the tokens of a block or tail."""
        ...

    def window_start(self, position: int) -> int:
        """The first token whose window record is needed at ``position``; ``position`` itself if none is."""
        ...


@dataclass(frozen=True, slots=True)
class EveryToken:
    """Layers that keep every token, in block records: they can be resumed after any token of a block or tail."""

    @property
    def in_blocks(self) -> bool:
        """True."""
        return True

    @property
    def at_block_ends(self) -> bool:
        """True."""
        return True

    def inside_block(self, block_tokens: int) -> bool:
        """True."""
        return True

    def window_start(self, position: int) -> int:
        """No window record is needed."""
        return position


@dataclass(frozen=True, slots=True)
class LastTokens:
    """Layers that need the last tokens only, from window records."""

    tokens: int
    """How many tokens before a place are needed there."""

    @property
    def in_blocks(self) -> bool:
        """False."""
        return False

    @property
    def at_block_ends(self) -> bool:
        """True."""
        return True

    def inside_block(self, block_tokens: int) -> bool:
        """True if the window covers a block: a window record holds only what the window covers at its block's end."""
        return self.tokens == 0 or self.tokens >= block_tokens

    def window_start(self, position: int) -> int:
        """The first token of the window."""
        return max(0, position - self.tokens)


@dataclass(frozen=True, slots=True)
class WholeState:
    """Layers that need their whole state, which only a tail holds: they can be resumed exactly where one ends."""

    @property
    def in_blocks(self) -> bool:
        """False."""
        return False

    @property
    def at_block_ends(self) -> bool:
        """False."""
        return False

    def inside_block(self, block_tokens: int) -> bool:
        """False."""
        return False

    def window_start(self, position: int) -> int:
        """No window record is needed."""
        return position


@dataclass(frozen=True, slots=True)
class ResumePolicy:
    """Where one model can be resumed: where the requirements of all its layers are met."""

    block_tokens: int
    """Tokens in a full block."""
    requirements: tuple[ResumeRequirement, ...] = (EveryToken(),)
    """What each kind of its layers needs."""
    unsupported: bool = False
    """Some layer cannot be stored at all, so that the model can be resumed nowhere."""

    @property
    def in_blocks(self) -> bool:
        """Whether block records hold anything; if not, they only name their tokens and need not be loaded."""
        return any(requirement.in_blocks for requirement in self.requirements)

    @property
    def at_block_ends(self) -> bool:
        """Whether the end of a full block is a place to resume at, without a tail that ends there."""
        return not self.unsupported and all(r.at_block_ends for r in self.requirements)

    @property
    def inside_block(self) -> bool:
        """Whether only some tokens of a block or tail can be taken."""
        return not self.unsupported and all(r.inside_block(self.block_tokens) for r in self.requirements)

    @property
    def has_windows(self) -> bool:
        """Whether some layers need window records."""
        return any(r.window_start(self.block_tokens) < self.block_tokens for r in self.requirements)

    @property
    def needs_checkpoints(self) -> bool:
        """Whether a later prompt can only use what was kept of some places of a prompt."""
        return not self.at_any_token and not self.unsupported

    @property
    def stops_at_checkpoints(self) -> bool:
        """Whether a tail has to be taken at each checkpoint, when no token after it has been computed yet."""
        return self.needs_checkpoints and not self.inside_block

    @property
    def at_any_token(self) -> bool:
        """Whether blocks and tails alone decide, down to the token."""
        return self.at_block_ends and self.inside_block and not self.has_windows

    def window_blocks(self, position: int) -> range:
        """The blocks, full or not, whose window records are needed to resume after ``position`` tokens."""
        start = min((r.window_start(position) for r in self.requirements), default=position)
        if start >= position:
            return range(0)
        return range(start // self.block_tokens, -(-position // self.block_tokens))

    def windows_near(self, places: Iterable[int]) -> set[int]:
        """The blocks whose window records are needed to resume at any of these places."""
        return {index for place in places for index in self.window_blocks(place)}
