"""At most so many agents are in memory, each has one turn at a time, and whoever waits is served or told."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field

import pytest

from agent_memory_core import StoreError
from agent_memory_core.agents import AgentsBusy
from agent_memory_core.agents.seats import Seats

_clock = iter(range(10**9))


@dataclass
class Guest:
    name: str
    used: int = field(default_factory=lambda: next(_clock))

    @property
    def order(self) -> tuple[object, str]:
        return self.used, self.name


class House:
    """Seats whose guests leave by hand."""

    def __init__(self, most: int, timeout: float = 10.0) -> None:
        self.left: list[str] = []
        self.locked: set[str] = set()
        self.seats = Seats[Guest](most, timeout, self.leave)

    def leave(self, guest: Guest) -> None:
        if guest.name in self.locked:
            raise StoreError(f"{guest.name} cannot leave")
        self.left.append(guest.name)

    def visit(self, name: str) -> Guest:
        with self.seats.turn(name):
            guest = self.seats.seat(name, lambda: Guest(name))
            guest.used = next(_clock)
            return guest


def test_the_one_used_longest_ago_leaves() -> None:
    house = House(2)
    for name in ("a", "b", "a", "c"):
        house.visit(name)
    assert (house.left, set(house.seats.sitting())) == (["b"], {"a", "c"})
    assert house.seats.evict() == "a"
    assert [house.seats.evict(), house.seats.evict()] == ["c", None]


def test_between_equals_the_name_decides() -> None:
    house = House(2)
    for name in ("b", "a"):
        house.visit(name).used = -1
    house.visit("c")
    assert house.left == ["a"]


def test_who_cannot_leave_stays_and_the_newcomer_takes_no_seat() -> None:
    house = House(1)
    house.visit("a")
    house.locked.add("a")
    for attempt in (lambda: house.visit("b"), house.seats.evict):
        with pytest.raises(StoreError, match="a cannot leave"):
            attempt()
        assert set(house.seats.sitting()) == {"a"}
    house.locked.clear()
    house.visit("b")
    assert set(house.seats.sitting()) == {"b"}


def test_who_cannot_come_takes_no_seat() -> None:
    house = House(1)

    def fail() -> Guest:
        raise StoreError("it cannot come")

    with house.seats.turn("a"), pytest.raises(StoreError, match="cannot come"):
        house.seats.seat("a", fail)
    house.visit("b")
    assert (house.left, set(house.seats.sitting())) == ([], {"b"})


def test_a_turn_ends_once_and_the_next_waits_for_it() -> None:
    house = House(1, timeout=0.05)
    ticket = house.seats.begin("a")
    with pytest.raises(AgentsBusy, match="'a'"):
        house.seats.begin("a")
    house.seats.end("a", ticket)
    again = house.seats.begin("a")
    house.seats.end("a", ticket)
    with pytest.raises(AgentsBusy):
        house.seats.begin("a")
    house.seats.end("a", again)


def test_under_load_everybody_is_served_one_at_a_time_and_in_order() -> None:
    house, names = House(3), [f"agent {n}" for n in range(8)]
    inside: dict[str, int] = dict.fromkeys(names, 0)
    faults: list[str] = []

    def work(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(40):
            name = order.choice(names)
            with house.seats.turn(name):
                guest = house.seats.seat(name, lambda name=name: Guest(name))  # type: ignore[misc]
                inside[name] += 1
                if inside[name] != 1 or name not in house.seats.sitting():
                    faults.append(name)
                if len(house.seats.sitting()) > 3:
                    faults.append("too many")
                time.sleep(0.0002)
                guest.used = next(_clock)
                inside[name] -= 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(house.seats.sitting()) == 3
