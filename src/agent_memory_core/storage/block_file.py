"""One record as one safetensors file: written once, and read only if it is exactly what it should be.

The header is padded so that the payload starts at byte 4096, or at the next multiple for a long header. Its metadata
describes the record and holds one checksum of the payload and one of the header; token ids are not in it. Reading
trusts nothing: sizes, shapes and offsets are checked against the file before anything is allocated.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from agent_memory_core.blocks.block import BlockHash, RecordKind
from agent_memory_core.storage.record import Allocate, HostTensor, Record, StoredRecord
from agent_memory_core.storage.sealing import PLAIN, Cipher

ALIGNMENT = 4096
"""Payloads start at a multiple of so many bytes."""

MAX_HEADER = 2**20
"""Most bytes before the payload; a longer header is damage."""

ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
ITEM_BYTES |= {"U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of one element, by safetensors' name of its type."""

# Most buffers and bytes of one system call: IOV_MAX, and less than what Linux and macOS accept.
_MAX_BUFFERS = 1024
_MAX_CALL = 2**30
_PIECE = 2**20
# What opening a link or a socket fails with.
_NOT_A_FILE = {errno.ELOOP, errno.ENXIO}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One entry of a header's table."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Header:
    """A parsed header."""

    metadata: dict[str, str]
    """what it says about its record"""
    tensors: tuple[_Tensor, ...]
    """in the order of the payload"""
    start: int
    """where the payload starts"""

    @property
    def table(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor."""
        return ((tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors)

    @property
    def payload(self) -> int:
        """Bytes of the payload."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Damaged(Exception):
    """A file is proven not to be what it should be. The message completes a sentence about it."""


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
    """Pass all bytes through a system call that takes many buffers and may move fewer bytes than it was given.

    Args:
        views: the buffers, in order.
        move: the call; it gets some buffers and how many bytes were moved before, and returns how many it moved.

    Returns:
        How many bytes were moved. There are fewer than were given where the call moved none: the file has ended.
    """
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


def _metadata_of(record: StoredRecord, schema: str) -> dict[str, str]:
    """What the header of a record's file must say."""
    return {
        "schema": schema,
        "root": record.root.hex(),
        "key": record.key.hex(),
        "parent": record.parent.hex(),
        "ntok": str(record.ntok),
        "kind": record.kind,
        "xxh3_128": record.checksum,
    }


def _digest_of(metadata: Mapping[str, str], table: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([metadata, table], sort_keys=True).encode())


def content_of(record: StoredRecord, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    """What a sealed payload is, which only opens as this: the record and the name, dtype and shape of each tensor."""
    said = [record.kind, record.root.hex(), record.key.hex(), record.parent.hex(), record.ntok]
    return json.dumps([said, [[name, dtype, list(shape)] for name, dtype, shape in tensors]])


def write_header(
    record: StoredRecord,
    tensors: Mapping[str, HostTensor],
    cipher: Cipher = PLAIN,
    sealed: Mapping[str, str] | None = None,
) -> bytes:
    """All bytes before the payload. How many there are depends neither on ``record.checksum`` nor on ``sealed``.

    Args:
        record: what lies in the file.
        tensors: its tensors, in the order of the payload.
        cipher: what seals the payload.
        sealed: what it said about that.
    """
    table: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    metadata = _metadata_of(record, cipher.schema) | cipher.fields() | dict(sealed or {})
    metadata["writer"] = "agent-memory"
    metadata["header_xxh3_128"] = _digest_of(metadata, table)
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)


def describe_new(root: BlockHash, record: Record[HostTensor], cipher: Cipher = PLAIN) -> StoredRecord:
    """The description of a record that is to be written. Its checksum is all zeros: it takes a pass over the bytes."""
    key, parent, tokens = record.key, record.parent, record.tokens
    new = StoredRecord(key, parent, root, tokens, record.kind, 0, "0" * 32, len(tokens))
    return replace(new, nbytes=len(write_header(new, record.tensors, cipher)) + record.nbytes)


@contextmanager
def open_file(path: Path) -> Iterator[tuple[int, int]]:
    """A regular file, opened for reading, and its size in bytes; anything else in its place is damage."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            raise Damaged("it is not a file") from error
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise Damaged("it is not a file")
        yield fd, found.st_size
    finally:
        os.close(fd)


def read_record(
    fd: int, size: int, stored: StoredRecord, allocate: Allocate, cipher: Cipher = PLAIN
) -> Record[Any]:
    """Read a file into arrays of ``allocate``, verify it and open it.

    Raises:
        Damaged: the file is not what its description says.
        Locked: it is, but ``cipher`` does not open it.
    """
    header = _header_of(fd, size, stored, cipher)
    allocated = allocate([(tensor.dtype, tensor.shape) for tensor in header.tensors])
    arrays = {tensor.name: array for tensor, (array, _) in zip(header.tensors, allocated, strict=True)}
    views = [view for _, view in allocated]
    assert [view.nbytes for view in views] == [tensor.nbytes for tensor in header.tensors]
    moved = transfer(views, lambda batch, done: os.preadv(fd, batch, header.start + done))
    if moved != header.payload:
        raise Damaged("it was cut while it was read")
    if checksum_of(views) != stored.checksum:
        raise Damaged("its payload does not have its checksum")
    opener = cipher.opener(content_of(stored, header.table), header.metadata)
    for view in views:
        opener.update(view)
    opener.finish()
    return Record(stored.key, stored.parent, stored.tokens, stored.kind, arrays)


def describe(
    fd: int, size: int, root: BlockHash, key: BlockHash, kind: RecordKind, cipher: Cipher = PLAIN
) -> StoredRecord:
    """What a file's header says, without token ids. Root, key and kind are those of its path, which must agree.

    Raises:
        Damaged: the header cannot be read, or says something else than the path.
    """
    header = _read_header(fd, size)
    try:
        parent, ntok = bytes.fromhex(header.metadata["parent"]), int(header.metadata["ntok"])
        checksum = bytes.fromhex(header.metadata["xxh3_128"]).hex()
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged("its header cannot be read") from error
    if len(parent) != 32 or not 0 <= ntok < 2**31:
        raise Damaged("its header does not describe a record")
    stored = StoredRecord(key, parent, root, (), kind, size, checksum, ntok)
    _check_metadata(header, stored, cipher)
    return stored


def is_locked(fd: int, size: int, cipher: Cipher) -> bool:
    """Whether a file was sealed with another key than the one that ``cipher`` has.

    Raises:
        Damaged: its header cannot be read.
    """
    return not cipher.has_sealed(_read_header(fd, size).metadata)


def verify(fd: int, size: int, stored: StoredRecord, cipher: Cipher = PLAIN) -> None:
    """Compare a whole file with its description, and see whether it opens.

    Raises:
        Damaged: they differ.
        Locked: they do not, but ``cipher`` does not open it.
    """
    header = _header_of(fd, size, stored, cipher)
    opener = cipher.opener(content_of(stored, header.table), header.metadata)
    digest = xxhash.xxh3_128()
    piece = bytearray(_PIECE)
    at = header.start
    while moved := os.preadv(fd, [piece], at):
        view = memoryview(piece)[:moved]
        digest.update(view)
        opener.update(view)
        at += moved
    if digest.hexdigest() != stored.checksum:
        raise Damaged("its payload does not have its checksum")
    opener.finish()


def _header_of(fd: int, size: int, stored: StoredRecord, cipher: Cipher) -> _Header:
    """The header of a file that has the size of its description and says the same."""
    if size != stored.nbytes:
        raise Damaged(f"it has {size} bytes instead of {stored.nbytes}")
    header = _read_header(fd, size)
    _check_metadata(header, stored, cipher)
    return header


def _check_metadata(header: _Header, stored: StoredRecord, cipher: Cipher) -> None:
    for name, value in _metadata_of(stored, cipher.schema).items():
        if header.metadata.get(name) != value:
            raise Damaged(f"its {name} is {str(header.metadata.get(name))[:80]!r} instead of {value!r}")


def _read_header(fd: int, size: int) -> _Header:
    """Parse a header as strictly as it is written. Nothing is allocated because of what it says."""
    first = os.pread(fd, ALIGNMENT, 0)
    if len(first) < ALIGNMENT:
        raise Damaged("it is shorter than a header")
    start = 8 + int.from_bytes(first[:8], "little")
    if start % ALIGNMENT or not ALIGNMENT <= start <= min(MAX_HEADER, size):
        raise Damaged("its header has no possible length")
    metadata, tensors = _parse(first[8:] if start == ALIGNMENT else os.pread(fd, start - 8, 8))
    if size != start + sum(tensor.nbytes for tensor in tensors):
        raise Damaged("it is not as long as its header says")
    return _Header(metadata, tensors, start)


def _parse(text: bytes) -> tuple[dict[str, str], tuple[_Tensor, ...]]:
    """The metadata and the table of a header, without gaps and with the digest that it names."""
    try:
        table = json.loads(text)
        metadata = table.pop("__metadata__")
        tensors = tuple(_tensor(name, entry) for name, entry in table.items())
        bounds = [tuple(entry["data_offsets"]) for entry in table.values()]
        digest = metadata.pop("header_xxh3_128")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged("its header cannot be read") from error
    ends = list(itertools.accumulate(tensor.nbytes for tensor in tensors))
    if bounds != list(zip([0, *ends], ends, strict=False)) or digest != _digest_of(metadata, table):
        raise Damaged("its header contradicts itself")
    return metadata, tensors


def _tensor(name: str, entry: Mapping[str, Any]) -> _Tensor:
    shape = tuple(entry["shape"])
    if not all(type(n) is int and 0 <= n < 2**40 for n in (*shape, *entry["data_offsets"])):
        raise ValueError("a shape or an offset is not a whole number")
    return _Tensor(name, entry["dtype"], shape, ITEM_BYTES[entry["dtype"]] * math.prod(shape))
