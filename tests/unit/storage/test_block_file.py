"""The file of one record: any tool can read it, and nothing about it is left to chance."""

from __future__ import annotations

import os
import struct

import mlx.core as mx
import xxhash
from safetensors import safe_open
from support.stored_turns import (
    BLOCK,
    ROOT,
    allocate,
    content,
    ids,
    path_of,
    wanted,
)

from agent_memory_core.blocks.block import (
    block_hash,
    pack_tokens,
)
from agent_memory_core.storage import block_file
from agent_memory_core.storage.block_file import ALIGNMENT
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.record import HostTensor, Record


def test_any_tool_reads_a_block_and_learns_what_it_is_but_not_its_tokens(store: BlockStore) -> None:
    data = os.urandom(16)
    tokens = ids(BLOCK, 0x5EC8E701)
    key = block_hash(ROOT, tokens)
    tensors = {
        "0.v": HostTensor("BF16", (2, 4), memoryview(data)),
        "0.k.codes": HostTensor("U32", (2, 2), memoryview(data)),
        "scales": HostTensor("F16", (8,), memoryview(data)),
        "nothing": HostTensor("F32", (0, 3), memoryview(b"")),
    }
    store.commit([Record(key, ROOT, tokens, "block", tensors)], wanted(tokens))
    path = path_of(store, key)
    assert path == store.path / "ns" / ROOT.hex() / "blocks" / key.hex()[:2] / f"{key.hex()}.safetensors"
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    assert {name: (x.dtype, tuple(x.shape)) for name, x in arrays.items()} == {
        "0.v": (mx.bfloat16, (2, 4)),
        "0.k.codes": (mx.uint32, (2, 2)),
        "scales": (mx.float16, (8,)),
        "nothing": (mx.float32, (0, 3)),
    }
    assert all(bytes(memoryview(arrays[name]).cast("B")) == data for name in list(tensors)[:3])
    with safe_open(path, framework="numpy") as opened:
        assert opened.get_tensor("0.k.codes").tobytes() == data
        said = opened.metadata()
    raw = path.read_bytes()
    checksum = xxhash.xxh3_128_hexdigest(raw[ALIGNMENT:])
    assert said | {"header_xxh3_128": ""} == {
        "schema": "2",
        "root": ROOT.hex(),
        "key": key.hex(),
        "parent": ROOT.hex(),
        "ntok": str(BLOCK),
        "kind": "block",
        "xxh3_128": checksum,
        "header_xxh3_128": "",
        "writer": "agent-memory",
    }
    assert raw[ALIGNMENT:] == data * 3
    assert pack_tokens(tokens[:1]) not in raw


def test_a_long_header_ends_at_the_next_multiple_of_4096(store: BlockStore) -> None:
    tokens = ids(BLOCK)
    views = [memoryview(content(bytes([n]), 8)) for n in range(200)]
    tensors = {f"layer.{n}.keys": HostTensor("U8", (8,), view) for n, view in enumerate(views)}
    made = Record(block_hash(ROOT, tokens), ROOT, tokens, "block", tensors)
    store.commit([made], wanted(tokens))
    with path_of(store, made.key).open("rb") as file:
        start = 8 + struct.unpack("<Q", file.read(8))[0]
    assert start > ALIGNMENT
    assert start % ALIGNMENT == 0
    loaded = store.load(ROOT, made.key, allocate)
    assert loaded is not None
    assert [bytes(x) for x in loaded.tensors.values()] == [bytes(view) for view in views]
    with safe_open(path_of(store, made.key), framework="numpy") as opened:
        assert opened.get_tensor("layer.199.keys").tobytes() == bytes(views[199])


def test_bytes_pass_whole_through_calls_that_move_a_part() -> None:
    views = [memoryview(content(bytes([n]), 0 if n % 5 == 0 else 1 + 13 * n)) for n in range(60)] * 40
    wanted_bytes = b"".join(views)
    moved = bytearray()

    def move(batch: list[memoryview], done: int) -> int:
        assert done == len(moved)
        assert 0 < len(batch) <= 1024
        piece = b"".join(batch)[: 1 + done % 977]
        moved.extend(piece)
        return len(piece)

    assert block_file.transfer(views, move) == len(wanted_bytes)
    assert moved == wanted_bytes
    assert block_file.transfer(views, lambda batch, done: min(5, 12 - done)) == 12
