"""A file of SQLite that several processes share and only its owner reads."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path

BUSY_SECONDS = 30.0
"""How long a connection waits for what another one is doing."""

_PAUSE = 0.01
_PRIMARY = 0xFF
"""What of an error's code says its kind; the rest says the place (https://www.sqlite.org/rescode.html)."""


def open_shared(path: Path | None) -> sqlite3.Connection:
    """Open a file, and make it and its folder if there is none. ``None`` keeps everything in memory.

    Transactions are begun by hand, foreign keys hold, SQL that stands in the file is not believed, and what is deleted
    does not stay in free pages.

    Raises:
        OSError, sqlite3.Error: the file cannot be opened.
    """
    if path is not None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its log the mode that the file has.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(
        path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        write_ahead(db)
        for pragma in ("foreign_keys = ON", "trusted_schema = OFF", "secure_delete = ON"):
            db.execute(f"PRAGMA {pragma}").close()
    except BaseException:
        with closing(db):
            raise
    return db


def write_ahead(db: sqlite3.Connection, seconds: float = BUSY_SECONDS) -> bool:
    """Let the file have a log that is written ahead; say whether it has one, which needs shared memory.

    Raises:
        sqlite3.OperationalError: another connection kept the file locked for so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            mode: str = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            # Where two connections change the mode at once, SQLite refuses one at once, whatever its timeout is.
            if error.sqlite_errorcode & _PRIMARY != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)
        else:
            return mode == "wal"
