"""A sweep deletes what no session has and what is too old, and nothing else, also while others write."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore, MemoryStore
from support.cold_turns import OWNER, cold_store, newest, tier_of, tokens_in, tokens_of
from support.keys import KEY
from support.stored_turns import BLOCK, ids, is_whole, records, turn

from agent_memory_core.errors import StoreError
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.cold import mirror, tier as cold_tier
from agent_memory_core.storage.cold.names import Namespaces
from agent_memory_core.storage.cold.objects import Objects
from agent_memory_core.storage.cold.sweep import Swept, sweep

LONG = ids(3 * BLOCK + 1)


@pytest.fixture(params=["memory", "folder"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "bucket", mkdir=True)


@pytest.fixture
def store(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockStore]:
    monkeypatch.setattr(cold_tier, "FRESH", 0.0)
    store = cold_store(tmp_path / "store", bucket)
    yield store
    store.close()


def swept(bucket: Any, ttl_days: float | None = None, grace: float = 0.0, **options: Any) -> Swept:
    objects = Objects(bucket, 5.0)
    return asyncio.run(sweep(objects, Namespaces(objects, None), ttl_days, grace=grace, **options))


def paths(bucket: Any, part: str) -> set[str]:
    return {meta["path"] for page in bucket.list() for meta in page if part in meta["path"]}


def test_what_sessions_have_stays_and_the_rest_goes(store: BlockStore, bucket: Any) -> None:
    row = turn(store, LONG)
    assert tier_of(store).flush(20.0)
    turn(store, (*LONG, 1), branch=row)
    turn(store, ids(BLOCK, 700), "t")
    assert tier_of(store).flush(20.0)
    before = paths(bucket, "/blocks/")
    # The first tail, which the second one took the place of.
    assert swept(bucket, dry_run=True).deleted == 1
    assert paths(bucket, "/blocks/") == before
    done = swept(bucket)
    assert (done.sessions, done.records, done.deleted) == (2, len(before), 1)
    assert paths(bucket, "/blocks/") < before
    assert swept(bucket).deleted == 0
    assert asyncio.run(tokens_in(bucket)) == [(*LONG, 1)]


def test_a_forgotten_session_leaves_nothing_behind(store: BlockStore, bucket: Any) -> None:
    turn(store, LONG)
    turn(store, (*ids(BLOCK), 8), "t")
    assert tier_of(store).flush(20.0)
    store.forget(*OWNER)
    assert tier_of(store).flush(20.0)
    assert swept(bucket).deleted == 3
    assert asyncio.run(tokens_in(bucket, "t")) == [(*ids(BLOCK), 8)]


def test_what_is_young_is_left_since_its_head_may_be_on_its_way(store: BlockStore, bucket: Any) -> None:
    turn(store, LONG)
    assert tier_of(store).flush(20.0)
    store.forget(*OWNER)
    assert tier_of(store).flush(20.0)
    assert swept(bucket, grace=3600).deleted == 0
    assert tier_of(store).sweep().deleted == 0


def test_a_session_that_nobody_uses_is_deleted_by_rule(
    store: BlockStore, bucket: Any, tmp_path: Path
) -> None:
    turn(store, LONG)
    assert tier_of(store).flush(20.0)
    assert swept(bucket, ttl_days=1).expired == 0
    done = swept(bucket, ttl_days=1e-9)
    assert (done.sessions, done.expired, done.deleted) == (1, 1, 4)
    # Whoever has it still goes on with it, and all of it is there again.
    turn(store, (*LONG, 1), branch=newest(store))
    assert tier_of(store).flush(20.0)
    there = cold_store(tmp_path / "there", bucket)
    there.mirror.look(*OWNER)
    assert tokens_of(there) == [(*LONG, 1)]
    assert is_whole(there, (*LONG, 1))
    there.close()


def test_a_record_that_is_used_again_is_young_again(
    store: BlockStore, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no head has may be about to be deleted, so that finding it there is not enough."""
    turn(store, LONG)
    assert tier_of(store).flush(20.0)
    store.forget(*OWNER)
    assert tier_of(store).flush(20.0)
    objects = Objects(bucket, 5.0)
    (path,) = [path for path in paths(bucket, "/blocks/") if path.split("/")[-1].startswith(first_key())]
    before = asyncio.run(objects.modified(path))
    monkeypatch.setattr(mirror, "GRACE", 0.0)
    turn(store, LONG)
    assert tier_of(store).flush(20.0)
    after = asyncio.run(objects.modified(path))
    assert before is not None
    assert after is not None
    assert after > before


def first_key() -> str:
    return records(LONG)[0].key.hex()


def test_a_head_that_cannot_be_read_stops_the_sweep(store: BlockStore, bucket: Any) -> None:
    turn(store, LONG)
    assert tier_of(store).flush(20.0)
    (head,) = paths(bucket, "/heads/")
    bucket.put(head, b"{}")
    before = paths(bucket, "")
    with pytest.raises(StoreError, match="Nothing was deleted"):
        swept(bucket)
    assert paths(bucket, "") == before


def test_a_sealed_bucket_is_swept_with_its_key(tmp_path: Path, bucket: Any) -> None:
    sealed = cold_store(tmp_path / "sealed", bucket, master=bytes.fromhex(KEY))
    turn(sealed, LONG)
    assert tier_of(sealed).flush(20.0)
    assert swept(bucket) == Swept()
    assert tier_of(sealed).sweep() == Swept(1, 0, 4, tier_of(sealed).sweep().nbytes)
    sealed.close()
