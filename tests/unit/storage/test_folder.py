"""The folder of a store: private, local, and of the version that this program writes."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from support import stored_turns
from support.stored_turns import (
    ids,
    is_whole,
    open_store,
    turn,
)

from agent_memory_core.errors import StoreUnreadable
from agent_memory_core.storage import folder as store_folder
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.folder import FORMAT, SEALED_FORMAT


def refused(path: Path, match: str) -> None:
    with pytest.raises(StoreUnreadable, match=match):
        BlockStore(path)


def test_a_folder_that_others_can_read_is_refused_with_the_command_that_mends_it(folder: Path) -> None:
    for mode in (0o750, 0o701, 0o777, 0o600):
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
        refused(folder, f"chmod 700 {folder}")
    folder.chmod(0o700)
    BlockStore(folder).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    refused(folder, "belongs to user 12345")


def test_what_is_not_a_folder_or_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "not a folder")
    refused(tmp_path / "file" / "below", "cannot be made")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "cannot be made")


@pytest.mark.parametrize(
    ("text", "match"),
    [(f"{SEALED_FORMAT + 1}\n", "upgrade"), (f"{SEALED_FORMAT}\n", "is encrypted"), ("many", "'many'")],
)
def test_a_newer_or_unknown_schema_is_refused_and_left_as_it_is(folder: Path, text: str, match: str) -> None:
    open_store(folder).close()
    (folder / "SCHEMA").write_text(text)
    (folder / "catalog.db").unlink()
    refused(folder, match)
    assert (folder / "SCHEMA").read_text() == text


@pytest.mark.parametrize("text", ["many", "4\nand more", "\0\0", "-4"])
def test_a_version_that_is_damaged_is_that_of_the_catalog(folder: Path, text: str) -> None:
    store = open_store(folder)
    turn(store, ids(9))
    store.close()
    (folder / "SCHEMA").write_text(text)
    store = open_store(folder)
    assert is_whole(store, ids(9))
    store.close()
    assert (folder / "SCHEMA").read_text() == f"{FORMAT}\n"
    with closing(sqlite3.connect(folder / "catalog.db")) as db:
        db.execute(f"PRAGMA user_version = {SEALED_FORMAT + 1}")
    (folder / "SCHEMA").write_text(text)
    refused(folder, "upgrade")


@pytest.mark.parametrize("lost", ["", "SCHEMA", "catalog.db"])
def test_a_store_of_version_1_is_refused_with_the_command_that_starts_anew(folder: Path, lost: str) -> None:
    """The folder was written by agent-memory as it was before this version; without its catalog nothing is found."""
    folder.mkdir(mode=0o700)
    with tarfile.open(Path(stored_turns.__file__).with_name("store_of_version_1.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    if lost:
        (folder / lost).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        StoreUnreadable, match="version 1, which this agent-memory-mlx cannot read"
    ) as refusal:
        BlockStore(folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before
    command = str(refusal.value).partition("with: ")[2]
    (folder / "transcripts").mkdir()
    subprocess.run(command, shell=True, check=False, stderr=subprocess.DEVNULL)
    store = open_store(folder)
    turn(store, ids(9))
    assert is_whole(store, ids(9))
    assert store.check().clean
    assert (folder / "transcripts").is_dir()
    store.close()


@pytest.mark.parametrize("version", [2, 3])
def test_a_store_of_an_older_version_is_brought_to_this_one(folder: Path, version: int) -> None:
    """The folder was written by tiny-chat and agent-memory of that version; its session keeps all its files."""
    with tarfile.open(Path(stored_turns.__file__).with_name(f"store_of_version_{version}.tar.gz")) as archive:
        archive.extractall(folder.parent, filter="data")
    (folder.parent / "store").rename(folder)
    folder.chmod(0o700)
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    for _ in range(2):
        store = BlockStore(folder)
        assert [info.session_id for info in store.catalog.branches.sessions()] == ["ada"]
        assert store.check().clean
        assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before
        store.close()
    assert (folder / "SCHEMA").read_text() == f"{FORMAT}\n"
    store = BlockStore(folder)
    turn(store, ids(9))
    assert store.forget("default", "ada")
    assert not any(path.exists() for path in before)
    store.close()


def test_the_file_system_of_the_tests_is_told_and_not_a_remote_one(tmp_path: Path) -> None:
    kind = store_folder.file_system(tmp_path)
    assert kind
    assert kind not in store_folder.REMOTE


def test_a_new_store_says_that_it_is_a_cache(folder: Path, tmp_path: Path) -> None:
    tag = "Signature: 8a477f597d28d172789f06886806bc55\n"
    open_store(folder).close()
    assert (folder / "CACHEDIR.TAG").read_text().startswith(tag)
    (tmp_path / "empty").mkdir(mode=0o700)
    (tmp_path / "empty" / ".DS_Store").touch()
    open_store(tmp_path / "empty").close()
    assert (tmp_path / "empty" / "CACHEDIR.TAG").is_file()
    (folder / "CACHEDIR.TAG").unlink()
    open_store(folder).close()
    assert not (folder / "CACHEDIR.TAG").exists(), "who removed it wants the store in backups"
