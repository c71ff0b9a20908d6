"""The records of a store by the names that the engine has for them.

A name is a hash of tokens after other tokens, so whoever reads a name and its parent's can try what the tokens were.
An encrypted store therefore has every name sealed, see `Keys.hide`: in its files, their paths and its catalog.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from agent_memory_core.blocks.block import BlockHash
from agent_memory_core.storage.key_ring import Keys
from agent_memory_core.storage.record import StoredRecord
from agent_memory_core.storage.record_table import RecordTable


class StoredTier:
    """What the engine looks up of the records of one catalog."""

    def __init__(self, records: RecordTable, keys: Keys) -> None:
        self._records = records
        self._keys = keys

    def known_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """How many of the first records of a chain are stored without a gap."""
        return self._records.known_prefix(self._hidden(hashes))

    def starting(self, starts: Sequence[BlockHash], most: int) -> list[StoredRecord]:
        """The stored records that have one of these starts, of each the ``most`` newest."""
        return self._shown(self._records.starting(self._hidden(starts), most))

    def named(self, keys: Sequence[BlockHash]) -> list[StoredRecord]:
        """Those of the records with these names that are stored."""
        return self._shown(list(self._records.get_many(self._hidden(keys)).values()))

    def stored(self, keys: Sequence[BlockHash]) -> set[BlockHash]:
        """Which of these are stored."""
        return {self._keys.show(key) for key in self._records.stored(self._hidden(keys))}

    def _hidden(self, names: Sequence[BlockHash]) -> list[BlockHash]:
        return [self._keys.hide(name) for name in names]

    def _shown(self, found: Sequence[StoredRecord]) -> list[StoredRecord]:
        show = self._keys.show
        return [replace(record, key=show(record.key), parent=show(record.parent)) for record in found]
