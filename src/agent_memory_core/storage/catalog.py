"""The catalog of a store: one SQLite database that says which records it has and which sessions need them."""

from __future__ import annotations

from pathlib import Path

from agent_memory_core.config import Durability
from agent_memory_core.storage.branches import Branches
from agent_memory_core.storage.database import MAX_LOG, Database
from agent_memory_core.storage.disk_budget import DiskBudget
from agent_memory_core.storage.key_ring import Keys, NoKeys
from agent_memory_core.storage.presence import Presence
from agent_memory_core.storage.record_table import RecordTable


class Catalog(Database):
    """The database of one store, and what is kept in it.

    Args:
        path: its file.
        presence: shows that this opening of the store is not over, and tells it of others.
        durability, log_bytes, read_only: see `Database`.

    Raises:
        CatalogDamaged, StoreUnreadable: see `Database`.
    """

    records: RecordTable
    """which files there are"""
    branches: Branches
    """which sessions there are, and where their branches end"""
    budget: DiskBudget
    """how many bytes there are, and what is evicted to make room"""

    def __init__(
        self,
        path: Path,
        presence: Presence,
        durability: Durability = "process",
        log_bytes: int = MAX_LOG,
        *,
        keys: Keys | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(path, durability, log_bytes, read_only)
        self.records = RecordTable(self, keys or NoKeys())
        self.branches = Branches(self, self.records)
        self.budget = DiskBudget(self, self.records, presence)

    def note(self, key: str) -> str | None:
        """The text that was noted last under a key."""
        found = self.read("SELECT text FROM notes WHERE key = ?", (key,))
        return str(found[0][0]) if found else None

    def noted(self, prefix: str) -> list[str]:
        """The keys with this beginning under which something is noted."""
        found = self.read("SELECT key FROM notes WHERE substr(key, 1, ?) = ?", (len(prefix), prefix))
        return [str(key) for (key,) in found]

    def write_note(self, key: str, text: str) -> None:
        """Keep a text under a key, in place of an earlier one.

        Raises:
            StoreError: the database cannot be written.
        """
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (key, text))

    def drop_note(self, key: str) -> None:
        """Drop the text under a key, if there is one.

        Raises:
            StoreError: the database cannot be written.
        """
        with self.transaction() as db:
            db.execute("DELETE FROM notes WHERE key = ?", (key,))
