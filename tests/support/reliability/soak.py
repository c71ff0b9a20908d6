"""Several processes use one store at the edge of all budgets for a long time: nothing grows, and no answer changes."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from support.reliability.talk import SESSIONS, TURNS, Child, Talks, Tell, open_memory

PROCESSES = 3
SAMPLES = 60


@dataclass(slots=True)
class Tally:
    """What was seen. Sizes are in MiB, as the largest of all processes; pairs are the first and the last third."""

    minutes: float
    turns: int = 0
    wrong: int = 0
    """answers with other tokens than in a run by itself"""
    not_saved: int = 0
    evicted: int = 0
    """records that made room for others"""
    unclean: int = 0
    memory: list[float] = field(default_factory=list)
    """resident"""
    descriptors: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    """of the whole folder"""
    disk_budget: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def run(all_talks: list[Talks], folder: Path, minutes: float, disk_budget_mb: int = 4) -> Tally:
    """Let one process for each of the talks, and at least three, take turns at random."""
    tally = Tally(round(minutes, 2), disk_budget=disk_budget_mb)
    store, end = folder / "store", time.monotonic() + 60 * minutes
    children = [
        Child(partial(_work, all_talks[number % len(all_talks)], store, number, end, disk_budget_mb))
        for number in range(max(PROCESSES, len(all_talks)))
    ]
    disk = _watch_folder(store, end)
    found = [child.result()[0] for child in children]
    for name in ("turns", "wrong", "not_saved", "evicted"):
        setattr(tally, name, sum(one[name] for one in found))
    for name in ("memory", "descriptors", "threads"):
        setattr(tally, name, [max(one[name][third] for one in found) for third in (0, 1)])
    tally.disk = _thirds(disk)
    with open_memory(all_talks[0], store, disk_budget_mb=disk_budget_mb) as memory:
        tally.unclean = int(not memory.check().clean)
    return tally


def _work(talks: Talks, store: Path, seed: int, end: float, disk_budget_mb: int, tell: Tell) -> None:
    chance = random.Random(seed)
    turns = wrong = not_saved = 0
    samples: dict[str, list[float]] = {"memory": [], "descriptors": [], "threads": []}
    next_sample, begun = time.monotonic(), time.monotonic()
    with open_memory(talks, store, disk_budget_mb=disk_budget_mb, memory_budget_mb=6) as memory:
        while time.monotonic() < end or not turns:
            is_right, report = talks.take(memory, chance.choice(SESSIONS), chance.randrange(TURNS))
            turns, wrong = turns + 1, wrong + (not is_right)
            not_saved += not report.persisted
            if time.monotonic() >= next_sample:
                next_sample += (end - begun) / SAMPLES
                for name, value in _sizes().items():
                    samples[name].append(value)
        evicted = memory.stats().store.evicted
    tell(
        {"turns": turns, "wrong": wrong, "not_saved": not_saved, "evicted": evicted}
        | {name: _thirds(values) for name, values in samples.items()}
    )


def _sizes() -> dict[str, float]:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {
        "memory": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "descriptors": float(len(os.listdir("/dev/fd"))),
        "threads": float(threading.active_count()),
    }


def _watch_folder(store: Path, end: float) -> list[float]:
    sizes = [0.0]
    step = max(0.2, (end - time.monotonic()) / SAMPLES)
    while time.monotonic() < end:
        time.sleep(step)
        sizes.append(_size(store))
    return sizes


def _size(store: Path) -> float:
    total = 0
    for folder, _, names in os.walk(store):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                # It was evicted meanwhile.
                continue
    return round(total / 2**20, 2)


def _thirds(values: list[float]) -> list[float]:
    """The greatest of the first third and of the last one; what a process needs to begin is not counted."""
    third = max(1, len(values) // 3)
    return [max(values[1 : third + 1] or values), max(values[-third:])]
