"""A bucket with weather, and stores that share one. Run as a program it commits turns to a session."""

from __future__ import annotations

import asyncio
import json
import queue
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from obstore.exceptions import GenericError
from support.stored_turns import BLOCK, ROOT, ids, open_store, turn

from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import BranchRow
from agent_memory_core.storage.cold import tier as cold_tier
from agent_memory_core.storage.cold.head import Head, from_bytes
from agent_memory_core.storage.cold.names import PlainNames, head_path
from agent_memory_core.storage.cold.objects import Objects, open_bucket
from agent_memory_core.storage.cold.tier import ColdTier
from agent_memory_core.storage.portable import unpacked

OWNER = ("default", "s")


class Weather:
    """A store of obstore, in front of which there may be a slow, failing, full or silent network."""

    def __init__(self, bucket: Any) -> None:
        self._bucket = bucket
        # Where it is a folder, which has no compare-and-swap of its own.
        self.prefix = getattr(bucket, "prefix", None)
        self.delay = 0.0
        self.is_gone = False
        self.is_full = False
        self.fails: Callable[[], bool] = lambda: False
        self.calls: list[str] = []

    async def _pass(self, kind: str) -> None:
        self.calls.append(kind)
        await asyncio.sleep(3600 if self.is_gone else self.delay)
        if self.fails() or (self.is_full and kind == "put"):
            raise GenericError("no space left" if self.is_full else "connection reset by peer")

    async def get_async(self, path: str, **options: Any) -> Any:
        await self._pass("get")
        return await self._bucket.get_async(path, **options)

    async def put_async(self, path: str, data: Any, **options: Any) -> Any:
        await self._pass("put")
        done = await self._bucket.put_async(path, data, **options)
        # The answer may be lost, too.
        await self._pass("put")
        return done

    async def head_async(self, path: str) -> Any:
        await self._pass("head")
        return await self._bucket.head_async(path)

    async def delete_async(self, paths: Any) -> Any:
        await self._pass("delete")
        return await self._bucket.delete_async(paths)

    async def list_with_delimiter_async(self, prefix: str) -> Any:
        await self._pass("list")
        return await self._bucket.list_with_delimiter_async(prefix)

    def list(self, prefix: str) -> Any:
        self.calls.append("list")
        return self._bucket.list(prefix)


def cold_store(path: Path, bucket: Any, **options: Any) -> BlockStore:
    """A store with a cold tier in a bucket."""
    store = open_store(path)
    store.mirror = ColdTier(store, bucket, **{"timeout": 5.0, **options})
    return store


def tier_of(store: BlockStore) -> ColdTier:
    """Its cold tier."""
    assert isinstance(store.mirror, ColdTier)
    return store.mirror


def newest(store: BlockStore, session: str = "s") -> BranchRow | None:
    """The branch of a session that was used last."""
    rows = store.catalog.branches.of_session("default", session, ROOT)
    return max(rows, key=lambda row: (row.last_use, row.tokens)) if rows else None


def tokens_of(store: BlockStore, session: str = "s") -> list[tuple[int, ...]]:
    """The tokens of all branches of a session."""
    rows = store.catalog.branches.of_session("default", session)
    return sorted(store.catalog.branches.tokens(row) for row in rows)


async def read_head(bucket: Any, session: str = "s") -> Head | None:
    """The head of a session, as it lies in a bucket that is not sealed."""
    found = await Objects(bucket, 5.0).get(head_path(PlainNames("default"), session))
    return from_bytes(found.data) if found else None


async def tokens_in(bucket: Any, session: str = "s") -> list[tuple[int, ...]]:
    """The tokens of all branches in a bucket, read from the records themselves."""
    head = await read_head(bucket, session)
    assert head is not None
    objects, names = Objects(bucket, 5.0), PlainNames("default")
    known: dict[bytes, tuple[int, ...]] = {}
    for record in head.records.values():
        found = await objects.get(names.block(record))
        assert found is not None
        known[record.key] = unpacked(found.data, record.checksum).tokens
    return sorted(
        tuple(token for record in branch.records for token in known[record.key]) for branch in head.branches
    )


def _turns(path: Path, url: str, seed: int, count: int) -> None:
    """Commit turns to a session that others use, each acknowledged when it is in the bucket, and print their tokens."""
    cold_tier.FRESH = 0.0
    store = cold_store(path, open_bucket(url, 30.0), ack="remote", timeout=30.0)
    chance = random.Random(seed)
    for _ in range(count):
        store.mirror.look(*OWNER)
        rows = store.catalog.branches.of_session("default", "s", ROOT)
        row = chance.choice(rows) if rows else None
        known = store.catalog.branches.tokens(row) if row else ()
        tokens = (*known, *(chance.randrange(10**6) for _ in range(chance.randint(1, BLOCK))))
        turn(store, tokens, branch=row, max_branches=64)
        said: queue.SimpleQueue[str] = queue.SimpleQueue()
        store.mirror.acknowledge(*OWNER, said.put)
        print(json.dumps([said.get(), tokens]), flush=True)
    store.close()


def _commit_and_wait(path: Path, url: str) -> None:
    """Commit turns while nothing can be uploaded, and wait to be killed."""
    weather = Weather(open_bucket(url, 30.0))
    weather.is_gone = True
    store = cold_store(path, weather, timeout=30.0)
    for n in range(3):
        turn(store, range(100 * n, 100 * n + 2 * BLOCK + 1), f"s{n}")
    print("committed", flush=True)
    asyncio.run(asyncio.sleep(60))


def _commit_for_ever(path: Path, url: str, sessions: int, delay: float) -> None:
    """Commit turns to several sessions, which go on by a block each time, and print each that is acknowledged.

    Every request to the bucket takes so many seconds.
    """
    weather = Weather(open_bucket(url, 30.0))
    weather.delay = delay
    store = cold_store(path, weather, timeout=30.0)
    turns = 0
    while True:
        turns, session = turns + 1, turns % sessions
        count = 1 + (turns - 1) // sessions
        turn(store, block_ids(session, count), f"s{session}", branch=newest(store, f"s{session}"))
        print(session, count, flush=True)


def block_ids(session: int, count: int) -> tuple[int, ...]:
    """The tokens of so many turns of a session, a block each."""
    return ids(count * BLOCK, 10**6 * session)


if __name__ == "__main__":
    kind, path, url, *numbers = sys.argv[1:]
    if kind == "turns":
        _turns(Path(path), url, int(numbers[0]), int(numbers[1]))
    elif kind == "for ever":
        _commit_for_ever(Path(path), url, int(numbers[0]), float(numbers[1]))
    else:
        _commit_and_wait(Path(path), url)
