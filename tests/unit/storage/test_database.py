"""The database itself: threads, transactions, damage, and versions."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from support.catalog_rows import catalog_at, commit, keys
from support.stored_turns import (
    BLOCK,
    ROOT,
    ids,
)

from agent_memory_core.config import Durability
from agent_memory_core.errors import StoreError, StoreUnreadable
from agent_memory_core.storage.branches import BranchRow
from agent_memory_core.storage.catalog import Catalog
from agent_memory_core.storage.database import CatalogDamaged, Database
from agent_memory_core.storage.presence import Presence

pytestmark = pytest.mark.usefixtures("all_cores")


def test_a_transaction_that_fails_leaves_nothing(catalog: Catalog) -> None:
    class Stop(Exception): ...

    def fail_inside() -> None:
        with catalog.transaction():
            commit(catalog, ids(9))
            assert catalog.budget.totals()["files"] == 3
            raise Stop

    with pytest.raises(Stop):
        fail_inside()
    assert catalog.budget.totals()["files"] == 0
    assert catalog.branches.session_state(ROOT, "default", "s") == "new"


def test_threads_share_a_catalog(catalog: Catalog) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        branch: BranchRow | None = None
        for length in range(1, 30):
            tokens = ids(length, 1000 * number)
            branch = commit(catalog, tokens, f"s{number}", branch)
            if catalog.branches.tokens(branch) != tokens or branch.generation != length:
                wrong.append((number, length))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert catalog.budget.totals()["branches"] == 4


def test_a_catalog_damaged_while_open_knows_nothing_and_refuses_writes(tmp_path: Path) -> None:
    catalog = catalog_at(tmp_path / "catalog.db")
    branch = commit(catalog, ids(40))
    # Another writer makes this one read the pages again.
    other = sqlite3.connect(tmp_path / "catalog.db")
    other.execute("UPDATE totals SET files = files")
    other.commit()
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    size = (tmp_path / "catalog.db").stat().st_size
    with (tmp_path / "catalog.db").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    assert catalog.records.known_prefix(keys(ids(40))) == 0
    assert catalog.branches.tokens(branch) == ()
    assert catalog.branches.of_session("default", "s", ROOT) == []
    assert catalog.failed_reads >= 3
    with pytest.raises(StoreError):
        catalog.branches.sessions()
    with pytest.raises(StoreError):
        commit(catalog, ids(8))
    catalog.close()
    with pytest.raises(CatalogDamaged):
        catalog_at(tmp_path / "catalog.db")


def test_a_database_of_another_kind_is_damage_and_a_newer_one_is_refused(tmp_path: Path) -> None:
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.executescript("CREATE TABLE records (x); PRAGMA user_version = 2")
    foreign.close()
    with pytest.raises(CatalogDamaged):
        catalog_at(tmp_path / "foreign.db")
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.executescript("PRAGMA user_version = 1000000")
    newer.close()
    with pytest.raises(StoreUnreadable, match="upgrade"):
        catalog_at(tmp_path / "newer.db")
    with pytest.raises(CatalogDamaged):
        catalog_at(tmp_path)
    with pytest.raises(StoreUnreadable, match="cannot be opened"):
        catalog_at(tmp_path / "nowhere" / "catalog.db")


def test_an_opening_that_fails_leaves_no_connection_open(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    path.write_bytes(os.urandom(8192))
    presence = Presence(tmp_path / "processes")
    before = os.listdir("/dev/fd")
    with pytest.raises(CatalogDamaged) as damage:
        Catalog(path, presence)
    # The traceback still holds what the opening held.
    assert damage.tb is not None
    assert os.listdir("/dev/fd") == before


def test_a_closed_catalog_says_so(tmp_path: Path) -> None:
    catalog = catalog_at(tmp_path / "catalog.db")
    catalog.close()
    with pytest.raises(StoreError, match="closed"):
        catalog.records.known_prefix([b"x" * 32])
    with pytest.raises(StoreError, match="closed"):
        commit(catalog, ids(3))


def test_what_was_forgotten_cannot_be_read_from_the_database_files(tmp_path: Path) -> None:
    catalog = catalog_at(tmp_path / "catalog.db")
    secret = [0x5EC8E701 + n for n in range(40)]
    commit(catalog, secret)
    needle = b"".join(n.to_bytes(4, "little") for n in secret[:BLOCK])
    assert any(needle in path.read_bytes() for path in tmp_path.glob("catalog.db*"))
    catalog.branches.forget("default", "s")
    catalog.scrub()
    assert not any(needle in path.read_bytes() for path in tmp_path.glob("catalog.db*"))
    catalog.close()


@pytest.mark.parametrize(("durability", "fullfsync"), [("process", 0), ("power", 1)])
def test_a_checkpoint_is_synced_in_full_always_and_a_commit_if_asked(
    tmp_path: Path, durability: Durability, fullfsync: int
) -> None:
    catalog = catalog_at(tmp_path / "catalog.db", durability)
    assert catalog.read("PRAGMA checkpoint_fullfsync", strict=True) == [(1,)]
    assert catalog.read("PRAGMA fullfsync", strict=True) == [(fullfsync,)]
    catalog.close()


def test_a_file_that_could_not_be_opened_is_not_in_place_whatever_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Database) -> bool:
        raise sqlite3.OperationalError("disk I/O error")

    with closing(Database(tmp_path / "catalog.db")) as database:
        assert database.is_in_place()
        with monkeypatch.context() as patch:
            patch.setattr(Database, "_prepare", fails)
            with pytest.raises(StoreError):
                database.reopen()
        assert not database.is_in_place()
        database.reopen()
        assert database.is_in_place()
