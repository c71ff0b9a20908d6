"""The book keeps who agents are and what was said, for several processes, sealed where the store is."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.keys import KEY, give

from agent_memory_core import AgentMemory, InvalidRequest, Message, StoreError, ToolCall
from agent_memory_core.agents import AgentExists
from agent_memory_core.agents.book import FILE, AgentBook, AgentRecord

OpenBook = Callable[..., AgentBook]
SAID = [Message("user", "Hello."), Message("assistant", "Hello, Ada.")]


@pytest.fixture
def open_book(tmp_path: Path) -> Iterator[OpenBook]:
    opened: list[AgentBook] = []

    def open_one(namespace: str = "default", **settings: Any) -> AgentBook:
        with AgentMemory(cache_dir=tmp_path, min_free_mb=0, **settings) as memory:
            opened.append(AgentBook(tmp_path, namespace, memory.cipher(namespace)))
        return opened[-1]

    yield open_one
    for book in opened:
        book.close()


def record(agent_id: str = "ada") -> AgentRecord:
    return AgentRecord(agent_id, "technical", "You help.", "tiny-chat", metadata={"team": "red"})


def test_what_is_written_is_read_by_another(open_book: OpenBook, tmp_path: Path) -> None:
    first, second = open_book(), open_book()
    first.add(record())
    call = Message(
        "assistant", "", tool_calls=(ToolCall("find", {"b": 1, "a": [2]}, "c1"),), reasoning="Look."
    )
    result = Message("tool", "found", name="find", tool_call_id="c1")
    second.append("ada", [*SAID, call, result], "other-model")
    assert first.messages("ada") == [*SAID, call, result]
    found = first.get("ada")
    assert found is not None
    assert (found.system_prompt, found.metadata, found.model) == ("You help.", {"team": "red"}, "other-model")
    assert [(each.agent_id, count) for each, count in second.all()] == [("ada", 4)]
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_namespaces_know_nothing_of_each_other(open_book: OpenBook) -> None:
    ours, theirs = open_book(), open_book("other")
    ours.add(record())
    theirs.append("ada", SAID, "m")
    assert (theirs.get("ada"), theirs.all(), theirs.messages("ada")) == (None, [], [])
    assert not theirs.delete("ada")
    assert ours.messages("ada") == []


def test_an_id_is_taken_once_and_free_after_it_was_deleted(open_book: OpenBook) -> None:
    book = open_book()
    book.add(record(), SAID)
    with pytest.raises(InvalidRequest, match="'ada'"):
        book.add(record())
    book.copy("ada", "eve")
    assert book.delete("ada")
    assert not book.delete("ada")
    assert book.messages("eve") == SAID
    book.add(record())
    assert book.messages("ada") == []
    book.clear("eve")
    assert (book.messages("eve"), book.get("eve") is None) == ([], False)


def test_of_many_who_make_one_id_at_a_moment_only_one_does(open_book: OpenBook) -> None:
    """Each has a connection of its own, as processes have. What the winner wrote is not written over."""
    books = [open_book() for _ in range(4)]
    start = threading.Barrier(len(books))

    def make(number: int, name: str) -> bool:
        start.wait(10)
        try:
            books[number].add(record(name), [Message("user", str(number))])
        except AgentExists:
            return False
        return True

    with ThreadPoolExecutor(len(books)) as threads:
        for turn in range(10):
            name = f"agent {turn}"
            made = list(threads.map(make, range(len(books)), [name] * len(books)))
            assert sum(made) == 1
            assert [message.content for message in books[0].messages(name)] == [str(made.index(True))]


def test_two_processes_lose_no_row_of_each_other(open_book: OpenBook, tmp_path: Path) -> None:
    book = open_book()
    book.add(record())
    program = (
        "import sys\nfrom pathlib import Path\nfrom agent_memory_core import AgentMemory, Message\n"
        "from agent_memory_core.agents.book import AgentBook\n"
        "book = AgentBook(Path(sys.argv[1]), 'default', AgentMemory(cache_dir=None).cipher())\n"
        "for n in range(40):\n"
        "    book.append('ada', [Message('user', f'{sys.argv[2]} {n}'), Message('assistant', str(n))], 'm')\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name]) for name in "xy"]
    assert [process.wait(60) for process in running] == [0, 0]
    said = book.messages("ada")
    assert [message.role for message in said] == ["user", "assistant"] * 80
    for name in "xy":
        own = [message.content for message in said if message.content.startswith(name)]
        assert own == [f"{name} {n}" for n in range(40)]


def test_an_encrypted_store_has_no_word_in_the_clear(
    open_book: OpenBook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, KEY)
    book = open_book(encryption="env")
    book.add(record(), SAID)
    assert (book.messages("ada"), book.get("ada")) == (SAID, book.all()[0][0])
    assert book.get("ada") is not None
    held = b"".join(path.read_bytes() for path in tmp_path.glob(f"{FILE}*"))
    assert all(word not in held for word in (b"You help", b"Hello", b"red"))
    with AgentMemory(cache_dir=tmp_path, min_free_mb=0, encryption="env") as memory:
        memory.forget_namespace("default")
    # The key of the namespace is gone, and with it all that was said.
    again = open_book(encryption="env")
    assert (again.get("ada"), again.all(), again.messages("ada")) == (None, [], [])
    again.add(record())
    assert again.get("ada") is not None


def test_what_is_no_book_is_named_and_left_alone(open_book: OpenBook, tmp_path: Path) -> None:
    open_book().close()
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="version 99"):
        open_book()
    for path in tmp_path.glob(f"{FILE}*"):
        path.unlink()
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=r"agents\.db"):
        open_book()
