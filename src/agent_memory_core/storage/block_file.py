"""One block or tail as one safetensors file: written once, read only if it is exactly what it should be.

The header is padded so that the payload starts at 4096, or the next multiple for a long one. Its metadata says
what the block is and holds a checksum of the payload and one of the tensors' table; token ids are not in it.
Reading trusts nothing: a size, a shape or an offset is checked against the file before anything is allocated.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from agent_memory_core.blocks.block import BlockHash, RecordKind
from agent_memory_core.storage.catalog import BlockRow
from agent_memory_core.storage.folder import FORMAT

ALIGNMENT = 4096
MAX_HEADER = 2**20

_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
_ITEM_BYTES |= {"U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_MAX_BUFFERS = 1024
_MAX_CALL = 2**30
_PIECE = 2**20
_FOREIGN = {errno.ELOOP, errno.ENXIO}

Allocate = Callable[[str, tuple[int, ...]], tuple[Any, memoryview]]
"""From a safetensors dtype and a shape to an array and its writable bytes, which the store fills."""


@dataclass(frozen=True, slots=True)
class HostTensor:
    """One tensor in host memory. ``dtype`` is safetensors' name; ``data`` are its contiguous bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class Record:
    """One record to store, of whatever kind. ``tensors`` are laid down in this order, without gaps."""

    key: BlockHash
    parent: BlockHash
    tokens: tuple[int, ...]
    kind: RecordKind
    tensors: tuple[HostTensor, ...]


