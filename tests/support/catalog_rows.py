"""Rows of a catalog without files: what a store would commit for made-up turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from support.stored_turns import (
    FILE,
    ROOT,
    records,
    wanted,
)

from agent_memory_core.blocks.block import (
    BlockHash,
    RecordKind,
    record_hash,
)
from agent_memory_core.config import Durability
from agent_memory_core.storage.branches import BranchRow
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.presence import Presence
from agent_memory_core.storage.record import StoredRecord

_PINNED_BYTES = """WITH RECURSIVE reach (key) AS (
  SELECT b.head FROM branches b JOIN sessions s ON s.id = b.session WHERE s.pinned
  UNION SELECT b.tail FROM branches b JOIN sessions s ON s.id = b.session WHERE s.pinned
  UNION SELECT d.key FROM dependencies d JOIN branches b ON b.branch_id = d.branch JOIN sessions s ON s.id = b.session
    WHERE s.pinned
  UNION SELECT r.parent FROM reach t JOIN records r ON r.key = t.key)
  SELECT coalesce(sum(nbytes), 0) FROM records WHERE key IN reach"""


def catalog_at(path: Path, durability: Durability = "process") -> Catalog:
    """The catalog in that file, opened as a store would."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    presence = Presence(folder / "processes")
    presence.show()
    return Catalog(path, presence, durability)


def evictable_bytes(catalog: Catalog) -> int:
    """Bytes of all files that no pinned session reaches, counted another way than eviction finds them."""
    return catalog.budget.total_bytes() - int(catalog.read(_PINNED_BYTES)[0][0])


def rows(tokens: Sequence[int], root: BlockHash = ROOT, nbytes: int = FILE) -> list[StoredRecord]:
    return [
        StoredRecord(r.key, r.parent, root, r.tokens, r.kind, nbytes, "00", len(r.tokens))
        for r in records(tokens, root, 8)
    ]


def keys(tokens: Sequence[int], root: BlockHash = ROOT) -> list[BlockHash]:
    return [row.key for row in rows(tokens, root)]


def commit(
    catalog: Catalog,
    tokens: Sequence[int],
    session: str = "s",
    branch: BranchRow | None = None,
    root: BlockHash = ROOT,
    max_branches: int = 16,
) -> BranchRow:
    wish = wanted(tokens, session, branch, root=root, max_branches=max_branches)
    return catalog.branches.commit(rows(tokens, root), wish)[0]


def following(catalog: Catalog, *parents: BlockHash, kind: str = "%") -> list[StoredRecord]:
    """The stored records that directly follow one of ``parents``, in the order of their names."""
    found = [
        row
        for parent in parents
        for row in catalog.records.select("WHERE parent = ? AND stored AND kind LIKE ?", (parent, kind))
    ]
    return sorted(found, key=lambda row: row.key)


def further(kind: RecordKind, parent: BlockHash, tokens: Sequence[int] = ()) -> StoredRecord:
    """The row of a record beside the chain of a branch: a window record, or the tail of an earlier place."""
    key = record_hash(kind, parent, tokens)
    return StoredRecord(key, parent, ROOT, tuple(tokens), kind, FILE, "00", len(tokens))


def window_rows(tokens: Sequence[int], indices: Sequence[int]) -> list[StoredRecord]:
    """Window dependencies of these blocks of ``tokens``."""
    return [further("window", keys(tokens)[index]) for index in indices]


def named(rows: Sequence[StoredRecord]) -> tuple[BlockHash, ...]:
    return tuple(row.key for row in rows)


def commit_with(
    catalog: Catalog,
    tokens: Sequence[int],
    dependencies: Sequence[StoredRecord],
    session: str = "s",
    branch: BranchRow | None = None,
) -> tuple[BranchRow, list[StoredRecord]]:
    """Commit a branch that needs ``dependencies`` beside its chain."""
    wish = wanted(tokens, session, branch, dependencies=named(dependencies))
    return catalog.branches.commit([*rows(tokens), *dependencies], wish)
