"""What lies in the store may be anything: it is a miss or the right bytes, and never costs more than its size."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings, strategies as st
from support.stored_turns import (
    BLOCK,
    FILE,
    IDENTITY,
    PAYLOAD,
    ROOT,
    allocate,
    content,
    files,
    is_right,
    is_whole,
    path_of,
    records,
    turn,
)

from agent_memory_core.errors import StoreUnreadable
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.record import Record

TOKENS = tuple(range(2 * BLOCK + 2))
FIRST, SECOND, TAIL = (made.key for made in records(TOKENS))
START = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    store = BlockStore(tmp_path / "store", quota_bytes=2**30)
    store.identify(ROOT, IDENTITY, "default")
    turn(store, TOKENS)
    yield store
    store.close()


class Meter:
    """Allocates, and knows how much."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __call__(self, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[Any, memoryview]]:
        allocated: list[tuple[Any, memoryview]] = [*allocate(tensors)]
        self.nbytes += sum(len(array) for array, _ in allocated)
        return allocated


# Harm that leaves a file


def header_of(raw: bytes) -> dict[str, Any]:
    length = struct.unpack("<Q", raw[:8])[0]
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return header


def with_header(raw: bytes, text: bytes) -> bytes:
    """The same payload after another header."""
    length = -(-(8 + len(text)) // START) * START - 8
    return struct.pack("<Q", length) + text.ljust(length) + raw[START:]


def signed(header: dict[str, Any]) -> bytes:
    """A header that agrees with itself, whatever it says."""
    table = {name: value for name, value in header.items() if name != "__metadata__"}
    said = {name: value for name, value in header["__metadata__"].items() if name != "header_xxh3_128"}
    said["header_xxh3_128"] = xxhash.xxh3_128_hexdigest(json.dumps([said, table], sort_keys=True).encode())
    return json.dumps({"__metadata__": said, **table}).encode()


def said(**others: Any) -> Callable[[bytes], bytes]:
    """A header that says something else of its block."""

    def harm(raw: bytes) -> bytes:
        header = header_of(raw)
        header["__metadata__"] |= others
        return with_header(raw, signed(header))

    return harm


def entry(**others: Any) -> Callable[[bytes], bytes]:
    """A header that describes its first tensor in another way."""

    def harm(raw: bytes) -> bytes:
        header = header_of(raw)
        header["0.k.codes"] |= others
        return with_header(raw, signed(header))

    return harm


def unsigned(harm: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The same without a digest that agrees, as chance does it."""

    def harm_alone(raw: bytes) -> bytes:
        header = header_of(harm(raw))
        header["__metadata__"]["header_xxh3_128"] = header_of(raw)["__metadata__"]["header_xxh3_128"]
        return with_header(raw, json.dumps(header).encode())

    return harm_alone


def renamed(raw: bytes) -> bytes:
    return raw.replace(b'"0.v"', b'"0.w"', 1)


def longer_header(raw: bytes) -> bytes:
    return with_header(raw, json.dumps(header_of(raw)).encode().ljust(3 * START))


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :]


def claim(length: int) -> Callable[[bytes], bytes]:
    return lambda raw: struct.pack("<Q", length) + raw[8:]


HUGE = 2**39
FILE_HARMS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut in the length": lambda raw: raw[:5],
    "cut in the header": lambda raw: raw[:2000],
    "cut before the payload": lambda raw: raw[:START],
    "cut by one byte": lambda raw: raw[:-1],
    "one byte more": lambda raw: raw + b"\0",
    "a page more": lambda raw: raw + bytes(START),
    "all zeros": lambda raw: bytes(len(raw)),
    "payload of zeros": lambda raw: raw[:START] + bytes(PAYLOAD),
    "last page of zeros": lambda raw: raw[:-START] + bytes(START),
    "first byte of the payload": flip(START),
    "a byte amid the payload": flip(START + PAYLOAD // 2),
    "last byte of the payload": flip(FILE - 1),
    "a byte of the length": flip(1),
    "first byte of the header": flip(8),
    "tensors in another order": lambda raw: (
        raw[:START] + raw[START + PAYLOAD // 2 :] + raw[START:][: PAYLOAD // 2]
    ),
    "header claims 2**63 bytes": claim(2**63),
    "header claims 2**64 - 1 bytes": claim(2**64 - 1),
    "header claims the whole file": claim(len(content(b"")) + START - 8),
    "header claims nothing": claim(0),
    "header is an array": lambda raw: with_header(raw, b"[]"),
    "header is a number": lambda raw: with_header(raw, b"7"),
    "header is no JSON": lambda raw: with_header(raw, b"{"),
    "header is not UTF-8": lambda raw: with_header(raw, b'{"\xff": 1}'),
    "header is deep": lambda raw: with_header(raw, b'{"a":' + b"[" * 4000),
    "header has a number of 5000 digits": lambda raw: with_header(raw, b'{"a":' + b"9" * 4000 + b"}"),
    "header without metadata": lambda raw: with_header(raw, b"{}"),
    "header says nothing": lambda raw: with_header(raw, b'{"__metadata__":{}}'),
    "metadata is a list": lambda raw: with_header(raw, b'{"__metadata__":[1]}'),
    "tensor is a list": lambda raw: with_header(raw, b'{"__metadata__":{"header_xxh3_128":""},"0.v":[1]}'),
    "another root": said(root="0" * 64),
    "another key": said(key="0" * 64),
    "another parent": said(parent="0" * 64),
    "another parent by chance": unsigned(said(parent="0" * 64)),
    "another number of tokens": said(ntok="5"),
    "many more tokens": said(ntok="9" * 400),
    "fewer tokens than none": said(ntok="-4"),
    "another kind": said(kind="tail"),
    "another schema": said(schema="1"),
    "another checksum": said(xxh3_128="0" * 32),
    "a number instead of a text": said(ntok=4),
    "a list instead of a text": said(key=["a"]),
    "a list instead of a checksum": said(xxh3_128=["a"]),
    "another name of a tensor": renamed,
    "another dtype of equal size": unsigned(entry(dtype="I32")),
    "an unknown dtype": entry(dtype="U33"),
    "a dtype that is a list": entry(dtype=["U32"]),
    "another shape of equal size": unsigned(entry(shape=[2, PAYLOAD // 16])),
    "a huge shape": entry(shape=[HUGE]),
    "a huge shape and offsets": entry(shape=[HUGE], data_offsets=[0, 4 * HUGE]),
    "a product beyond all bounds": entry(shape=[HUGE] * 50),
    "a negative shape": entry(shape=[-PAYLOAD // 8]),
    "two negative sizes": entry(shape=[-1, -PAYLOAD // 8]),
    "a fraction as a shape": entry(shape=[PAYLOAD / 8]),
    "a truth as a shape": entry(shape=[True, PAYLOAD // 8]),
    "a text as a shape": entry(shape="12"),
    "overlapping tensors": entry(data_offsets=[4, 4 + PAYLOAD // 2]),
    "three offsets": entry(data_offsets=[0, PAYLOAD // 2, 7]),
    "a hole between tensors": entry(shape=[PAYLOAD // 8 - 1], data_offsets=[0, PAYLOAD // 2 - 4]),
    "a longer header": longer_header,
}


@pytest.mark.parametrize("name", FILE_HARMS)
def test_a_harmed_file_is_a_miss_set_aside_and_replaced_by_the_next_turn(
    store: BlockStore, name: str
) -> None:
    path = path_of(store, SECOND)
    before = path.read_bytes()
    harmed = FILE_HARMS[name](before)
    assert harmed != before
    path.write_bytes(harmed)
    meter = Meter()
    assert store.load(ROOT, SECOND, meter) is None
    assert meter.nbytes <= len(harmed)
    assert not path.exists()
    (aside,) = (store.path / "quarantine").iterdir()
    assert aside.read_bytes() == harmed
    assert store.stats()["miss_damaged"] == 1
    assert store.catalog.records.known_prefix([FIRST, SECOND]) == 1
    assert store.load(ROOT, SECOND, allocate) is None
    assert store.stats()["miss_unknown"] == 1
    (branch,) = store.catalog.branches.of_session("default", "s", ROOT)
    assert store.catalog.branches.tokens(branch) == TOKENS
    turn(store, TOKENS, "s", branch)
    assert is_whole(store, TOKENS)
    assert store.check().clean


# Without the catalog these cannot be told; their block is right, and its place in the chain is put right.
BELIEVED = {"another parent", "another number of tokens", "a longer header"}


@pytest.mark.parametrize("name", FILE_HARMS)
def test_a_harmed_file_cannot_keep_a_lost_catalog_from_being_rebuilt(store: BlockStore, name: str) -> None:
    path = path_of(store, SECOND)
    path.write_bytes(FILE_HARMS[name](path.read_bytes()))
    store.close()
    for part in store.path.glob("catalog.db*"):
        part.unlink()
    again = BlockStore(store.path, quota_bytes=2**30)
    for key in (FIRST, SECOND, TAIL):
        block = again.load(ROOT, key, allocate)
        assert (block is None) == (key == SECOND and name not in BELIEVED)
        assert block is None or is_right(block)
    again.check(fix=True)
    assert path.exists() == (name in BELIEVED)
    branch = turn(again, TOKENS, token_ids=TOKENS)
    assert is_whole(again, TOKENS)
    assert again.catalog.branches.tokens(branch) == TOKENS
    assert again.check().clean
    again.close()


def test_a_foreign_file_of_the_right_size_is_a_miss(store: BlockStore) -> None:
    shutil.copy(path_of(store, FIRST), path_of(store, SECOND))
    assert store.load(ROOT, SECOND, allocate) is None
    os.replace(path_of(store, FIRST), path_of(store, TAIL))
    assert store.load(ROOT, TAIL, allocate) is None
    assert store.load(ROOT, FIRST, allocate) is None
    assert store.stats()["quarantined"] == 2


# Harm that leaves no file


def to_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def to_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def to_device_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("")


@pytest.mark.parametrize("harm", [to_link, to_dangling_link, to_device_link, to_pipe, to_folder])
def test_what_is_not_a_file_is_never_followed_nor_waited_for(
    store: BlockStore, harm: Callable[[Path], None]
) -> None:
    path = path_of(store, SECOND)
    harm(path)
    started = time.perf_counter()
    assert store.load(ROOT, SECOND, Meter()) is None
    assert time.perf_counter() - started < 2
    assert not os.path.lexists(path)
    assert store.stats()["quarantined"] == 1
    (branch,) = store.catalog.branches.of_session("default", "s", ROOT)
    turn(store, TOKENS, "s", branch)
    assert is_whole(store, TOKENS)


def test_writing_never_follows_a_link_in_the_place_of_a_block(store: BlockStore, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    tokens = (*TOKENS[: 2 * BLOCK], 70, 71, 72, 73)
    key = records(tokens)[2].key
    path = store.path / "ns" / ROOT.hex() / "blocks" / key.hex()[:2] / f"{key.hex()}.safetensors"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.symlink_to(victim)
    turn(store, tokens, "other")
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert is_whole(store, tokens)


def test_a_link_or_folder_in_the_place_of_the_stores_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    (folder / "SCHEMA").symlink_to(tmp_path / "victim")
    BlockStore(folder).close()
    assert not (tmp_path / "victim").exists()
    assert (folder / "SCHEMA").is_file()
    for path in folder.glob("catalog.db*"):
        path.unlink()
    (folder / "catalog.db").mkdir()
    BlockStore(folder).close()
    assert (folder / "catalog.db").is_file()


# Any harm at all


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockStore]:
    store = BlockStore(tmp_path_factory.mktemp("any") / "store", quota_bytes=2**30)
    turn(store, TOKENS)
    yield store
    store.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, FILE + 100),
    new=st.binary(max_size=40),
    cut=st.integers(0, 40),
)
@example(at=FILE, new=b"", cut=0)
def test_whatever_bytes_are_changed_a_load_gives_the_right_ones_or_none(
    kept: BlockStore, at: int, new: bytes, cut: int
) -> None:
    (branch,) = kept.catalog.branches.of_session("default", "s", ROOT)
    turn(kept, TOKENS, "s", branch)
    path = path_of(kept, FIRST)
    before = path.read_bytes()
    harmed = before[:at] + new + before[at + cut :]
    path.write_bytes(harmed)
    meter = Meter()
    block = kept.load(ROOT, FIRST, meter)
    assert meter.nbytes <= len(harmed)
    if harmed == before:
        assert block is not None
    if block is not None:
        assert is_right(block)
        assert as_made(block)


def as_made(block: Record[Any]) -> bool:
    made = records(TOKENS)[0]
    return (block.tokens, block.parent, [*block.tensors]) == (
        made.tokens,
        made.parent,
        [*made.tensors],
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 200_000), new=st.binary(min_size=1, max_size=5000), cut=st.booleans())
def test_whatever_happens_to_the_catalog_a_store_opens_and_gives_no_wrong_bytes(
    tmp_path_factory: pytest.TempPathFactory, at: int, new: bytes, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("any") / "store"
    store = BlockStore(folder, quota_bytes=2**30)
    branch = turn(store, TOKENS)
    store.close()
    path = folder / "catalog.db"
    raw = path.read_bytes()
    at %= len(raw)
    harmed = raw[:at] if cut else (raw[:at] + new + raw[at + len(new) :])[: len(raw)]
    path.write_bytes(harmed)
    try:
        store = BlockStore(folder, quota_bytes=2**30)
    except StoreUnreadable:
        # The catalog claims to be of another version.
        assert harmed[60:64] != raw[60:64]
        return
    for key in (FIRST, SECOND, TAIL):
        block = store.load(ROOT, key, allocate)
        assert block is None or is_right(block)
    tokens = store.catalog.branches.tokens(branch)
    assert tokens == TOKENS[: len(tokens)]
    assert {row.tokens for row in store.catalog.records.select("WHERE parent = ? AND stored", (ROOT,))} <= {
        TOKENS[:BLOCK],
        (),
    }
    store.close()


# Names


@pytest.mark.parametrize(
    "name",
    [
        "../../../escaped",
        "/etc/passwd",
        "a/../b",
        "..",
        "con\\nul",
        "'; DELETE FROM blocks; --",
        "%s{0}",
        "🦊" * 99,
    ],
)
def test_no_name_becomes_a_path_or_a_statement(tmp_path: Path, name: str) -> None:
    store = BlockStore(tmp_path / "store", quota_bytes=2**30)
    store.identify(ROOT, IDENTITY, name)
    branch = turn(store, TOKENS, name, namespace=name)
    store.catalog.branches.fork(name, name, name + "2")
    store.catalog.branches.pin(name, name + "2", True)
    assert store.catalog.branches.of_session(name, name, ROOT) == [branch]
    assert {i.session_id for i in store.catalog.branches.sessions(name)} == {name, name + "2"}
    assert store.forget(name, name)
    assert is_whole(store, TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert all(path.is_relative_to(store.path / "ns" / ROOT.hex()) for path in files(store))
    assert store.check().clean
    store.close()
