"""Every region of every kind of file, and every table, is damaged. The store opens, and the answers are the same."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from support.reliability.talk import SESSIONS, TURNS, Child, Talks, Tell, open_memory

Harm = Callable[[Path], object]


@dataclass(slots=True)
class Tally:
    """What was seen over all damages."""

    damages: int = 0
    kinds_of_file: int = 0
    tables: int = 0
    refused: int = 0
    """stores that could not be opened"""
    wrong: int = 0
    """answers with other tokens than without damage"""
    not_saved: int = 0
    """turns that could not be stored afterwards"""
    unclean: int = 0
    """stores in which a later check still found something"""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def _changed(change: Callable[[bytes], bytes]) -> Harm:
    def harm(path: Path) -> None:
        raw = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(change(raw))

    return harm


def _flipped(share: float) -> Harm:
    def change(raw: bytes) -> bytes:
        at = min(int(len(raw) * share), len(raw) - 1)
        return raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :] if raw else raw

    return _changed(change)


def _replaced(make: Callable[[Path], object]) -> Harm:
    def harm(path: Path) -> None:
        path.unlink()
        make(path)

    return harm


REGIONS: dict[str, Harm] = {
    **{f"a byte at {share:.0%}": _flipped(share) for share in (0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 1)},
    "emptied": _changed(lambda raw: b""),
    "cut in the header": _changed(lambda raw: raw[:100]),
    "cut in half": _changed(lambda raw: raw[: len(raw) // 2]),
    "longer": _changed(lambda raw: raw + b"more"),
    "zeroes": _changed(lambda raw: bytes(len(raw))),
    "garbage": _changed(lambda raw: os.urandom(len(raw))),
    "zeroes at the end": _changed(lambda raw: raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2)),
    "deleted": os.unlink,
    "a folder": _replaced(Path.mkdir),
    "a fifo": _replaced(os.mkfifo),
    "a link to a device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link to nowhere": _replaced(lambda path: path.symlink_to("nowhere")),
}

FILES = {
    "a block": "ns/*/blocks/*/*",
    "a tail": "ns/*/tails/*/*",
    "a window": "ns/*/windows/*/*",
    "an identity": "ns/*/identity.json",
    "the version": "SCHEMA",
    "the catalog": "catalog.db",
    "the catalog's log": "catalog.db-wal",
    "the catalog's shared memory": "catalog.db-shm",
    "a temporary file": "tmp/*",
    "a lock": "processes/*",
    "a file in the quarantine": "quarantine/*",
}
TABLE_HARMS = {
    "emptied": "DELETE FROM {}",
    "dropped": "DROP TABLE {}",
    "with every number one greater": "",
    "with random bytes": "",
}


def cases() -> Iterator[tuple[str, str, Harm]]:
    """Every damage: what is damaged, how, and what does it to a store's folder."""
    for what, pattern in FILES.items():
        for how, harm in REGIONS.items():
            yield what, how, _to_each(pattern, harm)
    for table in _tables():
        for how, sql in TABLE_HARMS.items():
            yield f"table {table}", how, _to_table(table, how, sql)


def run(all_talks: list[Talks], folder: Path, *, every: int = 1) -> Tally:
    """Do each damage, or every so many of them, to a copy of a store that is being used when its process is killed."""
    tally = Tally(kinds_of_file=len(FILES), tables=len(_tables()))
    stores = [(talks, _made(talks, folder / talks.kind)) for talks in all_talks]
    for number, (_, _, harm) in enumerate(islice(cases(), 0, None, every)):
        talks, store = stores[number % len(stores)]
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(store, copy, symlinks=True)
        harm(copy)
        tally.damages += 1
        _look(talks, copy, tally)
    return tally


def _made(talks: Talks, store: Path) -> Path:
    """A store with all sessions, left by a process that was killed while it wrote."""

    def write(tell: Tell) -> None:
        memory = open_memory(talks, store)
        for session in SESSIONS:
            for turn in range(TURNS - 1):
                talks.take(memory, session, turn)
        (store / "tmp" / "left").write_bytes(b"left")
        (store / "quarantine" / "1.damaged.safetensors").write_bytes(b"damaged")
        tell("done")
        os.kill(os.getpid(), 9)

    child = Child(write)
    assert child.rest() == ["done"]
    child.wait()
    return store


def _look(talks: Talks, store: Path, tally: Tally) -> None:
    def look(tell: Tell) -> None:
        with open_memory(talks, store) as memory:
            rights = [talks.take(memory, session, TURNS - 1)[0] for session in SESSIONS]
            is_saved = talks.take(memory, "ada", 0)[1].persisted
        with open_memory(talks, store) as memory:
            memory.check(fix=True)
            tell([sum(not right for right in rights), is_saved, memory.check().clean])

    child = Child(look)
    found = child.rest()
    if child.wait() != 0:
        tally.refused += 1
        return
    ((wrong, is_saved, is_clean),) = found
    tally.wrong += wrong
    tally.not_saved += not is_saved
    tally.unclean += not is_clean


def _to_each(pattern: str, harm: Harm) -> Harm:
    def harm_all(folder: Path) -> None:
        for path in sorted(folder.glob(pattern)):
            harm(path)

    return harm_all


def _tables() -> list[str]:
    from agent_memory_core.storage.layout import wanted_layout

    return sorted(name for kind, name in wanted_layout() if kind == "table")


def _to_table(table: str, how: str, sql: str) -> Harm:
    def harm(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "catalog.db", isolation_level=None)) as db:
            for statement in [sql.format(table)] if sql else _updates(db, table, how):
                try:
                    db.execute(statement)
                except sqlite3.Error:
                    # The tables refuse what is not sound.
                    continue

    return harm


def _updates(db: sqlite3.Connection, table: str, how: str) -> Iterator[str]:
    for _, name, kind, *_ in db.execute(f"PRAGMA table_info({table})").fetchall():
        if how == "with random bytes" and kind == "BLOB":
            yield f"UPDATE {table} SET {name} = randomblob(length({name}))"
        elif how != "with random bytes" and kind in ("INTEGER", "REAL"):
            yield f"UPDATE {table} SET {name} = {name} + 1"
