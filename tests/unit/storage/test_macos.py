"""What is asked of macOS, with libraries in place of the system's: the calls are the ones that its headers declare.

The fake Core Foundation is a real library in C, so that pointers and numbers go through ctypes as they would there.
"""

from __future__ import annotations

import ctypes
import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.stored_turns import ids, open_store, turn

from agent_memory_core.errors import StoreUnreadable
from agent_memory_core.storage import macos
from agent_memory_core.storage.block_store import BlockStore

FAKE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef const void *ref;
ref kCFURLVolumeAvailableCapacityForImportantUsageKey = "capacity";
ref kCFURLIsUbiquitousItemKey = "ubiquitous";
long live = 0;  /* references that were handed out and not released */
ref CFURLCreateFromFileSystemRepresentation(ref allocator, const unsigned char *path, long n, unsigned char folder) {
  char *copy = calloc(1, n + 2);
  if (allocator != NULL || folder != 1) abort();
  memcpy(copy + 1, path, n);
  live++;
  return copy;
}
unsigned char CFURLCopyResourcePropertyForKey(ref url, ref key, void *value, ref *error) {
  const char *path = (const char *)url + 1;
  char *made = calloc(1, 2);
  if (error != NULL) abort();
  if (strstr(path, "silent")) { free(made); return 0; }
  made[1] = strcmp(key, "capacity") == 0 ? 'n' : strstr(path, "synced") ? 't' : 'f';
  *(ref *)value = made;
  live++;
  return 1;
}
unsigned char CFNumberGetValue(ref number, long type, void *out) {
  if (type != 4 || ((const char *)number)[1] != 'n') abort();
  *(long long *)out = 5000000000000LL;
  return 1;
}
unsigned char CFBooleanGetValue(ref boolean) { return ((const char *)boolean)[1] == 't'; }
void CFRelease(ref made) { live--; free((void *)made); }
"""


@pytest.fixture(scope="module")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make the fake library")
    folder = tmp_path_factory.mktemp("library")
    (folder / "fake.c").write_text(FAKE)
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "fake.so"), str(folder / "fake.c")]
    subprocess.run(command, check=True)
    return str(folder / "fake.so")


@pytest.fixture
def core_foundation(fake_library: str, monkeypatch: pytest.MonkeyPatch) -> ctypes.c_long:
    """The count of references that were not released."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(macos, "CORE_FOUNDATION", fake_library)
    return ctypes.c_long.in_dll(ctypes.CDLL(fake_library), "live")


class FakeLibc:
    """Records the calls of ``setxattr``."""

    def __init__(self, answer: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []

        def setxattr(*call: Any) -> int:
            self.calls.append(call)
            return answer

        self.setxattr = setxattr


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> FakeLibc:
    libc = FakeLibc()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(macos, "_libc", lambda: libc)
    return libc


def test_purgeable_space_is_read_and_every_reference_released(
    core_foundation: ctypes.c_long, tmp_path: Path
) -> None:
    assert macos.purgeable_free_bytes(tmp_path) == 5_000_000_000_000
    assert macos.purgeable_free_bytes(tmp_path / "silent") == 0
    assert core_foundation.value == 0


def test_free_space_falls_back_to_what_statvfs_says(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    for library in ("/no/such/library", str(Path(sys.executable))):
        monkeypatch.setattr(macos, "CORE_FOUNDATION", library)
        assert macos.purgeable_free_bytes(folder.parent) == 0
    libc = next(Path("/").glob("lib*/**/libc.so.6"), None) or next(
        Path("/usr").glob("lib*/**/libc.so.6"), None
    )
    if libc is not None:
        monkeypatch.setattr(macos, "CORE_FOUNDATION", str(libc))
        assert macos.purgeable_free_bytes(folder.parent) == 0, "a library without the function"
    store = open_store(folder)
    volume = os.statvfs(folder)
    assert store.stats()["volume_free"] <= volume.f_blocks * volume.f_frsize
    store.close()


def test_elsewhere_no_library_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a library was loaded")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert macos.purgeable_free_bytes(tmp_path) == 0
    assert macos.syncing_cloud(tmp_path) == ""
    assert not macos.exclude_from_backup(tmp_path)


def test_a_new_store_is_left_out_of_backups_and_of_spotlight(libc: FakeLibc, folder: Path) -> None:
    store = open_store(folder)
    turn(store, ids(9))
    store.close()
    ((path, name, value, size, position, options),) = libc.calls
    assert path == os.fsencode(folder)
    assert name == b"com.apple.metadata:com_apple_backup_excludeItem"
    assert plistlib.loads(value) == "com.apple.backupd"
    assert value.startswith(b"bplist00")
    assert (size, position, options) == (len(value), 0, 1)
    assert (folder / ".metadata_never_index").read_bytes() == b""
    open_store(folder).close()
    assert len(libc.calls) == 1, "only when it is made: who takes the mark away does not want it"


def test_a_folder_with_other_things_in_it_stays_in_backups(libc: FakeLibc, folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "thesis.tex").touch()
    open_store(folder).close()
    assert libc.calls == []
    assert not (folder / "CACHEDIR.TAG").exists()


@pytest.mark.parametrize("libc_of_system", [FakeLibc(-1), SimpleNamespace()])
def test_where_the_mark_is_refused_the_store_works(
    libc_of_system: object, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(macos, "_libc", lambda: libc_of_system)
    assert not macos.exclude_from_backup(folder)
    store = open_store(folder)
    turn(store, ids(9))
    assert store.check().clean
    store.close()


@pytest.mark.parametrize(
    "below", ["Library/Mobile Documents/com~apple~CloudDocs", "Library/CloudStorage/OneDrive"]
)
def test_a_folder_of_a_cloud_is_refused(libc: FakeLibc, home: Path, below: str) -> None:
    refused(home / below / "caches")
    assert not (home / below / "caches").exists()


def test_the_documents_folder_is_refused_only_where_it_is_synced(
    libc: FakeLibc, core_foundation: ctypes.c_long, home: Path
) -> None:
    (home / "Documents").mkdir()
    BlockStore(home / "Documents" / "caches").close()
    (home / "synced" / "Documents").mkdir(parents=True)
    refused(home / "synced" / "Documents" / "not" / "there" / "yet")
    assert core_foundation.value == 0


def test_a_folder_whose_content_was_taken_away_is_refused(
    libc: FakeLibc, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is a folder further up that has the flag; a new folder does not have it yet."""
    (home / "dropped" / "kept").mkdir(parents=True)
    stat = os.stat

    def with_flags(path: Any, *args: Any, **more: Any) -> Any:
        found = stat(path, *args, **more)
        if Path(path) != home / "dropped":
            return found
        return SimpleNamespace(st_mode=found.st_mode, st_uid=found.st_uid, st_flags=0x40000000 | 0x20)

    monkeypatch.setattr(os, "stat", with_flags)
    refused(home / "dropped" / "kept" / "caches")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def refused(path: Path) -> None:
    with pytest.raises(StoreUnreadable, match="set a cache_dir that is not synced"):
        BlockStore(path)
