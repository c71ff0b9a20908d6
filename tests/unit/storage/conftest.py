"""A store and a catalog, which must be sound at the end of a test, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.catalog_rows import catalog_at
from support.stored_turns import (
    IDENTITY,
    OTHER,
    ROOT,
    open_store,
)

from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.catalog import Catalog


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[BlockStore]:
    store = open_store(folder)
    yield store
    report = store.check()
    store.close()
    assert report.clean, report
    assert (report.unknown, report.leftovers) == ((), 0)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = catalog_at(tmp_path / "catalog.db")
    catalog.records.register_root(ROOT, IDENTITY | {"name": "made"}, "default")
    catalog.records.register_root(OTHER, {"model": "other"}, "default")
    yield catalog
    assert catalog.records.recount(fix=False) == []
    catalog.close()
