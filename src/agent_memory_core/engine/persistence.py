"""Where turns outlast their engine: on a disk, or nowhere. Which of the two is chosen once, when an engine is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from agent_memory_core.blocks.block import Block, BlockHash
from agent_memory_core.blocks.prefix_cache import Tier
from agent_memory_core.engine.block_io import BlockWriter, Save
from agent_memory_core.engine.block_reader import BlockReader
from agent_memory_core.engine.results import Results, Saved
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import SessionOwner


class Persistence(Protocol):
    """What the engine knows of the place where turns are kept."""

    @property
    def keeps_turns(self) -> bool:
        """Whether blocks have to be held until they are written."""
        ...

    @property
    def tier(self) -> Tier | None:
        """Where blocks lie besides memory."""
        ...

    @property
    def failed(self) -> int:
        """Turns that could not be saved."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why turns cannot be saved now; None where they can. Any thread may ask, and does not wait."""
        ...

    def stored(self, names: Sequence[BlockHash]) -> set[BlockHash]:
        """Which records of these names are kept there now."""
        ...

    def identify(self, root: BlockHash, identity: Mapping[str, str], namespace: str) -> None:
        """Remember what a root was hashed from, which is written down with the first turn that is saved under it."""
        ...

    def later(self, job: Callable[[], None]) -> None:
        """Do something that may wait for the disk, away from the caller's thread."""
        ...

    def load(self, seq_id: int, root: BlockHash, keys: Sequence[BlockHash]) -> None:
        """Read records for a turn; they come as one or more `Loaded`."""
        ...

    def save(self, save: Save) -> Saved | None:
        """Make a turn durable. None says that the outcome comes later, as a `Saved`."""
        ...

    def keep(self, owner: SessionOwner, blocks: Sequence[Block]) -> None:
        """Write a part of a prompt whose turn has not ended, if that can be done."""
        ...

    def flush(self) -> None:
        """Wait until every turn that was given to `save` is written. Any thread may call it."""
        ...

    def close(self, *, keep_store: bool = False) -> None:
        """Write what is queued and end; with ``keep_store``, the store itself stays open for others."""
        ...


class Disk:
    """A store, with a thread that writes to it and some that read from it."""

    keeps_turns = True

    def __init__(self, store: BlockStore, results: Results) -> None:
        self._store = store
        self._writer = BlockWriter(store, results)
        self._reader = BlockReader(store, results)

    @property
    def tier(self) -> Tier:
        """The records of the store."""
        return self._store.tier

    @property
    def failed(self) -> int:
        """Turns that could not be saved."""
        return self._writer.failed

    @property
    def trouble(self) -> str | None:
        """Why turns cannot be saved now."""
        return self._writer.trouble

    def stored(self, names: Sequence[BlockHash]) -> set[BlockHash]:
        """Which records of these names are in the store now."""
        return self._store.tier.stored(names)

    def identify(self, root: BlockHash, identity: Mapping[str, str], namespace: str) -> None:
        """Remember what a root was hashed from."""
        self._writer.identify(root, identity, namespace)

    def later(self, job: Callable[[], None]) -> None:
        """Do something between two turns that are written."""
        self._writer.later(job)

    def load(self, seq_id: int, root: BlockHash, keys: Sequence[BlockHash]) -> None:
        """Read records for a turn; they come as one or more `Loaded`."""
        self._reader.submit(seq_id, root, keys)

    def save(self, save: Save) -> None:
        """Queue a turn for the writer; wait if too many bytes are queued already."""
        self._writer.submit(save)

    def keep(self, owner: SessionOwner, blocks: Sequence[Block]) -> None:
        """Queue a part of a prompt for the writer."""
        self._writer.keep(owner, blocks)

    def flush(self) -> None:
        """Wait until every turn that was given to `save` is written."""
        self._writer.flush()

    def close(self, *, keep_store: bool = False) -> None:
        """Write what is queued and close the store, unless it is to stay open."""
        self._writer.close()
        self._reader.close()
        if not keep_store:
            self._store.close()


class NoDisk:
    """Nothing is kept: a turn's outcome is known at once."""

    keeps_turns = False
    tier = None
    failed = 0
    trouble = None

    def stored(self, names: Sequence[BlockHash]) -> set[BlockHash]:
        """None."""
        return set()

    def identify(self, root: BlockHash, identity: Mapping[str, str], namespace: str) -> None:
        """Nothing is written down."""

    def later(self, job: Callable[[], None]) -> None:
        """Nothing waits for a disk here."""
        job()

    def load(self, seq_id: int, root: BlockHash, keys: Sequence[BlockHash]) -> None:
        """Never called: without a tier, a match names only blocks in memory."""
        raise AssertionError("a block that is not in memory was matched without a disk")

    def save(self, save: Save) -> Saved:
        """Say that the turn is not on disk."""
        return Saved(save.seq_id, None)

    def keep(self, owner: SessionOwner, blocks: Sequence[Block]) -> None:
        """Nothing is kept."""

    def flush(self) -> None:
        """Nothing is on its way."""

    def close(self, *, keep_store: bool = False) -> None:
        """Nothing is open."""
