"""Processes that die, fight and run out of space: no acknowledged turn is lost, and none is torn."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import stored_turns
from support.stored_turns import BLOCK, FILE, ROOT, RecordStore, files, is_whole, turn

from agent_memory_core.storage.audit import CheckReport
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.volume import CATALOG_ROOM

MANY = 2**40


@dataclass
class Acked:
    """What processes were told is safe: the newest state of every branch."""

    turns: int = 0
    fresh: set[int] = field(default_factory=set)
    branches: dict[int, tuple[str, int, tuple[int, ...]]] = field(default_factory=dict)

    def note(self, line: str) -> None:
        session, branch_id, generation, tokens = json.loads(line)
        known = self.branches.get(branch_id, ("", 0, ()))
        assert generation != known[1], "two processes were told that they moved the same branch"
        if generation > known[1]:
            self.branches[branch_id] = (session, generation, tuple(tokens))
        self.fresh.add(branch_id)
        self.turns += 1

    def verify(self, store: BlockStore, killed: int = 1) -> None:
        """Every branch is there, at most one turn for each killed process further; what was told last loads right."""
        for branch_id, (session, generation, tokens) in self.branches.items():
            branches = store.catalog.branches.of_session("default", session, ROOT)
            (row,) = [branch for branch in branches if branch.branch_id == branch_id]
            assert generation <= row.generation <= generation + killed
            found = store.catalog.branches.tokens(row)
            assert len(found) == row.tokens
            assert found[: len(tokens)] == tokens
            assert branch_id not in self.fresh or is_whole(store, found)
        self.fresh.clear()


@dataclass
class Worker:
    """A process that commits turns, and the file in which it says so."""

    process: subprocess.Popen[str]
    told: Path

    def lines(self) -> list[str]:
        """All it said; a last line without its end was not yet told."""
        return self.told.read_text().split("\n")[:-1]


def start(
    folder: Path, seed: int, sessions: int, quota: int = MANY, nbytes: int = stored_turns.PAYLOAD
) -> Worker:
    told = folder.parent / f"{folder.name}-{seed}.told"
    arguments = [sys.executable, stored_turns.__file__, *map(str, (folder, seed, sessions, quota, nbytes))]
    with told.open("w") as out:
        return Worker(subprocess.Popen(arguments, stdout=out, stderr=subprocess.PIPE, text=True), told)


def kill(workers: list[Worker], acked: Acked, seconds: float, turns: int = 1) -> None:
    """Let all work for a while after so many turns, kill them in the same moment, and note what they said."""
    while not all(len(worker.lines()) >= turns for worker in workers):
        assert all(worker.process.poll() is None for worker in workers)
        time.sleep(0.01)
    time.sleep(seconds)
    for worker in workers:
        worker.process.send_signal(signal.SIGKILL)
    for worker in workers:
        _, error = worker.process.communicate()
        assert worker.process.returncode == -signal.SIGKILL, error
        for line in worker.lines():
            acked.note(line)


def checked(store: BlockStore) -> CheckReport:
    report = store.check()
    assert report.clean, report
    return report


def unfinished(folder: Path) -> int:
    """How many turns killed processes were in the middle of."""
    with closing(sqlite3.connect(f"{(folder / 'catalog.db').as_uri()}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM reservations").fetchone()[0])


@pytest.mark.slow
def test_kills_lose_no_acknowledged_turn_and_tear_none(tmp_path: Path) -> None:
    chance, acked = random.Random(1), Acked()
    hits = 0
    for round_ in range(25):
        if round_ >= 10 and hits:
            break
        nbytes = 2**20 if round_ % 5 == 4 else stored_turns.PAYLOAD
        folder = tmp_path / ("large" if nbytes == 2**20 else "small")
        mine = acked if folder.name == "small" else Acked()
        worker = start(folder, round_, 3, nbytes=nbytes)
        kill(
            [worker],
            mine,
            chance.uniform(0, 0.05),
            turns=1 if folder.name == "large" else chance.randint(4, 10),
        )
        hits += len(list((folder / "tmp").iterdir())) + unfinished(folder)
        store = BlockStore(folder, quota_bytes=MANY)
        assert list((folder / "tmp").iterdir()) == []
        mine.verify(store)
        assert checked(store).unknown == ()
        store.close()
        if folder.name == "large":
            shutil.rmtree(folder)
    store = BlockStore(tmp_path / "small", quota_bytes=MANY)
    store.check(fix=True)
    acked.fresh.update(acked.branches)
    acked.verify(store)
    assert checked(store).unknown == ()
    assert sum(path.stat().st_size for path in files(store)) == store.stats()["bytes"]
    store.close()
    assert hits > 0, "kills that hit nothing prove nothing"


def test_processes_that_fight_over_sessions_and_die_lose_no_turn_of_either(tmp_path: Path) -> None:
    acked = Acked()
    folder = tmp_path / "store"
    for round_ in range(4):
        kill([start(folder, 100 * round_ + n, 1) for n in range(3)], acked, 0.3)
        store = BlockStore(folder, quota_bytes=MANY)
        acked.verify(store, 3)
        checked(store)
        store.close()
    # Every lost race is a branch of its own.
    assert len(acked.branches) > 3


def test_kills_amid_evictions_leave_a_store_that_is_sound_and_within_its_budget(tmp_path: Path) -> None:
    folder, quota = tmp_path / "store", 40 * FILE
    chance = random.Random(2)
    for round_ in range(6):
        kill(
            [start(folder, 10 * round_ + n, 5, quota) for n in range(2)], Acked(), chance.uniform(0.05, 0.25)
        )
        store = RecordStore(folder, quota_bytes=quota)
        report = checked(store)
        assert store.stats()["bytes"] <= quota
        # Whoever opens the store finishes what was killed between the rows and the files, both ways.
        assert report.unknown == ()
        assert sum(path.stat().st_size for path in files(store)) == report.nbytes <= quota
        for info in store.catalog.branches.sessions():
            for row in store.catalog.branches.of_session("default", info.session_id, ROOT):
                assert is_whole(store, store.catalog.branches.tokens(row))
        store.close()
    store = RecordStore(folder, quota_bytes=quota)
    store.check(fix=True)
    # A check may adopt files that nobody knew; the next turn evicts them.
    turn(store, range(8 * BLOCK), "last")
    assert sum(path.stat().st_size for path in files(store)) == store.stats()["bytes"] <= quota
    assert store.stats()["reserved"] == 0
    store.close()


def test_many_processes_open_a_new_store_at_once(tmp_path: Path) -> None:
    acked = Acked()
    kill([start(tmp_path / "store", n, 2) for n in range(5)], acked, 0.1)
    store = BlockStore(tmp_path / "store", quota_bytes=MANY)
    acked.verify(store, 5)
    checked(store)
    store.close()


# Short of bytes, which is seen before; and short of files, which is seen only when one cannot be made.
@pytest.mark.parametrize("options", [f"size={CATALOG_ROOM + 6 * 2**20}", "size=64m,nr_inodes=300"])
def test_a_full_volume_evicts_and_then_refuses_and_leaves_what_was_there(
    tmp_path: Path, options: str
) -> None:
    own = ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*own, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("a small volume needs Linux and the right to mount")
    mount = f"mount -t tmpfs -o mode=700,{options} none {tmp_path}"
    fill = f"exec {sys.executable} {stored_turns.__file__} fill {tmp_path}"
    done = subprocess.run(
        [*own, "sh", "-c", f"{mount} && {fill}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
