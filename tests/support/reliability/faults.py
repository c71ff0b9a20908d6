"""The disk fails under a running engine: every turn is answered, nobody else waits, and saving begins again."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from support.reliability.talk import Child, Talks, Tell, open_memory

from agent_memory_core import AgentMemory, TurnReport
from agent_memory_core.engine.block_io import SAVE_PATIENCE
from agent_memory_core.engine.block_reader import READ_PATIENCE
from agent_memory_core.storage import record_reader
from agent_memory_core.storage.record_files import RecordFiles

Fault = Callable[[Path], Any]


@dataclass(slots=True)
class Seen:
    """What one fault did."""

    right: bool = True
    saved_meanwhile: bool = False
    reason: str = ""
    saved_afterwards: bool = False
    turn_ms: float = 0.0
    """the turn that met the fault"""
    stranger_ms: float = 0.0
    """the longest turn of somebody else who asked meanwhile and uses no disk"""
    stranger_healthy_ms: float = 0.0
    """the same while such a turn runs without a fault"""


@dataclass(slots=True)
class Tally:
    """What was seen over all faults."""

    faults: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def _failing(owner: Any, name: str, number: int) -> Fault:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return lambda folder: mock.patch.object(owner, name, fails)


def _slow(owner: Any, name: str, seconds: float) -> Fault:
    real = getattr(owner, name)

    def waits(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return real(*args, **kwargs)

    return lambda folder: mock.patch.object(owner, name, waits)


@contextmanager
def _deleted(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder)
    yield


@contextmanager
def _without_catalog(folder: Path) -> Iterator[None]:
    for path in folder.glob("catalog.db*"):
        path.unlink()
    yield


@contextmanager
def _in_the_way(folder: Path) -> Iterator[None]:
    """A file stands where the folder was, and goes away later."""
    shutil.rmtree(folder)
    folder.write_text("in the way")
    yield
    folder.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Another process holds the write lock of the catalog."""
    held = threading.Event()

    def hold(tell: Tell) -> None:
        db = sqlite3.connect(folder / "catalog.db", isolation_level=None)
        db.execute("BEGIN IMMEDIATE")
        tell("held")
        time.sleep(600)

    child = Child(hold)
    assert child.next() == "held"
    held.set()
    yield
    child.kill()
    child.wait()


WRITES = (RecordFiles, "_write_tmp")
READS = (record_reader, "open_file")
FAULTS: dict[str, Fault] = {
    "no space left": _failing(*WRITES, errno.ENOSPC),
    "the quota of the user is used up": _failing(*WRITES, errno.EDQUOT),
    "an input or output error while writing": _failing(*WRITES, errno.EIO),
    "the volume became read-only": _failing(*WRITES, errno.EROFS),
    "no permission to write": _failing(*WRITES, errno.EACCES),
    "no descriptor left to write": _failing(*WRITES, errno.EMFILE),
    "writing hangs": _slow(*WRITES, 1.5 * SAVE_PATIENCE),
    "the free space cannot be told": _failing(os, "statvfs", errno.EIO),
    "an input or output error while reading": _failing(*READS, errno.EIO),
    "no descriptor left to read": _failing(*READS, errno.EMFILE),
    "reading is slow": _slow(*READS, 0.05),
    "reading hangs": _slow(*READS, 1.5 * READ_PATIENCE),
    "the folder is deleted": _deleted,
    "the catalog is deleted": _without_catalog,
    "something else stands in the folder's place": _in_the_way,
    "another process holds the lock of the catalog": _locked,
}


LONG = {"writing hangs", "reading hangs", "another process holds the lock of the catalog"}
"""Those that take as long as the engine waits for a disk."""


def run(talks: Talks, folder: Path, *, quick: bool = False) -> Tally:
    """Try each fault, without the long ones if it has to be quick, on a store and in a process of its own."""
    tally = Tally()
    for number, name in enumerate(FAULTS):
        if quick and name in LONG:
            continue
        (seen,) = Child(partial(_try, talks, folder / str(number), FAULTS[name])).result()
        tally.faults[name] = seen
    return tally


def _try(talks: Talks, store: Path, fault: Fault, tell: Tell) -> None:
    seen = Seen()
    with open_memory(talks, store) as memory:
        talks.take(memory, "ada", 0)
        memory._thread.call(lambda engine: engine.pool.evict_all()).result()
        _ask_alone(memory)
        _, _, seen.stranger_healthy_ms = _turn_beside_a_stranger(talks, memory, "tom")
        with fault(store):
            _under_fault(talks, memory, seen)
        seen.saved_afterwards = _saved_in_the_end(talks, memory)
    tell(asdict(seen))


def _under_fault(talks: Talks, memory: AgentMemory, seen: Seen) -> None:
    begun = time.perf_counter()
    seen.right, report, seen.stranger_ms = _turn_beside_a_stranger(talks, memory, "ada")
    seen.turn_ms = round(1000 * (time.perf_counter() - begun), 1)
    seen.saved_meanwhile, seen.reason = report.persisted, report.save_error


def _turn_beside_a_stranger(
    talks: Talks, memory: AgentMemory, session: str
) -> tuple[bool, TurnReport, float]:
    """Take the second turn of a session; the last is the longest wait of somebody who asks all the time meanwhile."""
    done = threading.Event()
    waits: list[float] = []

    def ask() -> None:
        while not done.is_set():
            waits.append(_ask_alone(memory))

    thread = threading.Thread(target=ask)
    thread.start()
    is_right, report = talks.take(memory, session, 1)
    done.set()
    thread.join()
    return is_right, report, round(max(waits), 1)


def _ask_alone(memory: AgentMemory) -> float:
    """A turn that uses no disk, in milliseconds."""
    begun = time.perf_counter()
    memory.chat("Who are you?", max_tokens=2)
    return 1000 * (time.perf_counter() - begun)


def _saved_in_the_end(talks: Talks, memory: AgentMemory) -> bool:
    """Whether a turn is saved again within two minutes of the end of the fault, without any help."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if talks.take(memory, "ada", 2)[1].persisted:
            return True
        time.sleep(0.5)
    return False
