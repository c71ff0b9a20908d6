"""The books of the manager: the limit is kept after every step, and everybody in line is served in the end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent_memory_core.manager.books import Books, Entry, Next, State, Ticket
from agent_memory_core.manager.errors import ModelTooLarge


def ready(books: Books, name: str, nbytes: int, **values: Any) -> Entry:
    entry = books.entries[name] = Entry(name, need=nbytes, nbytes=nbytes, state=State.READY, **values)
    return entry


ORDER: dict[str, tuple[list[dict[str, Any]], int, list[str]]] = {
    "idle too long goes before priority": (
        [
            {"name": "a", "nbytes": 5, "priority": 1, "idle_limit": 10},
            {"name": "b", "nbytes": 5, "priority": 5},
        ],
        5,
        ["a"],
    ),
    "the least important first": (
        [{"name": "a", "nbytes": 5, "priority": 1}, {"name": "b", "nbytes": 5, "priority": 5}],
        5,
        ["b"],
    ),
    "then the longest unused": (
        [{"name": "a", "nbytes": 5, "last_access": 2.0}, {"name": "b", "nbytes": 5, "last_access": 1.0}],
        5,
        ["b"],
    ),
    "then the largest": ([{"name": "a", "nbytes": 5}, {"name": "b", "nbytes": 6}], 5, ["b"]),
    "then by name": ([{"name": "b", "nbytes": 5}, {"name": "a", "nbytes": 5}], 5, ["a"]),
    "no more than needed": (
        [
            {"name": "a", "nbytes": 2, "last_access": 1.0},
            {"name": "b", "nbytes": 8, "last_access": 2.0},
            {"name": "c", "nbytes": 17, "last_access": 3.0},
        ],
        15,
        ["c"],
    ),
    "pinned ones stay": ([{"name": "a", "nbytes": 5, "pinned": True}], 5, []),
    "those in use stay": ([{"name": "a", "nbytes": 5, "leases": 1}], 5, []),
    "what takes nothing stays": ([{"name": "a", "nbytes": 0}, {"name": "b", "nbytes": 5}], 5, ["b"]),
    "all or none": ([{"name": "a", "nbytes": 5}], 6, []),
}


@pytest.mark.parametrize("case", list(ORDER))
def test_who_makes_room(case: str) -> None:
    models, lacking, expected = ORDER[case]
    books = Books(100)
    for model in models:
        ready(books, **model)
    assert [entry.name for entry in books.victims(lacking, 100.0, 3)] == expected


def test_with_strict_priority_only_lesser_ones_make_room() -> None:
    books = Books(10, strict_priority=True)
    ready(books, "a", 10, priority=1)
    assert books.victims(10, 0.0, 3) == []
    assert books.victims(10, 0.0, 1) == [books.entries["a"]]


def test_a_model_stays_as_long_as_it_must() -> None:
    books = Books(10, min_loaded_time=5)
    ready(books, "a", 10, loaded_at=1.0)
    assert books.victims(10, 5.0, 3) == []
    assert books.victims(10, 6.0, 3) == [books.entries["a"]]


def test_what_never_fits_evicts_nothing_and_names_what_is_pinned() -> None:
    books = Books(10)
    ready(books, "kept", 4, pinned=True)
    ready(books, "idle", 6)
    large = books.entries["large"] = Entry("large", need=7)
    with pytest.raises(ModelTooLarge, match="kept"):
        books.step(large, None, 0.0)
    assert books.entries["idle"].state is State.READY
    assert books.line == []


def test_a_model_that_is_always_in_use_makes_way_after_a_while() -> None:
    books = Books(10, fair_after=5)
    busy = ready(books, "busy", 9)
    other = books.entries["other"] = Entry("other", need=6)
    assert books.step(busy, None, 0.0).next is Next.USE
    step = books.step(other, None, 0.0)
    assert step.next is Next.WAIT
    assert books.step(busy, None, 4.0).next is Next.USE, "those who use what is loaded do not wait"
    assert books.step(other, step.ticket, 5.0).next is Next.WAIT
    behind = books.step(busy, None, 5.0)
    assert behind.next is Next.WAIT
    books.release(busy, 6.0)
    books.release(busy, 6.0)
    assert books.step(other, step.ticket, 6.0).next is Next.MAKE_ROOM
    books.unloaded(busy, evicted=True)
    assert books.step(other, step.ticket, 7.0).next is Next.LOAD
    assert books.step(busy, behind.ticket, 7.0).next is Next.WAIT


def test_a_drained_model_serves_again_when_nobody_needs_its_room() -> None:
    books = Books(10, fair_after=0)
    busy = ready(books, "busy", 9, leases=1)
    other = books.entries["other"] = Entry("other", need=6)
    step = books.step(other, None, 0.0)
    assert busy.draining is step.ticket
    books.leave_line(step.ticket)
    assert books.step(busy, None, 1.0).next is Next.USE


class Machine(RuleBasedStateMachine):
    """Callers come, wait, are served, fail and give up, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.books = Books(10, fair_after=3)
        for name, need, priority, pinned in (
            ("a", 4, 1, False),
            ("b", 6, 3, False),
            ("c", 3, 5, False),
            ("d", 9, 3, False),
            ("e", 2, 2, True),
            ("free", 0, 3, False),
        ):
            self.books.entries[name] = Entry(name, need=need, priority=priority, pinned=pinned, idle_limit=20)
        self.waiting: list[Ticket] = []
        self.loading: list[Entry] = []
        self.unloading: list[Entry] = []
        self.following: list[Entry] = []
        self.leased: list[Entry] = []

    def take(self, entry: Entry, ticket: Ticket | None) -> None:
        if ticket is not None:
            self.waiting.remove(ticket)
        try:
            step = self.books.step(entry, ticket, self.now)
        except ModelTooLarge:
            return
        if step.next is Next.USE:
            self.leased.append(entry)
        elif step.next is Next.LOAD:
            self.loading.append(entry)
        elif step.next is Next.FOLLOW:
            self.following.append(entry)
        else:
            assert step.ticket is not None
            self.waiting.append(step.ticket)
            if step.next is Next.MAKE_ROOM:
                self.unloading += step.ticket.victims

    @rule(name=st.sampled_from("abcde") | st.just("free"))
    def ask(self, name: str) -> None:
        self.take(self.books.entries[name], None)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.take(ticket.entry, ticket)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(ticket)
        self.books.leave_line(ticket)

    @precondition(lambda self: self.loading)
    @rule(fails=st.booleans(), data=st.data())
    def end_load(self, fails: bool, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.loading))
        self.loading.remove(entry)
        followers = [e for e in self.following if e is entry]
        self.following = [e for e in self.following if e is not entry]
        if fails:
            self.books.failed(entry, OSError("broken"))
        else:
            self.books.loaded(entry, entry.need, 0.1, self.now)
            self.leased += [entry, *followers]

    @precondition(lambda self: self.unloading)
    @rule(data=st.data())
    def end_unload(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.unloading))
        self.unloading.remove(entry)
        self.books.unloaded(entry, evicted=True)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.leased))
        self.leased.remove(entry)
        self.books.release(entry, self.now)

    @rule(name=st.sampled_from("abcde"))
    def unload(self, name: str) -> None:
        entry = self.books.entries[name]
        if self.books.begin_unload(entry):
            self.unloading.append(entry)

    @rule(seconds=st.sampled_from([0.5, 2.0, 30.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.unloading += self.books.expired(self.now)

    @invariant()
    def the_limit_is_kept(self) -> None:
        assert self.books.used + self.books.reserved <= self.books.limit
        assert all(ticket.reserved >= 0 for ticket in self.books.line)

    @invariant()
    def who_is_leased_is_ready(self) -> None:
        for entry in self.books.entries.values():
            assert entry.leases == self.leased.count(entry)
            assert not entry.leases or entry.state is State.READY
            assert (entry.nbytes == 0) == (entry.state in (State.UNLOADED, State.FAILED) or entry.need == 0)

    @invariant()
    def who_drains_a_model_is_in_line(self) -> None:
        assert self.books.line == self.waiting or set(self.books.line) == set(self.waiting)
        for entry in self.books.entries.values():
            assert entry.draining is None or entry.draining in self.books.line

    def teardown(self) -> None:
        """Everybody who waits is served, once the others have ended."""
        for _ in range(60):
            while self.leased:
                self.books.release(self.leased.pop(), self.now)
            while self.unloading:
                self.books.unloaded(self.unloading.pop(), evicted=True)
            while self.loading:
                entry = self.loading.pop()
                self.books.loaded(entry, entry.need, 0.1, self.now)
                self.leased += [entry] * entry.leases
            self.following = []
            self.now += 1
            for ticket in list(self.waiting):
                self.take(ticket.entry, ticket)
            if not self.waiting:
                return
        raise AssertionError(f"{[ticket.entry.name for ticket in self.waiting]} wait for ever")


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestBooks = Machine.TestCase
