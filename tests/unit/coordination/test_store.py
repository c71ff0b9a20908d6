"""The file of the sessions: all or nothing, and nothing of a version that is not known."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from support.people import people

from agent_memory_core import SessionNotFound, StoreError, StoreUnreadable
from agent_memory_core.coordination import Book, Draft, SessionSpec, ask, begin, tell
from agent_memory_core.coordination.books import mind_after
from agent_memory_core.coordination.store import VERSION, Store

SPEC = SessionSpec.of(
    {
        "agents": people("ann", "bob", lifecycle="permanent"),
        "initial_prompt": "A game.",
        "per_agent_prompts": {"bob": "You lose."},
        "persistent_cache_prefix": "game",
    }
)


def created(store: Store, session_id: str = "s") -> Book:
    book = begin(SPEC)
    store.create(session_id, "default", book, Draft(replace(book, events=()), list(book.events)))
    return book


def one_turn(book: Book) -> Draft:
    draft = Draft(book)
    tell(draft, ask(book, book.spec.agents[0]), "Hello.")
    draft.add("whisper", "ann", "Psst.", ["bob"])
    return draft


def test_what_was_kept_is_read_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db")
    draft = one_turn(created(store))
    store.append("s", draft, [{"turn": 0}])
    store.close()
    again = Store(tmp_path / "c.db")
    assert again.load("s", "default").book == draft.done()
    assert again.notes("s", "stats") == [{"turn": 0}]
    assert again.ids("default") == ["s"]
    assert again.ids("other") == []


def test_a_turn_is_kept_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path / "c.db")
    draft = one_turn(created(store))
    before = store.load("s", "default").book
    clash = Draft(before, draft.events, [draft.spoken[0], draft.spoken[0]])
    store.note("s", "spoken", [{}])
    with pytest.raises(StoreError, match="cannot be read or written"):
        store.append("s", clash)
    assert len(store.notes("s", "event")) == len(before.events)


def test_a_session_that_was_deleted_takes_nothing_and_leaves_what_was_remembered() -> None:
    store = Store(None)
    book = created(store)
    draft = one_turn(book)
    store.append("s", draft)
    mind = mind_after(draft.done(), "ann")
    store.keep_minds("s", {"ann": mind})
    store.delete("s")
    with pytest.raises(SessionNotFound):
        store.append("s", draft)
    with pytest.raises(SessionNotFound):
        store.load("s", "default")
    assert store.mind("default", "game", "ann") == (mind, "")
    assert store.mind("other", "game", "ann") is None
    assert store.in_sessions("default", "game") == {"s"}
    assert sorted(store.forget_minds("default", "game")) == ["ann", "bob"]


def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text(
        "This is not a database, and it is long enough to be seen as none. " * 20
    )
    with pytest.raises(StoreUnreadable, match="cannot be opened"):
        Store(tmp_path / "text.db")
    Store(tmp_path / "newer.db").close()
    with sqlite3.connect(tmp_path / "newer.db") as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(StoreUnreadable, match=f"version {VERSION + 1}"):
        Store(tmp_path / "newer.db")
