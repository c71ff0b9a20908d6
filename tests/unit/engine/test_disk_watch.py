"""What is known of a disk without asking it, and how it is noticed that it can be written again."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from agent_memory_core.engine.disk_watch import DiskWatch
from agent_memory_core.errors import OverBudget, StoreError, StoreFull


class Clock:
    """Takes what is to be done later; `pass_by` does it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pauses: list[float] = []
        self._due: list[Callable[[], None]] = []
        monkeypatch.setattr(threading, "Timer", self._timer)

    def _timer(self, pause: float, job: Callable[..., None], given: tuple[object, ...]) -> threading.Thread:
        self.pauses.append(pause)
        self._due.append(lambda: job(*given))
        return threading.Thread()

    def pass_by(self) -> None:
        due, self._due = self._due, []
        for job in due:
            job()


class Disk:
    """What fails while it has an error."""

    error: Exception | None = None

    def try_to_write(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def watch(disk: Disk, clock: Clock) -> DiskWatch:
    return DiskWatch(disk.try_to_write, lambda job: job(), patience=60)


def trouble(watch: DiskWatch) -> str | None:
    """What it says now, which a type checker would take to be what it said before."""
    return watch.trouble


def test_a_save_that_failed_is_trouble_until_one_works(watch: DiskWatch, clock: Clock) -> None:
    assert trouble(watch) is None
    watch.failed(OSError(5, "an input error"))
    assert "an input error" in (trouble(watch) or "")
    watch.failed(StoreFull("no room"))
    assert trouble(watch) == "no room"
    assert clock.pauses == [DiskWatch.FIRST], "one try for both"
    watch.worked()
    assert trouble(watch) is None
    clock.pass_by()
    assert len(clock.pauses) == 1, "nothing is tried where nothing is wrong"


def test_where_no_turns_come_any_more_a_try_tells(watch: DiskWatch, clock: Clock, disk: Disk) -> None:
    disk.error = StoreError("the catalog cannot be written")
    watch.failed(StoreFull("no room"))
    clock.pass_by()
    assert watch.trouble == "the catalog cannot be written"
    disk.error = None
    clock.pass_by()
    assert watch.trouble is None


def test_tries_that_prove_nothing_become_rare_until_a_turn_is_saved(watch: DiskWatch, clock: Clock) -> None:
    for _ in range(6):
        watch.failed(StoreFull("no room"))
        clock.pass_by()
        assert watch.trouble is None
    assert clock.pauses == [5, 10, 20, 40, 60, 60]
    watch.worked()
    watch.failed(StoreFull("no room"))
    assert clock.pauses[-1] == DiskWatch.FIRST


def test_a_budget_without_room_is_not_the_disks_trouble(watch: DiskWatch, clock: Clock) -> None:
    watch.failed(OverBudget("all sessions are pinned"))
    assert (watch.trouble, clock.pauses) == (None, [])


def test_a_disk_that_does_not_answer_is_trouble_while_it_does_not(disk: Disk) -> None:
    watch = DiskWatch(disk.try_to_write, lambda job: job(), patience=0)
    with watch.asking():
        assert "has not answered" in (watch.trouble or "")
    assert watch.trouble is None


def test_the_end_waits_for_no_try(disk: Disk) -> None:
    tried: list[object] = []
    watch = DiskWatch(disk.try_to_write, tried.append, patience=60)
    watch.failed(StoreFull("no room"))
    timer = watch._timer
    assert timer is not None
    watch.close()
    timer.join(10)
    assert (timer.daemon, timer.is_alive(), tried) == (True, False, [])
