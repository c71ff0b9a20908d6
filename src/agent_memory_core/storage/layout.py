"""The layout of a catalog: its tables, indexes and triggers, and how another layout is brought to it.

A database may have another layout because it is of an older version, or because of damage that SQLite does not see: a
trigger that counts wrongly is sound SQL. In either case its rows are copied into new tables, within one transaction.
Rows that the new tables do not take are dropped: they could not have been used.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import NamedTuple

SCHEMA = resources.files("agent_memory_core.storage").joinpath("schema.sql").read_text(encoding="utf-8")
"""The SQL that makes the tables, indexes and triggers of an empty database."""

Layout = Mapping[tuple[str, str], str]
"""What there is: the SQL of each thing by its type and name, without comments and line breaks."""

_OURS = {"roots", "sessions", "branches", "dependencies", "records", "reservations", "holds", "notes"}
"""Tables that a catalog of any version has that can be brought to this one."""

_COUNTED = ("totals",)
"""Tables whose rows the triggers make anew."""

_TYPES = {"BLOB": ("blob",), "TEXT": ("text",), "INTEGER": ("integer",), "REAL": ("real", "integer")}


class _Column(NamedTuple):
    name: str
    kind: str
    is_required: bool
    has_default: bool


def layout(db: sqlite3.Connection) -> Layout:
    """What there is in a database."""
    found = db.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {
        (kind, name): " ".join(re.sub(r"--.*", "", sql).split())
        for kind, name, sql in found
        if not name.startswith("sqlite_")
    }


@cache
def wanted_layout() -> Layout:
    """What there is in a database that `SCHEMA` made."""
    db = _made_in_memory()
    try:
        return layout(db)
    finally:
        db.close()


def is_ours(found: Layout) -> bool:
    """Whether a database of this layout can be brought to the wanted one; else it is that of another program."""
    return {("table", name) for name in _OURS} <= found.keys()


def renew(db: sqlite3.Connection, version: int) -> None:
    """Copy all rows into new tables of the wanted layout, and drop everything else. All of it is done or nothing.

    Args:
        db: the database, see `is_ours`; the triggers count its references and totals anew.
        version: the version that it has then.

    Raises:
        sqlite3.Error: it is damaged.
    """
    try:
        db.executescript("".join(["BEGIN IMMEDIATE;", *_statements(db, version), "COMMIT;"]))
    finally:
        db.rollback()


def _statements(db: sqlite3.Connection, version: int) -> list[str]:
    found = layout(db)
    tables = [name for kind, name in found if kind == "table"]
    others = [(kind, name) for kind, name in found if kind != "table"]
    wanted = [name for kind, name in wanted_layout() if kind == "table" and name not in _COUNTED]
    numbers = db.execute("SELECT name, seq FROM sqlite_sequence").fetchall()
    return [
        *(f"DROP {kind} {_quoted(name)};" for kind, name in others),
        *(f"ALTER TABLE {_quoted(name)} RENAME TO {_quoted(_aside(name))};" for name in tables),
        SCHEMA,
        *(_copy(db, name) for name in wanted if name in tables),
        *(f"DROP TABLE {_quoted(_aside(name))};" for name in tables),
        # A number that was given once must not be given again: a process may still hold it.
        "DELETE FROM sqlite_sequence;",
        *(
            f"INSERT INTO sqlite_sequence VALUES ('{name}', {int(seq)});"
            for name, seq in numbers
            if name in wanted
        ),
        f"PRAGMA user_version = {version};",
    ]


def _copy(db: sqlite3.Connection, table: str) -> str:
    """The SQL that copies those rows of a table that have the right types."""
    old = {row[1] for row in db.execute(f"PRAGMA table_info({_quoted(table)})")}
    new = [column for column in _columns(table) if column.name in old or not column.has_default]
    if any(column.name not in old for column in new):
        return ""
    names = ", ".join(column.name for column in new)
    # The triggers count anew.
    values = ", ".join("0" if column.name == "refs" else column.name for column in new)
    right = " AND ".join(map(_has_type, new))
    return f"INSERT OR IGNORE INTO {table} ({names}) SELECT {values} FROM {_aside(table)} WHERE {right};"


@cache
def _columns(table: str) -> Sequence[_Column]:
    """The columns of one of the wanted tables."""
    db = _made_in_memory()
    try:
        found = db.execute(f"PRAGMA table_info({table})").fetchall()
    finally:
        db.close()
    return [
        _Column(name, kind, bool(required or key), default is not None)
        for _, name, kind, required, default, key in found
    ]


def _has_type(column: _Column) -> str:
    types = ", ".join(
        f"'{one}'" for one in (*_TYPES[column.kind], *(() if column.is_required else ("null",)))
    )
    return f"typeof({column.name}) IN ({types})"


def _made_in_memory() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    db.executescript(SCHEMA)
    return db


def _aside(table: str) -> str:
    return f"old_{table}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
