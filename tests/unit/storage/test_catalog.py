"""The catalog as a whole against a plain model of it, and the notes of other dependencies of the program."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.catalog_rows import catalog_at, evictable_bytes, keys, named, rows, window_rows
from support.stored_turns import (
    BLOCK,
    FILE,
    ROOT,
    wanted,
)

from agent_memory_core.blocks.block import (
    BlockHash,
)
from agent_memory_core.errors import InvalidRequest, SessionNotFound, StoreError, StoreFull


def test_a_note_stands_until_the_next_one_and_other_catalogs_read_it(tmp_path: Path) -> None:
    catalog, other = catalog_at(tmp_path / "catalog.db"), catalog_at(tmp_path / "catalog.db")
    assert catalog.note("a key") is None
    for text in ("good", "bad"):
        catalog.write_note("a key", text)
        assert other.note("a key") == text
    assert other.note("another key") is None
    other.close()
    catalog.close()
    with pytest.raises(StoreError, match="closed"):
        catalog.write_note("a key", "good")


SESSIONS = ("a", "b", "c")


class Books(RuleBasedStateMachine):
    """Random turns, retries, forks, losses and evictions against a plain model of what is reached.

    The model knows the tokens of every branch and the set of rows that must be there because a branch reaches
    them; the catalog may hold more, but nothing that hangs from nothing.
    """

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.catalog = catalog_at(Path(self.folder.name) / "catalog.db")
        self.branches: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.dependencies: dict[int, set[BlockHash]] = {}
        self.pinned: set[str] = set()
        self.lost: set[BlockHash] = set()

    def teardown(self) -> None:
        self.catalog.close()
        self.folder.cleanup()

    @rule(
        session=st.sampled_from(SESSIONS),
        start=st.integers(0, 30),
        new=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        needed=st.sets(st.integers(0, 6), max_size=3),
        given=st.sets(st.integers(0, 6), max_size=3),
        data=st.data(),
        stale=st.booleans(),
    )
    def turn(
        self,
        session: str,
        start: int,
        new: list[int],
        needed: set[int],
        given: set[int],
        data: st.DataObject,
        stale: bool,
    ) -> None:
        mine = sorted(i for i, (owner, _) in self.branches.items() if owner == session)
        chosen = data.draw(st.sampled_from([None, *mine]))
        known = self.branches[chosen][1] if chosen is not None else ()
        tokens = (*known[:start], *new)
        rows_now = {row.branch_id: row for row in self.catalog.branches.of_session("default", session, ROOT)}
        full = range(len(tokens) // BLOCK)
        dependencies, extra = (
            window_rows(tokens, [i for i in full if i in some]) for some in (needed, given)
        )
        wish = wanted(
            tokens, session, rows_now.get(chosen) if chosen else None, dependencies=named(dependencies)
        )
        if stale:
            wish = replace(wish, generation=wish.generation - 1)
        moves = chosen is not None and not stale
        before = self.dependencies[chosen] if chosen is not None and moves else set()
        can = set(self.catalog.records.keys()) | set(named(extra)) | before
        made, superseded = self.catalog.branches.commit([*rows(tokens), *extra], wish)
        assert (made.branch_id == chosen) == moves
        self.branches[made.branch_id] = (session, tokens)
        self.dependencies[made.branch_id] = set(wish.dependencies) & can
        self.lost -= {*keys(tokens), *named(extra)}
        live = {row.branch_id for row in self.catalog.branches.of_session("default", session, ROOT)}
        assert not set(named(superseded)) & self.reached()
        assert not (before - self.reached()) & set(self.catalog.records.keys())
        for gone in set(mine) - live:
            assert len(mine) >= 16
            self._gone(gone)

    def _gone(self, branch_id: int) -> None:
        del self.branches[branch_id], self.dependencies[branch_id]

    @rule(old=st.sampled_from(SESSIONS), new=st.sampled_from(SESSIONS))
    def fork(self, old: str, new: str) -> None:
        owners = {owner for owner, _ in self.branches.values()}
        if old not in owners or self.catalog.branches.session_state(ROOT, "default", new) != "new":
            with pytest.raises((SessionNotFound, InvalidRequest)):
                self.catalog.branches.fork("default", old, new)
            return
        self.catalog.branches.fork("default", old, new)
        copied = [i for i, (owner, _) in sorted(self.branches.items()) if owner == old]
        for row, source in zip(self.catalog.branches.of_session("default", new, ROOT), copied, strict=True):
            self.branches[row.branch_id] = (new, self.branches[source][1])
            self.dependencies[row.branch_id] = set(self.dependencies[source])

    @rule(session=st.sampled_from(SESSIONS))
    def forget(self, session: str) -> None:
        before = set(self.catalog.records.keys())
        try:
            gone = {row.key for row in self.catalog.branches.forget("default", session) if row.nbytes}
        except SessionNotFound:
            assert all(owner != session for owner, _ in self.branches.values())
            return
        for i in [i for i, (owner, _) in self.branches.items() if owner == session]:
            self._gone(i)
        self.pinned.discard(session)
        assert before - gone == set(self.catalog.records.keys())
        assert not gone & self.reached()

    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        if self.branches:
            session = data.draw(st.sampled_from(sorted({owner for owner, _ in self.branches.values()})))
            self.catalog.branches.pin("default", session, pinned)
            (self.pinned.add if pinned else self.pinned.discard)(session)

    @rule(data=st.data())
    def lose_a_file(self, data: st.DataObject) -> None:
        stored = sorted(self.catalog.records.keys())
        if stored:
            key = data.draw(st.sampled_from(stored))
            self.catalog.records.mark_lost([key])
            self.lost.add(key)

    @rule(count=st.integers(1, 12))
    def evict(self, count: int) -> None:
        evictable, before = evictable_bytes(self.catalog), self.catalog.budget.total_bytes()
        try:
            gone = self.catalog.budget.evict(count * FILE)
        except StoreFull:
            assert evictable < count * FILE
            assert self.catalog.budget.total_bytes() == before
            return
        assert evictable >= count * FILE
        assert before - self.catalog.budget.total_bytes() == count * FILE == sum(row.nbytes for row in gone)
        live = {
            row.branch_id
            for name in SESSIONS
            for row in self.catalog.branches.of_session("default", name, ROOT)
        }
        expired = set(self.branches) - live
        assert all(self.branches[i][0] not in self.pinned for i in expired)
        for i in expired:
            self._gone(i)
        self.lost -= {row.key for row in gone}

    def reached(self) -> set[BlockHash]:
        chains = {key for _, tokens in self.branches.values() for key in keys(tokens)}
        return chains.union(*self.dependencies.values())

    @invariant()
    def counts_are_those_of_the_rows(self) -> None:
        assert self.catalog.records.recount(fix=False) == []

    @invariant()
    def every_branch_is_whole(self) -> None:
        rows_now = [
            row for name in SESSIONS for row in self.catalog.branches.of_session("default", name, ROOT)
        ]
        assert {
            row.branch_id: (row.session_id, self.catalog.branches.tokens(row)) for row in rows_now
        } == self.branches

    @invariant()
    def every_branch_has_its_dependencies(self) -> None:
        with self.catalog.transaction():
            assert {i: self.catalog.branches.dependencies(i) for i in self.branches} == self.dependencies

    @invariant()
    def what_a_branch_reaches_is_stored_unless_it_was_lost(self) -> None:
        stored = set(self.catalog.records.keys())
        assert self.reached() - stored <= self.lost
        assert not stored & self.lost

    @invariant()
    def nothing_hangs_from_nothing(self) -> None:
        with self.catalog.transaction() as db:
            orphans = db.execute(
                "SELECT count(*) FROM records WHERE parent <> ? AND parent NOT IN (SELECT key FROM records)",
                (ROOT,),
            ).fetchone()
        assert orphans == (0,)


Books.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


TestBooks = Books.TestCase
