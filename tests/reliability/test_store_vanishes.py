"""Whatever becomes of the folder of a store, turns are answered, and saving begins again by itself.

Each harm is done to a store that is open, or between two openings of it. After it, every turn is answered, a new turn
is on disk, and it is there after the next opening.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import tiny_models

from agent_memory_core import AgentMemory, SessionKey
from agent_memory_core.storage.database import Database

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TEXT = "Tell me of Ada. " * 20
Harm = Callable[[Path], object]


def parts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def delete_all(folder: Path) -> None:
    for path in parts(folder):
        delete(path)


def deleting(name: str) -> Harm:
    return lambda folder: delete(folder / name)


def folder_in_tmp(folder: Path) -> None:
    (folder / "tmp" / "a" / "b").mkdir(parents=True)


def without_catalog(folder: Path) -> None:
    for path in folder.glob("catalog.db*"):
        path.unlink()


def of_other_kind(name: str, make: Callable[[Path], object]) -> Harm:
    def harm(folder: Path) -> None:
        if name == "catalog.db":
            without_catalog(folder)
        else:
            delete(folder / name)
        make(folder / name)

    return harm


def identity(make: Callable[[Path], object]) -> Harm:
    """The note of what the files belong to, which is read where the catalog is lost."""

    def harm(folder: Path) -> None:
        (path,) = folder.glob("ns/*/identity.json")
        path.unlink()
        make(path)
        without_catalog(folder)

    return harm


def replace_catalog(folder: Path) -> None:
    other = folder.with_name("other.db")
    shutil.copy(folder / "catalog.db", other)
    without_catalog(folder)
    other.rename(folder / "catalog.db")


def to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def to_file(path: Path) -> None:
    path.write_text("x")


WHILE_OPEN: dict[str, Harm] = {
    "the folder is deleted": shutil.rmtree,
    "all in it is deleted": delete_all,
    "the catalog is deleted": without_catalog,
    "the catalog is replaced": replace_catalog,
    "the catalog is garbage": of_other_kind("catalog.db", lambda path: path.write_bytes(b"garbage " * 500)),
    "the catalog is a folder": of_other_kind("catalog.db", Path.mkdir),
    **{f"{name} is deleted": deleting(name) for name in ("tmp", "ns", "quarantine")},
    "tmp is a file": of_other_kind("tmp", to_file),
    "quarantine is a file": of_other_kind("quarantine", to_file),
}
BETWEEN: dict[str, Harm] = {
    "a folder in tmp": folder_in_tmp,
    "a fifo in tmp": lambda folder: os.mkfifo(folder / "tmp" / "fifo"),
    **{
        f"{name} is a {kind}": of_other_kind(name, make)
        for name in ("SCHEMA", "tmp", "quarantine", "catalog.db")
        for kind, make in (("fifo", os.mkfifo), ("folder", Path.mkdir), ("link to a device", to_zero))
        if (name, kind) not in (("tmp", "folder"), ("quarantine", "folder"))
    },
    "tmp is a file": of_other_kind("tmp", to_file),
    "the identity is a fifo": identity(os.mkfifo),
    "the identity is a device": identity(to_zero),
    "the identity is deep": identity(lambda path: path.write_text("[" * 60_000)),
    "the identity is long": identity(lambda path: path.write_text("1" * 10**7)),
    "the identity is a number": identity(lambda path: path.write_text("1")),
    "the identity is a folder": identity(Path.mkdir),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.write(tmp_path_factory.mktemp("models") / "llama", tiny_models.LLAMA)


@pytest.fixture
def folder(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGENT_MEMORY_MODEL", model)
    return tmp_path / "store"


def memory_of(folder: Path) -> AgentMemory:
    return AgentMemory(cache_dir=folder, min_free_mb=0, block_tokens=64)


def ask(memory: AgentMemory, session: str, text: str = TEXT, namespace: str = "default") -> bool:
    """Take a turn, which has an answer whatever happens, and say whether it is on disk."""
    result = memory.chat(text, SessionKey(session, namespace), max_tokens=2, temperature=0)
    assert len(result.token_ids) == 2
    return result.report.persisted


def check_alive(memory: AgentMemory, folder: Path) -> None:
    """Turns of sessions that were there, of new ones and of new namespaces are answered and saved."""
    ask(memory, "before")
    assert ask(memory, "new", "Of Tom. " * 40)
    assert ask(memory, "new", "Of Rex. " * 40, "other")
    assert memory.stats().store.files > 0
    assert {"new"} <= {info.session_id for info in memory.sessions()}
    assert memory.forget("new", "other")
    memory.close()
    with memory_of(folder) as again:
        report = again.chat("Of Tom. " * 40, "new", max_tokens=2, temperature=0).report
        assert report.usage.cache_read > report.usage.prompt_tokens - 64
        assert not again.check().damaged


@pytest.fixture
def opened(folder: Path) -> Iterator[AgentMemory]:
    memory = memory_of(folder)
    assert ask(memory, "before")
    yield memory
    memory.close()


@pytest.mark.parametrize("harm", WHILE_OPEN)
def test_what_happens_to_an_open_store_costs_no_answer_and_saving_goes_on(
    folder: Path, opened: AgentMemory, harm: str
) -> None:
    WHILE_OPEN[harm](folder)
    check_alive(opened, folder)


@pytest.mark.parametrize(
    "harm",
    [
        harm if number % 3 == 0 else pytest.param(harm, marks=pytest.mark.heavy)
        for number, harm in enumerate(BETWEEN)
    ],
)
def test_a_store_opens_whatever_stands_in_its_way(folder: Path, opened: AgentMemory, harm: str) -> None:
    opened.close()
    BETWEEN[harm](folder)
    check_alive(memory_of(folder), folder)


def test_a_volume_that_cannot_be_asked_costs_only_the_saving(
    folder: Path, opened: AgentMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", fails)
        assert not ask(opened, "unsaved", "Of Mia. " * 40)
        assert opened.stats().store.volume_free == 0
    check_alive(opened, folder)


def test_a_store_that_cannot_be_made_anew_yet_is_made_anew_later(folder: Path, opened: AgentMemory) -> None:
    shutil.rmtree(folder)
    folder.write_text("something else stands here for a while")
    for number in range(2):
        assert not ask(opened, f"unsaved {number}", "Of Mia. " * 40)
    folder.unlink()
    check_alive(opened, folder)


def test_a_catalog_that_cannot_be_opened_for_a_while_is_opened_later(
    folder: Path, opened: AgentMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Database) -> bool:
        raise sqlite3.OperationalError("database is locked")

    without_catalog(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Database, "_prepare", fails)
        assert not ask(opened, "unsaved", "Of Mia. " * 40)
    check_alive(opened, folder)
