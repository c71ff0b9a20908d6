"""The one lock under many threads: what the books promise holds whenever it is let go, and everybody is served."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from agent_memory_core.manager import ModelConfig, ModelLoadFailed
from agent_memory_core.manager.books import Books, Entry, State
from agent_memory_core.manager.handle import HeldIterator
from agent_memory_core.manager.pool import Pool, Slot

SIZES = {"a": 9, "b": 6, "c": 4, "d": 3, "e": 2}
"""Of a limit of 10."""


class WatchedLock(threading.Condition):
    """Looks at the books whenever it is let go."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.broken: list[str] = []

    def look(self) -> None:
        books = self.pool.books
        if books.used + books.reserved > books.limit:
            self.broken.append(f"over the limit: {books.in_the_way()}")
        for entry in books.entries.values():
            if entry.leases and entry.state is not State.READY:
                self.broken.append(f"{entry.name} is in use and {entry.state}")

    def wait(self, timeout: float | None = None) -> bool:
        self.look()
        return super().wait(timeout)

    def __exit__(self, *error: Any) -> None:
        self.look()
        super().__exit__(*error)


@dataclass
class Weights:
    """What takes so long to load, and fails now and then."""

    seconds: float
    failing: random.Random
    inside: int = 0
    """Calls of the model now; it is freed when there is none."""

    native = tokenizer = None

    def estimate(self, config: ModelConfig, limit: int) -> int:
        return SIZES[config.name]

    def load(self, config: ModelConfig, limit: int) -> Any:
        time.sleep(self.seconds)
        if self.failing.random() < 0.05:
            raise OSError("now and then")
        self.nbytes = SIZES[config.name]
        return self

    def chat(self, asked: Any) -> Any:
        raise NotImplementedError

    def cancel(self) -> None:
        raise NotImplementedError

    def unload(self) -> None:
        assert self.inside == 0
        time.sleep(self.seconds)


def opened(seed: int, fair_after: float) -> Pool:
    pool = Pool(Books(10, fair_after=fair_after), time.monotonic, 60, lambda event, name: None)
    pool.changed = WatchedLock(pool)
    for name, size in SIZES.items():
        entry = pool.books.entries[name] = Entry(name, need=size, priority=ord(name) % 5 + 1)
        config = ModelConfig(name=name, type="openai", path=name)
        pool.slots[name] = Slot(config, entry, Weights(0.002, random.Random(f"{seed} {name}")), 10)
    return pool


def use(pool: Pool, name: str, seconds: float) -> bool:
    """Hold a model for so long; False if it could not be loaded."""
    try:
        with pool.leased(pool.slots[name]) as loaded:
            with pool.changed:
                loaded.inside += 1  # type: ignore[attr-defined]
            time.sleep(seconds)
            with pool.changed:
                loaded.inside -= 1  # type: ignore[attr-defined]
    except ModelLoadFailed:
        return False
    return True


@pytest.mark.parametrize("seed", range(3))
def test_twenty_four_threads_break_nothing_and_all_are_served(seed: int) -> None:
    pool = opened(seed, fair_after=0.05)
    stop = threading.Event()

    def keep_house() -> None:
        while not stop.is_set():
            pool.unload(pool.slots[random.choice("abcde")], force=False, timeout=0)
            time.sleep(0.01)

    def ask(number: int) -> list[bool]:
        chance = random.Random(f"{seed} {number}")
        return [use(pool, chance.choice("aaabcde"), chance.random() * 0.004) for _ in range(10)]

    keeper = threading.Thread(target=keep_house)
    keeper.start()
    with ThreadPoolExecutor(24) as threads:
        served = [good for answers in threads.map(ask, range(24)) for good in answers]
    stop.set()
    keeper.join()
    assert pool.changed.broken == []  # type: ignore[attr-defined]
    assert pool.books.line == []
    assert all(not entry.leases and not entry.promised for entry in pool.books.entries.values())
    loads = [entry.load_count for entry in pool.books.entries.values()]
    assert all(loads)
    # A load fails now and then, and all who wait for it are told; what was served was leased.
    assert 0 < sum(served) <= sum(entry.access_count for entry in pool.books.entries.values())


def test_nobody_starves_beside_a_model_that_is_never_idle() -> None:
    pool = opened(0, fair_after=0.02)
    for slot in pool.slots.values():
        slot.backend.failing = random.Random(7)  # type: ignore[attr-defined]
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            use(pool, "a", 0.003)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(9):
            while not use(pool, "b", 0):
                pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert pool.books.entries["b"].load_count >= 1
    assert pool.changed.broken == []  # type: ignore[attr-defined]


def test_who_holds_a_model_gets_it_again_though_another_waits_for_its_room() -> None:
    """Also in another thread: what it waits for would only end with it."""
    pool = opened(0, fair_after=0.0)
    for slot in pool.slots.values():
        slot.backend.failing = random.Random(7)  # type: ignore[attr-defined]
    give_back = pool.hold(pool.slots["a"])
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(use, pool, "b", 0)
        while pool.books.entries["a"].draining is None:
            time.sleep(0.001)
        assert threads.submit(use, pool, "a", 0).result(5)
        assert not other.done()
        give_back()
        give_back()
        assert other.result(5)
    assert pool.books.entries["a"].leases == pool.slots["a"].holds == 0


def test_an_iterator_that_is_closed_while_it_is_read_ends_after_that_piece() -> None:
    released: list[bool] = []
    asked, told = threading.Event(), threading.Event()

    def pieces() -> Iterator[int]:
        asked.set()
        told.wait(5)
        yield 1
        yield 2

    held = HeldIterator(pieces(), lambda: released.append(True))
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(next, held)
        assert asked.wait(5)
        held.close()
        told.set()
        assert reading.result(5) == 1
    assert released == [True]
    assert list(held) == []
