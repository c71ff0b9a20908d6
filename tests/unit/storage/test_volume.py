"""A store whose volume gives nothing back for deleted files does not empty itself, and goes on when there is space."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from support.fixed_volume import FixedVolume
from support.stored_turns import (
    BLOCK,
    FILE,
    MANY,
    ROOT,
    RecordStore,
    bytes_on_disk,
    files,
    ids,
    is_whole,
    turn,
)

from agent_memory_core.config import EngineConfig
from agent_memory_core.errors import StoreFull
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.record import HostTensor, Record, StoredRecord
from agent_memory_core.storage.sealing import Cipher
from agent_memory_core.storage.volume import CATALOG_ROOM, WithheldSpace, default_min_free, default_quota

FLOOR = 2 * CATALOG_ROOM
"""Bytes that the stores of these tests leave free."""

TURN = 2 * FILE
"""Bytes of one turn of these tests."""


def tokens_of(number: int) -> tuple[int, ...]:
    return ids(2 * BLOCK, 100 * number)


def live(store: BlockStore) -> set[str]:
    return {info.session_id for info in store.catalog.branches.sessions()}


def save(store: BlockStore, number: int) -> bool:
    """One turn of its own session; whether it was saved."""
    try:
        turn(store, tokens_of(number), f"s{number}")
    except StoreFull:
        return False
    return True


@pytest.fixture
def volume(monkeypatch: pytest.MonkeyPatch) -> FixedVolume:
    volume = FixedVolume()
    volume.install(monkeypatch)
    return volume


@pytest.fixture
def roomy(folder: Path, volume: FixedVolume) -> Iterator[BlockStore]:
    """A store with six sessions."""
    store = BlockStore(folder, quota_bytes=MANY, min_free_bytes=FLOOR)
    store.identify(ROOT, {"model": "made"}, "default")
    assert all(save(store, number) for number in range(6))
    yield store
    report = store.check()
    assert report.clean, report
    assert store.stats()["reserved"] == 0
    store.close()


def test_a_store_does_not_empty_itself_for_space_that_never_comes(
    roomy: BlockStore, volume: FixedVolume, caplog: pytest.LogCaptureFixture
) -> None:
    volume.free = FLOOR - 2 * 2**20
    saved = [save(roomy, number) for number in range(6, 30)]
    assert saved == [True] + [False] * 23, "what was evicted once pays for one turn"
    assert live(roomy) == {f"s{number}" for number in range(2, 7)}, "twice the bytes of one turn went"
    assert all(is_whole(roomy, tokens_of(number)) for number in range(2, 7))
    assert len([line for line in caplog.messages if "have not freed their space" in line]) == 1
    volume.free = FLOOR + TURN
    assert save(roomy, 30), "saving begins again when there is space"
    assert roomy.stats()["evicted"] == 4


def test_after_the_space_has_come_back_evicting_helps_again(roomy: BlockStore, volume: FixedVolume) -> None:
    volume.free = FLOOR - 10 * TURN
    assert [save(roomy, number) for number in (6, 7)] == [True, False]
    volume.free += TURN - 1
    assert not save(roomy, 8), "less than half of what was deleted has come back"
    volume.free += 1
    assert save(roomy, 9)
    assert roomy.stats()["evicted"] == 8


def test_what_the_volume_once_owed_is_forgotten_when_it_is_back(
    roomy: BlockStore, volume: FixedVolume
) -> None:
    volume.free = FLOOR
    assert [save(roomy, number) for number in (6, 7)] == [True, False]
    volume.used = lambda: bytes_on_disk(roomy)
    volume.free = FLOOR + TURN + bytes_on_disk(roomy) - FILE
    assert save(roomy, 8)
    volume.free -= 2 * TURN
    assert save(roomy, 9), "now deleting helps, however much others have taken"


def test_what_others_take_meanwhile_does_not_hide_what_comes_back(
    roomy: BlockStore, volume: FixedVolume
) -> None:
    volume.free = FLOOR
    assert [save(roomy, number) for number in (6, 7)] == [True, False]
    volume.free -= 8 * TURN
    assert not save(roomy, 8)
    volume.free += TURN
    assert save(roomy, 9)


def test_where_deleting_frees_space_at_once_every_turn_is_saved_and_the_floor_holds(
    roomy: BlockStore, volume: FixedVolume
) -> None:
    volume.used = lambda: bytes_on_disk(roomy)
    volume.free = FLOOR + 8 * TURN
    for number in range(6, 30):
        assert save(roomy, number)
        assert volume.statvfs("").f_bavail >= FLOOR
    assert len(live(roomy)) == 8
    volume.free -= 4 * TURN
    for number in range(30, 38):
        assert save(roomy, number)
    assert volume.statvfs("").f_bavail >= FLOOR, "each turn gave back twice what it took"
    assert roomy.volume.withheld is None


def test_space_that_comes_late_is_seen_beside_what_the_turn_itself_took(
    roomy: BlockStore, volume: FixedVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """btrfs and ZFS free space some seconds after a file was deleted."""
    waiting: list[int] = []
    delete = roomy.files.delete

    def delete_later(record: StoredRecord) -> None:
        delete(record)
        waiting.append(record.nbytes)

    monkeypatch.setattr(roomy.files, "delete", delete_later)
    volume.used = lambda: bytes_on_disk(roomy) + sum(waiting)
    volume.free = FLOOR + 6 * TURN
    for number in range(6, 20):
        assert save(roomy, number)
        waiting.clear()


def test_other_stores_and_later_ones_know_what_the_volume_owes(
    roomy: BlockStore, volume: FixedVolume
) -> None:
    other = BlockStore(roomy.path, quota_bytes=MANY, min_free_bytes=FLOOR)
    volume.free = FLOOR
    assert save(roomy, 6)
    before = live(other)
    assert not save(other, 7)
    other.close()
    later = BlockStore(roomy.path, quota_bytes=MANY, min_free_bytes=FLOOR)
    assert not save(later, 8)
    assert live(later) == before
    later.close()


def test_a_volume_without_room_for_the_catalog_is_not_written_to(
    roomy: BlockStore, volume: FixedVolume
) -> None:
    volume.free = CATALOG_ROOM
    before = set(files(roomy))
    assert [save(roomy, number) for number in (6, 7, 8)] == [False] * 3
    assert set(files(roomy)) < before
    assert len(live(roomy)) == 4, "twice what the turn needs was evicted, once"


@pytest.mark.parametrize("gives", [True, False])
def test_a_write_that_finds_the_volume_full_evicts_once_unless_that_helps(
    roomy: BlockStore, monkeypatch: pytest.MonkeyPatch, gives: bool
) -> None:
    write = roomy.files.write
    full = True

    def write_if_there_is_room(
        stored: StoredRecord, record: Record[HostTensor], cipher: Cipher
    ) -> StoredRecord:
        nonlocal full
        if full:
            full = not gives
            raise OSError(28, "No space left on device")
        return write(stored, record, cipher)

    monkeypatch.setattr(roomy.files, "write", write_if_there_is_room)
    assert save(roomy, 6) == gives
    assert len(live(roomy)) == (6 if gives else 5)
    evicted = roomy.stats()["evicted"]
    full = True
    assert save(roomy, 7) == gives
    assert (roomy.stats()["evicted"] > evicted) == gives, "what helps is done again, what does not is not"


@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    lacking=st.integers(-TURN, 20 * TURN),
    quota=st.sampled_from([MANY, 7 * FILE]),
)
def test_under_frozen_free_space_no_session_is_evicted_twice_for_the_volume(
    turns: Sequence[int], lacking: int, quota: int
) -> None:
    volume = FixedVolume()
    gone: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        volume.install(patch)
        store = RecordStore(Path(name) / "store", quota_bytes=quota, min_free_bytes=FLOOR)
        for number in range(3):
            save(store, number)
        volume.free = FLOOR - lacking
        for number in turns:
            before, stored = live(store), store.catalog.budget.total_bytes()
            with suppress(StoreFull):
                turn(store, tokens_of(number), f"s{number}")
            if stored + TURN <= quota:
                gone.update(before - live(store))
        assert max(gone.values(), default=0) <= 1
        assert sum(gone.values()) <= 2, "a turn evicts at most twice its own bytes, and only one does"
        assert store.check().clean
        store.close()


def test_what_is_noted_is_read_as_it_was() -> None:
    noted = WithheldSpace(lowest=12, deleted=40)
    assert WithheldSpace.parse(str(noted)) == noted
    assert WithheldSpace.parse(None) is WithheldSpace.parse("") is None
    assert [noted.is_back(free) for free in (11, 12, 31, 32)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("size", "free", "quota"),
    [(2**40, 5 * 2**30, 20 * 2**30), (100 * 10**9, 2 * 10**9, 10 * 10**9), (10**6, 20_000, 100_000)],
)
def test_the_defaults_are_a_share_of_the_volume_at_most(
    volume: FixedVolume, tmp_path: Path, size: int, free: int, quota: int
) -> None:
    volume.size = size
    assert default_min_free(tmp_path) == free
    assert default_quota(tmp_path) == quota
    store = BlockStore(tmp_path / "store", min_free_bytes=None)
    assert (store.stats()["min_free"], store.stats()["quota"]) == (free, quota)
    assert EngineConfig().min_free_mb is None
    store.close()


def test_stats_tell_the_free_space_that_decisions_are_made_with(
    roomy: BlockStore, volume: FixedVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume.free = 12345
    assert roomy.stats()["volume_free"] == 12345
    assert roomy.stats()["min_free"] == FLOOR
    monkeypatch.setattr("agent_memory_core.storage.volume.purgeable_free_bytes", lambda _: FLOOR * 2)
    assert roomy.stats()["volume_free"] == FLOOR * 2


def test_purgeable_space_counts_and_is_asked_for_only_where_it_matters(
    roomy: BlockStore, volume: FixedVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def purgeable(path: Path) -> int:
        asked.append(path)
        return FLOOR + TURN

    monkeypatch.setattr("agent_memory_core.storage.volume.purgeable_free_bytes", purgeable)
    assert save(roomy, 6)
    assert asked == []
    volume.free = 0
    assert save(roomy, 7)
    assert asked == [roomy.path]
    assert roomy.stats()["evicted"] == 0


def test_on_macos_the_message_names_the_command_that_lists_snapshots(
    roomy: BlockStore, volume: FixedVolume, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    volume.free = FLOOR
    with caplog.at_level(logging.WARNING):
        assert save(roomy, 6)
    assert "deleted files are still held by snapshots: tmutil listlocalsnapshots /" in caplog.text
    with pytest.raises(StoreFull, match="tmutil listlocalsnapshots /"):
        turn(roomy, tokens_of(7), "s7")
