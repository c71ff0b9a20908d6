"""A store that cannot be written is read: turns cost their new tokens only, nothing is saved, no byte is changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_memory_core import AgentMemory, StoreUnreadable

TEXT = "Tell me of Ada. " * 40


def memory_of(folder: Path) -> AgentMemory:
    return AgentMemory(cache_dir=folder, min_free_mb=0, block_tokens=64)


def content(folder: Path) -> dict[str, bytes]:
    """All files but those that SQLite makes to read a database."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("catalog.db-")
    }


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "store"
    with memory_of(folder) as memory:
        memory.chat(TEXT, "ada", max_tokens=4, temperature=0)
    folder.chmod(0o500)
    yield folder
    folder.chmod(0o700)


def test_what_is_stored_is_used_and_nothing_is_saved(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = content(folder)
    with memory_of(tmp_path / "other") as other:
        expected = other.chat(TEXT, max_tokens=4, temperature=0).token_ids
    with memory_of(folder) as memory:
        for _ in range(3):
            result = memory.chat(TEXT, "ada", max_tokens=4, temperature=0)
            assert result.token_ids == expected
            assert result.report.usage.cache_read > 64
            assert not result.report.persisted
            assert "read-only" in result.report.save_error
        assert not memory.chat("Of Tom.", "tom", max_tokens=2).report.persisted
        assert [info.session_id for info in memory.sessions()] == ["ada"]
        assert memory.check().clean
    assert content(folder) == before
    assert sum("nothing is saved" in text for text in caplog.messages) == 2


def test_what_would_have_to_be_written_is_refused_by_name(folder: Path) -> None:
    before = content(folder)
    with memory_of(folder) as memory:
        for act in (
            lambda: memory.fork("ada", "eve"),
            lambda: memory.pin("ada"),
            lambda: memory.forget("ada"),
        ):
            with pytest.raises(Exception, match="read-only"):
                act()
    assert content(folder) == before


@pytest.mark.parametrize("lost", ["SCHEMA", "catalog.db"])
def test_a_folder_without_a_whole_store_is_refused_with_what_to_do(folder: Path, lost: str) -> None:
    folder.chmod(0o700)
    (folder / lost).unlink()
    folder.chmod(0o500)
    with memory_of(folder) as memory, pytest.raises(StoreUnreadable, match="set another cache_dir"):
        memory.sessions()


def test_an_older_store_cannot_be_brought_to_this_version(folder: Path) -> None:
    folder.chmod(0o700)
    (folder / "SCHEMA").write_text("3\n")
    folder.chmod(0o500)
    with memory_of(folder) as memory, pytest.raises(StoreUnreadable, match="'3' instead of version"):
        memory.sessions()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a folder")
def test_on_a_volume_that_is_mounted_read_only(folder: Path) -> None:
    """Nothing can be made there, not even what SQLite needs to read a log."""
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" || exit 77; exec "$1" -c "$2" "$0"'
    program = f"""
import sys
from pathlib import Path
from agent_memory_core import AgentMemory
with AgentMemory(cache_dir=Path(sys.argv[1]), min_free_mb=0, block_tokens=64) as memory:
    report = memory.chat({TEXT!r}, "ada", max_tokens=4, temperature=0).report
    print(report.usage.cache_read > 64, report.persisted)
"""
    folder.chmod(0o700)
    command = ["unshare", "-m", "sh", "-c", script, str(folder), sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"this machine does not allow to mount: {done.stderr}")
    assert done.stdout.split() == ["True", "False"], done.stderr