@dataclass(frozen=True, slots=True)
class LoadedBlock:
    """One verified block. ``tensors`` are the arrays that were allocated for it; ``nbytes`` is their size.

    ``tokens`` is empty where the catalog was rebuilt and the ids were not yet named again.
    """

    key: BlockHash
    parent: BlockHash
    tokens: tuple[int, ...]
    kind: RecordKind
    tensors: dict[str, Any]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Header:
    """A parsed header: what it says of its block, its tensors in order, and where the payload starts."""

    said: dict[str, str]
    tensors: tuple[_Tensor, ...]
    start: int

    @property
    def payload(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class Damaged(Exception):
    """A file is proven not to be what the catalog says."""


def bytes_of(data: memoryview) -> memoryview:
    """The same memory as plain bytes."""
    return data if data.format == "B" and data.ndim == 1 else data.cast("B")


def checksum_of(views: Sequence[memoryview]) -> str:
    """The xxh3-128 of all bytes, in hex."""
    digest = xxhash.xxh3_128()
    for view in views:
        digest.update(view)
    return digest.hexdigest()


def transfer(views: Sequence[memoryview], move: Callable[[list[memoryview], int], int]) -> int:
    """Pass all bytes through a vectored call that may move fewer; return how many it moved before the end."""
    pending = deque(view for view in views if view.nbytes)
    done = 0
    while pending:
        room = _MAX_CALL
        batch: list[memoryview] = []
        for view in itertools.islice(pending, _MAX_BUFFERS):
            batch.append(view[:room])
            room -= batch[-1].nbytes
            if room == 0:
                break
        moved = move(batch, done)
        if moved == 0:
            break
        done += moved
        while moved:
            view = pending.popleft()
            if view.nbytes > moved:
                pending.appendleft(view[moved:])
            moved -= min(moved, view.nbytes)
    return done


def _said_of(row: BlockRow) -> dict[str, str]:
    """What the header of a block says of it."""
    return {
        "schema": str(FORMAT),
        "root": row.root.hex(),
        "key": row.key.hex(),
        "parent": row.parent.hex(),
        "ntok": str(row.ntok),
        "kind": row.kind,
        "xxh3_128": row.checksum,
    }


def _digest_of(said: Mapping[str, str], table: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([said, table], sort_keys=True).encode())


def write_header(row: BlockRow, tensors: Sequence[HostTensor]) -> bytes:
    """What stands before the payload. Its length does not depend on the checksum in ``row``."""
    table: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.data.nbytes
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    said = {**_said_of(row), "writer": "agent-memory"}
    said["header_xxh3_128"] = _digest_of(said, table)
    text = json.dumps({"__metadata__": said, **table}, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)


@contextmanager
def open_file(path: Path) -> Iterator[tuple[int, int]]:
    """A regular file, opened for reading, and its size in bytes; anything else in its place is damage."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _FOREIGN:
            raise Damaged("it is not a file") from error
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise Damaged("it is not a file")
        yield fd, found.st_size
    finally:
        os.close(fd)


def read_header(fd: int, size: int) -> _Header:
    """Parse a header as strictly as it is written. Nothing is allocated by what it says."""
    first = os.pread(fd, ALIGNMENT, 0)
    if len(first) < ALIGNMENT:
        raise Damaged("it is shorter than a header")
    start = 8 + int.from_bytes(first[:8], "little")
    if start % ALIGNMENT or not ALIGNMENT <= start <= min(MAX_HEADER, size):
        raise Damaged("its header has no possible length")
    text = first[8:] if start == ALIGNMENT else os.pread(fd, start - 8, 8)
    try:
        table = json.loads(text)
        said = table.pop("__metadata__")
        tensors = tuple(_tensor(name, entry) for name, entry in table.items())
        bounds = [tuple(entry["data_offsets"]) for entry in table.values()]
        digest = said.pop("header_xxh3_128")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged("its header cannot be read") from error
    ends = list(itertools.accumulate(tensor.nbytes for tensor in tensors))
    if bounds != list(zip([0, *ends], ends, strict=False)) or digest != _digest_of(said, table):
        raise Damaged("its header contradicts itself")
    if size != start + sum(tensor.nbytes for tensor in tensors):
        raise Damaged("it is not as long as its header says")
    return _Header(said, tensors, start)


def _tensor(name: str, entry: Mapping[str, Any]) -> _Tensor:
    shape = tuple(entry["shape"])
    if not all(type(n) is int and 0 <= n < 2**40 for n in (*shape, *entry["data_offsets"])):
        raise ValueError("a shape of whole numbers")
    nbytes = _ITEM_BYTES[entry["dtype"]]
    for n in shape:
        nbytes *= n
    return _Tensor(name, entry["dtype"], shape, nbytes)


def _check_said(header: _Header, row: BlockRow) -> None:
    for name, value in _said_of(row).items():
        if header.said.get(name) != value:
            raise Damaged(f"its {name} is {str(header.said.get(name))[:80]!r} instead of {value!r}")


def _header_of(fd: int, size: int, row: BlockRow) -> _Header:
    """The header of a file that has the size of its row and says the same."""
    if size != row.nbytes:
        raise Damaged(f"it has {size} bytes instead of {row.nbytes}")
    header = read_header(fd, size)
    _check_said(header, row)
    return header


def read_block(fd: int, size: int, row: BlockRow, allocate: Allocate) -> LoadedBlock:
    """Read and verify the block of ``row`` into arrays of ``allocate``.

    Raises:
        Damaged: the file is not what the row says.
    """
    header = _header_of(fd, size, row)
    arrays: dict[str, Any] = {}
    views: list[memoryview] = []
    for tensor in header.tensors:
        arrays[tensor.name], view = allocate(tensor.dtype, tensor.shape)
        assert view.nbytes == tensor.nbytes
        views.append(view)
    moved = transfer(views, lambda batch, done: os.preadv(fd, batch, header.start + done))
    if moved != header.payload:
        raise Damaged("it was cut while it was read")
    if checksum_of(views) != row.checksum:
        raise Damaged("its payload does not have its checksum")
    return LoadedBlock(row.key, row.parent, row.tokens, row.kind, arrays, header.payload)


def row_of(fd: int, size: int, root: BlockHash, key: BlockHash, kind: RecordKind) -> BlockRow:
    """The row of a file as its header has it, without token ids; its place must agree with its header."""
    header = read_header(fd, size)
    try:
        parent, ntok = bytes.fromhex(header.said["parent"]), int(header.said["ntok"])
        checksum = bytes.fromhex(header.said["xxh3_128"]).hex()
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged("its header cannot be read") from error
    if len(parent) != 32 or not 0 <= ntok < 2**31:
        raise Damaged("its header is not one of a block")
    row = BlockRow(key, parent, root, (), kind, size, checksum, ntok)
    _check_said(header, row)
    return row


def verify(fd: int, size: int, row: BlockRow) -> None:
    """Compare a whole file with its row."""
    header = _header_of(fd, size, row)
    digest = xxhash.xxh3_128()
    piece = bytearray(_PIECE)
    at = header.start
    while moved := os.preadv(fd, [piece], at):
        digest.update(memoryview(piece)[:moved])
        at += moved
    if digest.hexdigest() != row.checksum:
        raise Damaged("its payload does not have its checksum")
