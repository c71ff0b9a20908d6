"""A session comes out of a bucket as it went in; two stores lose nothing; and a bad bucket harms no turn."""

from __future__ import annotations

import asyncio
import json
import queue
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore, MemoryStore
from support.cold_turns import (
    OWNER,
    Weather,
    block_ids,
    cold_store,
    newest,
    read_head,
    tier_of,
    tokens_in,
    tokens_of,
)
from support.keys import KEY, OTHER_KEY
from support.stored_turns import BLOCK, files, ids, is_whole, open_store, records, turn, turn_with, windows

from agent_memory_core.errors import StoreError
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.cold import tier as cold_tier
from agent_memory_core.storage.cold.book import Book

HELPER = Path(__file__).parents[3] / "support" / "cold_turns.py"
LONG = ids(5 * BLOCK + 3)


@pytest.fixture(autouse=True)
def _nothing_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_tier, "FRESH", 0.0)
    monkeypatch.setattr(cold_tier, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(cold_tier, "LONGEST_PAUSE", 0.05)


class Machines:
    """Stores with cold tiers, closed at the end of a test."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stores: list[BlockStore] = []

    def __call__(self, name: str, bucket: Any, **options: Any) -> BlockStore:
        self.stores.append(cold_store(self._path / name, bucket, **options))
        return self.stores[-1]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path)
    yield machines
    for store in machines.stores:
        store.close()


@pytest.fixture(params=["memory", "folder"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "bucket", mkdir=True)


def uploaded(store: BlockStore) -> bool:
    return tier_of(store).flush(20.0)


# A session there and back ---------------------------------------------------------------------------------------


def test_a_session_moves_by_its_name(machine: Machines, bucket: Any) -> None:
    here, there = machine("here", bucket), machine("there", bucket)
    turn_with(here, LONG, windows(LONG, 1, 3))
    turn(here, (*ids(BLOCK), *ids(BLOCK, 500)), lane="left")
    assert uploaded(here)
    there.mirror.look(*OWNER)
    assert tokens_of(there) == tokens_of(here)
    assert is_whole(there, LONG)
    assert [path.name for path in files(there)] == [path.name for path in files(here)]
    branches = there.catalog.branches
    assert {len(branches.dependencies(row.branch_id)) for row in branches.of_session(*OWNER)} == {0, 2}
    assert there.check().clean


def test_what_was_uploaded_is_not_uploaded_again(machine: Machines, bucket: Any) -> None:
    here = machine("here", bucket)
    row = turn(here, LONG)
    assert uploaded(here)
    before = tier_of(here).status()
    turn(here, (*LONG, 7), branch=row)
    assert uploaded(here)
    after = tier_of(here).status()
    # The new tail, or the block that it became, and the head.
    assert after.requests["put"] - before.requests["put"] == 2
    head = asyncio.run(read_head(bucket))
    assert head is not None
    assert (head.generation, len(head.branches)) == (2, 1)


def test_sessions_that_begin_alike_share_their_records(machine: Machines, bucket: Any) -> None:
    here = machine("here", bucket)
    for session in ("s", "t", "u"):
        turn(here, (*ids(4 * BLOCK), ord(session)), session)
    assert uploaded(here)
    found = [meta["path"] for page in bucket.list("v1/plain/default/blocks/") for meta in page]
    assert len(found) == 4 + 3


def test_it_goes_back_and_forth(machine: Machines, bucket: Any) -> None:
    """Each machine goes on where the other has stopped; there is one branch all the time."""
    stores = [machine("here", bucket), machine("there", bucket)]
    tokens: tuple[int, ...] = ()
    for n in range(6):
        store = stores[n % 2]
        store.mirror.look(*OWNER)
        assert tokens_of(store) == ([tokens] if tokens else [])
        tokens = (*tokens, *ids(BLOCK + 1, 100 * n))
        turn(store, tokens, branch=newest(store))
        assert uploaded(store)
    assert asyncio.run(tokens_in(bucket)) == [tokens]


def test_nothing_is_fetched_twice(machine: Machines, bucket: Any) -> None:
    here, there = machine("here", bucket), machine("there", bucket)
    turn(here, LONG)
    assert uploaded(here)
    there.mirror.look(*OWNER)
    before = tier_of(there).status().requests["get"]
    there.mirror.look(*OWNER)
    assert tier_of(there).status().requests["get"] - before == 1
    assert tier_of(there).status().waiting == 0


def test_namespaces_are_apart(machine: Machines, bucket: Any) -> None:
    here, there = machine("here", bucket), machine("there", bucket)
    turn(here, LONG)
    assert uploaded(here)
    there.mirror.look("other", "s")
    assert there.catalog.branches.sessions() == []


# Fences ---------------------------------------------------------------------------------------------------------


def test_two_machines_that_go_on_from_one_place_both_stay(machine: Machines, bucket: Any) -> None:
    here, there = machine("here", bucket), machine("there", bucket)
    turn(here, LONG)
    assert uploaded(here)
    there.mirror.look(*OWNER)
    ends = [(*LONG, 1, 1), (*LONG, 2, 2)]
    for store, tokens in zip((here, there), ends, strict=True):
        turn(store, tokens, branch=newest(store))
    assert uploaded(here)
    assert uploaded(there)
    assert asyncio.run(tokens_in(bucket)) == ends
    for store in (here, there):
        store.mirror.look(*OWNER)
        assert tokens_of(store) == ends


def test_two_processes_on_one_session_lose_no_turn(tmp_path: Path) -> None:
    """60 turns of a session, 30 in each of two processes that share nothing but the bucket."""
    url = (tmp_path / "bucket").as_uri()
    command = [sys.executable, str(HELPER), "turns"]
    env = {"PYTHONPATH": ":".join(sys.path)}
    running = [
        subprocess.Popen([*command, tmp_path / f"{n}", url, f"{n}", "30"], stdout=subprocess.PIPE, env=env)
        for n in range(2)
    ]
    said = [
        json.loads(line) for process in running for line in process.communicate(timeout=120)[0].splitlines()
    ]
    assert [process.returncode for process in running] == [0, 0]
    assert len(said) == 60
    assert {why for why, _ in said} == {""}
    kept = asyncio.run(tokens_in(LocalStore(tmp_path / "bucket")))
    lost = [tokens for _, tokens in said if not any(list(end[: len(tokens)]) == tokens for end in kept)]
    assert lost == []


# A bad bucket ---------------------------------------------------------------------------------------------------


def test_a_killed_process_leaves_its_queue(tmp_path: Path, machine: Machines) -> None:
    """Turns are committed, the bucket is silent, and the process is killed: whoever opens the store uploads them."""
    bucket = tmp_path / "bucket"
    command = [sys.executable, str(HELPER), "wait", str(tmp_path / "here"), bucket.as_uri()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"committed\n"
        process.send_signal(signal.SIGKILL)
    assert list(LocalStore(bucket).list()) == []
    assert uploaded(machine("here", LocalStore(bucket)))
    there = machine("there", LocalStore(bucket))
    for n in range(3):
        there.mirror.look("default", f"s{n}")
        assert is_whole(there, range(100 * n, 100 * n + 2 * BLOCK + 1))


def test_a_machine_that_is_lost_takes_no_more_with_it_than_its_queue_says(
    tmp_path: Path, machine: Machines
) -> None:
    """A process commits turns while uploads are slow, and is killed, twice, on disks and with buckets of their own.

    Another machine has the bucket alone. What it lacks of a session is what the queue on the killed disk counts.
    """
    chance = random.Random(1)
    for kill in range(2):
        disk, bucket = tmp_path / f"disk {kill}", tmp_path / f"bucket {kill}"
        acknowledged = killed(disk, bucket, chance.randint(20, 60))
        # Opened without its cold tier, so nothing is uploaded any more.
        left = open_store(disk)
        unsent = {session: commits for (_, session), commits in Book(left).unsent().items()}
        left.close()
        there = machine(f"there {kill}", LocalStore(bucket, mkdir=True))
        for session, turns in acknowledged.items():
            there.mirror.look("default", f"s{session}")
            (found,) = tokens_of(there, f"s{session}") or [()]
            assert found == block_ids(session, len(found) // BLOCK)
            assert turns - len(found) // BLOCK <= unsent.get(f"s{session}", 0)
        assert sum(unsent.values()) > 0


def killed(disk: Path, bucket: Path, turns: int) -> dict[int, int]:
    """How many turns of each session a process acknowledged, of three, until it was killed after so many in all."""
    command = [sys.executable, str(HELPER), "for ever", str(disk), bucket.as_uri(), "3", "0.01"]
    acknowledged: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)}) as process:
        assert process.stdout is not None
        for _ in range(turns):
            session, count = map(int, process.stdout.readline().split())
            acknowledged[session] = count
        process.send_signal(signal.SIGKILL)
        for line in process.stdout:
            session, count = map(int, line.split())
            acknowledged[session] = count
    return acknowledged


def test_the_queue_counts_the_commits_since_the_last_upload(machine: Machines) -> None:
    weather = Weather(MemoryStore())
    weather.is_full = True
    here = machine("here", weather)
    row = turn(here, ids(BLOCK))
    turn(here, ids(2 * BLOCK), branch=row)
    turn(here, ids(BLOCK, 70), "t")
    status = tier_of(here).status()
    assert (status.waiting, status.waiting_turns) == (2, 3)
    mark = Book(here).mark_of(OWNER)
    turn(here, ids(BLOCK, 90))
    # What stood behind the mark is uploaded; what came since then is not.
    book = Book(here)
    book.note(OWNER, book.seen(OWNER), mark)
    assert book.unsent()[OWNER] == 1


def test_a_silent_bucket_costs_a_turn_its_timeout_and_nothing_else(machine: Machines) -> None:
    weather = Weather(MemoryStore())
    weather.is_gone = True
    here = machine("here", weather, timeout=0.05, ack="remote")
    here.mirror.look(*OWNER)
    turn(here, LONG)
    assert "has not" in acknowledged(here)
    assert is_whole(here, LONG)
    assert tier_of(here).status().waiting == 1


def acknowledged(store: BlockStore) -> str:
    """What is said of a turn when it is as safe as it is to be."""
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    store.mirror.acknowledge(*OWNER, said.put)
    return said.get(timeout=20.0)


def test_a_full_bucket_takes_the_turn_when_it_has_room_again(
    machine: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_memory_core.storage.cold.breaker.FIRST", 0.05)
    monkeypatch.setattr("agent_memory_core.storage.cold.breaker.LONGEST", 0.05)
    weather = Weather(MemoryStore())
    weather.is_full = True
    here = machine("here", weather, ack="remote")
    turn(here, LONG)
    assert "no space left" in acknowledged(here)
    assert tier_of(here).status().failure
    weather.is_full = False
    assert uploaded(here)
    assert tier_of(here).status().failure == ""
    assert acknowledged(here) == ""


def test_a_fault_of_our_own_leaves_no_turn_waiting(
    machine: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    weather = Weather(MemoryStore())

    def fault() -> bool:
        raise KeyError("a fault")

    weather.fails = fault
    here = machine("here", weather, ack="remote")
    turn(here, LONG)
    assert "met a fault" in acknowledged(here)
    assert "KeyError" in caplog.text
    weather.fails = lambda: False
    assert uploaded(here)
    assert asyncio.run(tokens_in(weather)) == [LONG]


def test_a_local_acknowledgement_waits_for_nothing(machine: Machines) -> None:
    weather = Weather(MemoryStore())
    weather.is_gone = True
    here = machine("here", weather, timeout=0.05)
    turn(here, LONG)
    assert acknowledged(here) == ""


@pytest.mark.parametrize("seed", range(3))
def test_a_failing_bucket_never_gives_a_wrong_record(
    machine: Machines, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of all requests fail, before or after they took effect, while two machines take turns."""
    monkeypatch.setattr("agent_memory_core.storage.cold.breaker.FAILURES", 10**6)
    chance = random.Random(seed)
    weather = Weather(MemoryStore())
    weather.fails = lambda: chance.random() < 0.25
    stores = [machine("here", weather), machine("there", weather)]
    said: list[tuple[int, ...]] = []
    for n in range(8):
        store = stores[n % 2]
        store.mirror.look(*OWNER)
        row = newest(store)
        known = store.catalog.branches.tokens(row) if row else ()
        said.append((*known, *ids(BLOCK + 1, 1000 * n)))
        turn(store, said[-1], branch=row)
    weather.fails = lambda: False
    assert all(map(uploaded, stores))
    kept = asyncio.run(tokens_in(weather))
    assert [tokens for tokens in said if not any(end[: len(tokens)] == tokens for end in kept)] == []
    for store in stores:
        store.mirror.look(*OWNER)
        assert all(is_whole(store, tokens) for tokens in tokens_of(store))
        assert store.check().clean


# What is not what it should be --------------------------------------------------------------------------------


def overwrite(bucket: Any, part: str, data: bytes | None) -> int:
    """Write something else, or nothing, in place of all objects whose paths have that part."""
    paths = [meta["path"] for page in bucket.list() for meta in page if part in meta["path"]]
    for path in paths:
        bucket.delete(path) if data is None else bucket.put(path, data)
    return len(paths)


@pytest.mark.parametrize("data", [None, b"", b"{}", b"x" * 100])
def test_a_damaged_record_is_a_miss_and_is_mended(machine: Machines, bucket: Any, data: bytes | None) -> None:
    here, there = machine("here", bucket), machine("there", bucket)
    turn(here, LONG)
    assert uploaded(here)
    lost = records(LONG)[2].key.hex()
    assert overwrite(bucket, lost, data) == 1
    there.mirror.look(*OWNER)
    assert tokens_of(there) == []
    assert is_whole(there, LONG[: 2 * BLOCK])
    assert tier_of(there).status().misses == 1
    # It computes the rest, and has everything that the bucket lacks.
    turn(there, LONG)
    assert uploaded(there)
    third = machine("third", bucket)
    third.mirror.look(*OWNER)
    assert tokens_of(third) == [LONG]


def test_a_damaged_head_is_no_session_and_says_so(machine: Machines, bucket: Any) -> None:
    here, there = machine("here", bucket), machine("there", bucket)
    turn(here, LONG)
    assert uploaded(here)
    assert overwrite(bucket, "/heads/", b"{}") == 1
    there.mirror.look(*OWNER)
    assert tokens_of(there) == []
    with pytest.raises(StoreError, match="is no head of a session"):
        tier_of(there).pull("s")


# Encryption ---------------------------------------------------------------------------------------------------


def test_what_is_sealed_opens_with_the_same_master_key_only(machine: Machines, bucket: Any) -> None:
    key, other = bytes.fromhex(KEY), bytes.fromhex(OTHER_KEY)
    here = machine("here", bucket, master=key)
    turn(here, LONG)
    assert uploaded(here)
    payload = bytes(next(iter(records(LONG)[0].tensors.values())).data)
    for page in bucket.list():
        for meta in page:
            data = bucket.get(meta["path"]).bytes().to_bytes()
            assert payload not in data
            assert records(LONG)[0].key.hex() not in meta["path"]
            assert b"prompt_tokens" not in data
    there = machine("there", bucket, master=key)
    there.mirror.look(*OWNER)
    assert is_whole(there, LONG)
    for number, options in enumerate([{"master": other}, {}]):
        third = machine(f"third{number}", bucket, **options)
        third.mirror.look(*OWNER)
        assert tokens_of(third) == []
    with pytest.raises(StoreError, match="another master key"):
        tier_of(machine("fourth", bucket, master=other)).pull("s")


# Forgetting ---------------------------------------------------------------------------------------------------


def test_a_forgotten_session_does_not_come_back(machine: Machines, bucket: Any) -> None:
    here, there = machine("here", bucket), machine("there", bucket)
    turn(here, LONG)
    assert uploaded(here)
    there.mirror.look(*OWNER)
    here.forget(*OWNER)
    assert uploaded(here)
    there.mirror.look(*OWNER)
    assert tokens_of(there) == []
    assert files(there) == []
    # What is said afterwards under the same name is a session of its own.
    turn(there, ids(BLOCK, 900))
    assert uploaded(there)
    assert asyncio.run(tokens_in(bucket)) == [ids(BLOCK, 900)]


@pytest.mark.parametrize("master", [None, bytes.fromhex(KEY)], ids=["plain", "sealed"])
def test_of_a_forgotten_namespace_nothing_is_left(
    machine: Machines, bucket: Any, master: bytes | None
) -> None:
    here = machine("here", bucket, master=master)
    turn(here, LONG)
    assert uploaded(here)
    turn(here, LONG, "t")
    here.forget(*OWNER)
    here.forget("default", "t")
    here.mirror.forgetting_namespace("default")
    assert uploaded(here)
    assert [meta["path"] for page in bucket.list() for meta in page if "/default/" in meta["path"]] == []
    # The same process may begin anew, under another key.
    turn(here, LONG)
    assert uploaded(here)
    there = machine("there", bucket, master=master)
    there.mirror.look(*OWNER)
    assert is_whole(there, LONG)


def test_a_store_without_a_cold_tier_notes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "alone")
    turn(store, LONG)
    assert store.catalog.noted("cold") == []
    store.close()
