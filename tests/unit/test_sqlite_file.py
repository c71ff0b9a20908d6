"""A file that many open at a moment is opened by all of them, whoever changes its mode first."""

from __future__ import annotations

import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from agent_memory_core.sqlite_file import open_shared, write_ahead

pytestmark = pytest.mark.usefixtures("all_cores")

MANY = 8


def test_many_open_one_new_file_at_a_moment(tmp_path: Path) -> None:
    for turn in range(5):
        start, path = threading.Barrier(MANY), tmp_path / "a" / f"{turn}.db"

        def opened(_: int, path: Path = path, start: threading.Barrier = start) -> str:
            start.wait(10)
            with closing(open_shared(path)) as db:
                return str(db.execute("PRAGMA journal_mode").fetchone()[0])

        with ThreadPoolExecutor(MANY) as threads:
            assert set(threads.map(opened, range(MANY))) == {"wal"}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def held(path: Path) -> sqlite3.Connection:
    """A connection that keeps the file from changing its mode, as one does that changes it at the same moment."""
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("CREATE TABLE t (a)")
    holder.execute("BEGIN EXCLUSIVE")
    return holder


def test_whoever_is_refused_tries_again(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with closing(held(path)) as holder, closing(sqlite3.connect(path, timeout=0)) as db:
        release = threading.Timer(0.1, holder.execute, ["COMMIT"])
        release.start()
        assert write_ahead(db, 30)
        release.join()


def test_but_not_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with (
        closing(held(path)),
        closing(sqlite3.connect(path, timeout=0)) as db,
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        write_ahead(db, 0.05)


def test_other_errors_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        open_shared(path)


def test_memory_has_no_log() -> None:
    with closing(open_shared(None)) as db:
        assert not write_ahead(db)
