"""Processes are killed while they write, at named points and at random: nothing acknowledged is lost or wrong."""

from __future__ import annotations

import os
import random
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from support.reliability.talk import BLOCK, SESSIONS, TURNS, Child, Talks, Tell, open_memory

from agent_memory_core import AgentMemory
from agent_memory_core.storage import record_files
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import Branches
from agent_memory_core.storage.database import Database
from agent_memory_core.storage.disk_budget import DiskBudget
from agent_memory_core.storage.presence import Presence

MIB = 2**20
AMPLE, TIGHT = 256, 2
"""MiB of a store that keeps everything, and of one that evicts with nearly every turn."""

ROUNDS = 40
"""Rounds of turns after which a process is killed at last, if it has not come to its point."""

POINTS: dict[str, tuple[Any, str]] = {
    "a process shows that it is there": (Presence, "show"),
    "the catalog is opened": (Database, "reopen"),
    "bytes are reserved": (DiskBudget, "reserve"),
    "rows are evicted": (DiskBudget, "evict"),
    "a file is written under a temporary name": (record_files.RecordFiles, "_write_tmp"),
    "a file gets its name": (record_files, "link"),
    "what a root is gets written down": (record_files.RecordFiles, "write_identity"),
    "a branch is moved": (Branches, "commit"),
    "a reservation is released": (DiskBudget, "release"),
    "a turn is committed": (BlockStore, "commit"),
    "a file is deleted": (record_files.RecordFiles, "delete_at"),
    "a session is forked": (Branches, "fork"),
    "a session is forgotten": (Branches, "forget"),
    "the log is emptied": (Database, "scrub"),
}
"""What a process is killed at: right before it, or right after."""


@dataclass(slots=True)
class Tally:
    """What was seen over many kills."""

    kills: int = 0
    at_points: dict[str, int] = field(default_factory=dict)
    """kills by the named point at which they hit"""
    turns: int = 0
    """turns that were acknowledged as stored"""
    resumed: int = 0
    """turns that were taken after a kill to see what is left"""
    lost: int = 0
    """acknowledged turns that were not there afterwards"""
    wrong: int = 0
    """answers, during and after, with other tokens than without kills"""
    unclean: int = 0
    """checks that found anything but what a killed process leaves"""
    largest_share: float = 0.0
    """the largest share of its budget that a folder had after it was opened again"""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def run(all_talks: list[Talks], folder: Path, count: int, seed: int = 0) -> Tally:
    """Kill ``count`` processes."""
    chance, tally, number = random.Random(seed), Tally(), 0
    points = list(POINTS)
    while tally.kills < count:
        talks = all_talks[number % len(all_talks)]
        budget = TIGHT if number % 4 == 3 else AMPLE
        point = points[number // 2 % len(points)] if number % 2 else None
        store = folder / f"{talks.kind}-{budget}"
        told = _kill(talks, store, budget, 1 + number % 3, point, chance, tally)
        _look(talks, store, budget, told, tally)
        number += 1
    return tally


def _kill(
    talks: Talks,
    store: Path,
    budget: int,
    writers: int,
    point: str | None,
    chance: random.Random,
    tally: Tally,
) -> dict[str, int]:
    """Let some processes write, and kill them; return the last acknowledged turn of each session."""
    told: dict[str, int] = {}
    seeds = [chance.randrange(2**30) for _ in range(writers)]
    children = [Child(partial(_write, talks, store, budget, seed, point)) for seed in seeds]
    first = [child.next() for child in children]
    if point is None:
        time.sleep(chance.uniform(0, 0.15))
        for child in children:
            child.kill()
    for child, line in zip(children, first, strict=True):
        lines = ([] if line is None else [line]) + child.rest()
        assert child.wait() == -9, "a writer ended by itself"
        tally.kills += 1
        for session, turn, is_right, is_stored, _ in lines:
            tally.wrong += not is_right
            tally.turns += is_stored
            if is_stored:
                told[session] = max(turn, told.get(session, 0))
    if point is not None:
        tally.at_points[point] = tally.at_points.get(point, 0) + writers
    return told


def _write(talks: Talks, store: Path, budget: int, seed: int, point: str | None, tell: Tell) -> None:
    """Take turns until killed; with a ``point``, die there soon."""
    chance = random.Random(seed)
    with ExitStack() as stack:
        if point is not None:
            _die_at(point, chance, stack)
        memory = open_memory(talks, store, disk_budget_mb=budget)
        for number in range(ROUNDS):
            for session in chance.sample(SESSIONS, len(SESSIONS)):
                turn = number % TURNS
                is_right, report = talks.take(memory, session, turn)
                tell([session, turn, is_right, report.persisted, report.usage.cache_read])
            _begin_and_forget(memory, number)
        os.kill(os.getpid(), 9)


def _begin_and_forget(memory: AgentMemory, number: int) -> None:
    name = f"scratch {os.getpid()} {number}"
    memory.chat(f"Nothing of {name} is to stay. " * 12, name, max_tokens=1)
    if memory.branches(name):
        memory.fork(name, f"{name} again")
        memory.forget(name)
        memory.forget(f"{name} again")


def _die_at(point: str, chance: random.Random, stack: ExitStack) -> None:
    owner, name = POINTS[point]
    # What happens at the opening happens once; else the first turns are let through.
    rare = {"a process shows that it is there", "the catalog is opened", "what a root is gets written down"}
    left = 1 if point in rare else chance.randint(1, 6)
    before = chance.random() < 0.5
    real = getattr(owner, name)

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left <= 0 and before:
            os.kill(os.getpid(), 9)
        result = real(*args, **kwargs)
        if left <= 0:
            os.kill(os.getpid(), 9)
        return result

    stack.enter_context(mock.patch.object(owner, name, dies))


def _look(talks: Talks, store: Path, budget: int, told: dict[str, int], tally: Tally) -> None:
    """Open the store again: is it sound, within its budget, and is everything there that was acknowledged?"""

    def look(tell: Tell) -> None:
        with open_memory(talks, store, disk_budget_mb=budget) as memory:
            report = memory.check()
            share = sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) / (budget * MIB)
            # Being over the budget is measured by itself.
            found = (report.missing, report.damaged, report.foreign, report.catalog, report.unknown)
            tell([not any(found), share])
            for session, turn in told.items():
                asked = memory.count_tokens(talks.prompt(session, turn))
                is_right, turned = talks.take(memory, session, min(turn + 1, TURNS - 1))
                # At the end of a turn everything before it is kept, whatever the kind of layer.
                tell([is_right, budget == TIGHT or turned.usage.cache_read >= asked - BLOCK])

    (is_sound, share), *turns = Child(look).result()
    tally.unclean += not is_sound
    tally.largest_share = max(tally.largest_share, round(share, 3))
    tally.resumed += len(turns)
    tally.wrong += sum(not is_right for is_right, _ in turns)
    tally.lost += sum(not is_there for _, is_there in turns)
