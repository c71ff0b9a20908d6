"""What the engine's helpers tell it: threads put these values into its queue, and its own thread takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from agent_memory_core.errors import AgentMemoryError
from agent_memory_core.storage.branches import BranchRow
from agent_memory_core.storage.record import Record
from agent_memory_core.text.token_text import Prompt


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of a `Save`."""

    seq_id: int
    row: BranchRow | None
    """The branch as it is in the catalog; None if the turn could not be saved."""
    reason: str = ""
    """Why it could not, or is not as safe as it is to be."""
    is_final: bool = True
    """Whether that is the end of it; else the turn need not wait for the end, which is told by another one."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Records that were read for a turn."""

    seq_id: int
    blocks: list[Record[Any]]
    """In the order that they were asked for, after those that were told before."""
    is_last: bool = True
    """Whether no more come: these were the last, or the next one cannot be had."""


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A request as the model reads it."""

    prompt: Prompt
    checkpoints: tuple[int, ...] = ()
    """The positions at which other prompts are likely to differ from it, where they are needed."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What became of a long request."""

    seq_id: int
    """Its turn."""
    result: PreparedPrompt | AgentMemoryError | None
    """None: the engine's thread has to do it."""


Result = Loaded | Saved | Prepared


class Results(Protocol):
    """The queue that takes what was done to the engine's thread."""

    def put(self, item: Result, /) -> None:
        """Add a result."""
        ...
