"""A catalog of another layout, old or damaged, is brought to the right one and keeps every row that is sound."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from support.catalog_rows import catalog_at, commit, keys
from support.stored_turns import FILE, ids, is_whole, open_store, turn

from agent_memory_core.storage.database import CatalogDamaged
from agent_memory_core.storage.layout import is_ours, layout, renew, wanted_layout

WRITABLE = "PRAGMA writable_schema = ON;"
CHANGED = "UPDATE sqlite_master SET sql = replace(sql, '{}', '{}')"
HARMS = {
    "a trigger that counts wrongly": "DROP TRIGGER record_added; CREATE TRIGGER record_added AFTER INSERT ON records"
    " BEGIN UPDATE totals SET bytes = bytes + 7; END",
    "a trigger that is missing": "DROP TRIGGER branch_moved",
    "a trigger too many": "CREATE TRIGGER more AFTER INSERT ON sessions BEGIN DELETE FROM branches; END",
    "an index that is missing": "DROP INDEX records_parent",
    "a view": "CREATE VIEW more AS SELECT 1",
    "a table too many": "CREATE TABLE more (x); INSERT INTO more VALUES (1)",
    "a table that is missing": "DROP TABLE doomed",
    "a column too many": "ALTER TABLE notes ADD COLUMN more TEXT",
    "a column of another type": WRITABLE + CHANGED.format("nbytes INTEGER", "nbytes TEXT"),
    "a column that may be null": WRITABLE + CHANGED.format("lane TEXT NOT NULL", "lane TEXT"),
    "tables that take anything": WRITABLE + CHANGED.format(") STRICT", ")"),
}


def harm(path: Path, sql: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(sql)


@pytest.mark.parametrize("sql", HARMS.values(), ids=HARMS.keys())
def test_a_layout_that_is_damaged_is_set_right_and_nothing_is_lost(tmp_path: Path, sql: str) -> None:
    store = open_store(tmp_path / "store")
    branch = turn(store, ids(23), "a")
    store.catalog.branches.pin("default", "a", True)
    turn(store, ids(9, 500), "b")
    before = {name: store.stats()[name] for name in ("files", "bytes", "branches", "sessions")}
    store.close()
    harm(tmp_path / "store" / "catalog.db", sql)
    for _ in range(2):
        store = open_store(tmp_path / "store")
        assert store.check().clean
        assert {name: store.stats()[name] for name in before} == before
        (found,) = store.catalog.branches.of_session("default", "a")
        assert found == branch
        assert {info.session_id: info.pinned for info in store.catalog.branches.sessions()} == {
            "a": True,
            "b": False,
        }
        assert is_whole(store, store.catalog.branches.tokens(found))
        store.close()
    store = open_store(tmp_path / "store")
    assert turn(store, ids(5, 900), "c").branch_id > branch.branch_id + 1
    assert store.check().clean
    store.close()


def test_rows_that_the_tables_do_not_take_are_dropped_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalog = catalog_at(path)
    commit(catalog, ids(12), "a")
    commit(catalog, ids(12, 100), "b")
    catalog.finish()
    catalog.close()
    harm(path, HARMS["tables that take anything"])
    harm(
        path,
        """UPDATE branches SET tokens = 'many' WHERE branch_id = 1;
        UPDATE records SET nbytes = x'00' WHERE ntok > 0 AND id = 1;
        INSERT INTO notes VALUES (x'07', 8.5)""",
    )
    catalog = catalog_at(path)
    assert [info.session_id for info in catalog.branches.sessions()] == ["b"]
    assert catalog.records.known_prefix(keys(ids(12))) == 0
    assert catalog.records.known_prefix(keys(ids(12, 100))) == 3
    assert catalog.budget.totals()["bytes"] == 5 * FILE
    assert catalog.records.recount(fix=False) == catalog.faults() == []
    catalog.close()


def test_numbers_that_were_given_are_not_given_again(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalog = catalog_at(path)
    for n in range(5):
        last = commit(catalog, ids(4, n * 10), f"s{n}")
    for n in range(1, 5):
        catalog.branches.forget("default", f"s{n}")
    catalog.finish()
    catalog.close()
    harm(path, HARMS["a view"])
    catalog = catalog_at(path)
    assert commit(catalog, ids(4, 99), "new").branch_id > last.branch_id
    catalog.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: harm(path, "CREATE TABLE mine (x); PRAGMA user_version = 4"),
        lambda path: harm(path, "CREATE TABLE records (x); PRAGMA user_version = 3"),
    ],
)
def test_the_database_of_another_program_is_not_changed(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "catalog.db"
    make(path)
    with closing(sqlite3.connect(path)) as db:
        before = list(db.iterdump())
    with pytest.raises(CatalogDamaged):
        catalog_at(path)
    with closing(sqlite3.connect(path)) as db:
        assert list(db.iterdump()) == before


def test_copying_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalog = catalog_at(path)
    commit(catalog, ids(12), "a")
    catalog.close()
    # A view of that name stands in the way of the old table's new name, after others were renamed.
    harm(path, "CREATE TABLE old_notes (x); CREATE TABLE old_old_notes (x)")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        assert is_ours(layout(db))
        before = list(db.iterdump())
        with pytest.raises(sqlite3.Error):
            renew(db, 4)
        assert list(db.iterdump()) == before


def test_the_wanted_layout_is_what_a_new_catalog_has(tmp_path: Path) -> None:
    catalog_at(tmp_path / "catalog.db").close()
    with closing(sqlite3.connect(tmp_path / "catalog.db")) as db:
        assert layout(db) == wanted_layout()
