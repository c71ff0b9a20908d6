"""A session as a stream of bytes, to be carried to a store on another machine.

    agent-memory session 1
    {"roots": [identity, ...], "branches": [...]}
    {"record": {...}, "nbytes": n}
    n bytes
    ...
    {"end": the number of records}

Each line is JSON; names are in hex. A record's line has its kind, its parent, its token ids, the dtypes and shapes of
its tensors and the checksum of the bytes that follow, which are the tensors one after another. Its name is the hash of
kind, parent and token ids, so the names prove what a chain says. Nothing is encrypted, whatever the stores are.

A root is hashed from an identity, in which are the fingerprint of the model's weights and the namespace. Where a
session is imported into another namespace, all names are made anew. A model with other weights finds nothing of it.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

from agent_memory_core.blocks.block import RECORD_KINDS, BlockHash, RecordKind, record_hash, root_hash
from agent_memory_core.errors import InvalidRequest, SessionNotFound
from agent_memory_core.storage.block_file import ITEM_BYTES, bytes_of, checksum_of
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import BranchCommit, BranchRow, SessionOwner
from agent_memory_core.storage.record import HostTensor, Record, StoredRecord

_FIRST = b"agent-memory session 1\n"
_MOST_LINE = 2**28
_MOST_RECORD = 2**34


# Out --------------------------------------------------------------------------------------------------------


def export_session(store: BlockStore, namespace: str, session_id: str, file: BinaryIO) -> int:
    """Write all branches of a session, and return how many records that were.

    A branch of which something was evicted or damaged is left out, or ends up without it: that is computed again.

    Raises:
        SessionNotFound: there is no such session on disk.
        OSError: the file cannot be written.
    """
    branches = store.catalog.branches.of_session(namespace, session_id)
    if not branches:
        raise SessionNotFound(f"there is no session {session_id!r} in namespace {namespace!r} on disk.")
    identities = {root: store.catalog.records.identity(root) for root in {row.root for row in branches}}
    file.write(_FIRST)
    _write_line(
        file, {"roots": [*identities.values()], "branches": [_branch(store, row) for row in branches]}
    )
    count = 0
    for record, root in _records(store, branches):
        loaded = store.load(root, record.key, on_host)
        if loaded is not None:
            _write_record(file, loaded)
            count += 1
    _write_line(file, {"end": count})
    return count


def _branch(store: BlockStore, row: BranchRow) -> dict[str, Any]:
    return {
        "root": row.root.hex(),
        "head": row.head.hex(),
        "tail": row.tail.hex() if row.tail is not None else None,
        "tokens": row.tokens,
        "prompt_tokens": row.prompt_tokens,
        "lane": row.lane,
        "dependencies": [key.hex() for key in store.catalog.branches.dependencies(row.branch_id)],
    }


def _records(store: BlockStore, branches: Sequence[BranchRow]) -> Iterator[tuple[StoredRecord, BlockHash]]:
    """What the branches reach, once each, every record after the one that it follows."""
    seen: set[BlockHash] = set()
    for row in branches:
        for key in ends_of(store, row):
            for record in chain_to(store, row.root, key, seen):
                seen.add(record.key)
                yield record, row.root


def ends_of(store: BlockStore, row: BranchRow) -> list[BlockHash]:
    """The last record of a branch's chain, and the further ones that it depends on."""
    return [row.tail or row.head, *sorted(store.catalog.branches.dependencies(row.branch_id))]


def chain_to(store: BlockStore, root: BlockHash, key: BlockHash, seen: set[BlockHash]) -> list[StoredRecord]:
    """A record and all before it that are not written yet, first to last, by the engine's names."""
    found: list[StoredRecord] = []
    while key != root and key not in seen:
        record = store.catalog.records.get(store.keys.hide(key))
        if record is None:
            return []
        found.append(replace(record, key=key, parent=store.keys.show(record.parent)))
        key = found[-1].parent
    return found[::-1]


def on_host(wanted: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[HostTensor, memoryview]]:
    """Tensors in host memory, for `BlockStore.load`."""
    tensors = []
    for dtype, shape in wanted:
        data = memoryview(bytearray(ITEM_BYTES[dtype] * math.prod(shape)))
        tensors.append((HostTensor(dtype, shape, data), data))
    return tensors


def _write_record(file: BinaryIO, record: Record[HostTensor]) -> None:
    for part in packed(record)[1]:
        file.write(part)


def packed(record: Record[HostTensor]) -> tuple[str, list[bytes | memoryview]]:
    """The checksum of a record, and its bytes in the stream: its line, then its tensors."""
    views = [bytes_of(tensor.data) for tensor in record.tensors.values()]
    checksum = checksum_of(views)
    said = {
        "kind": record.kind,
        "parent": record.parent.hex(),
        "tokens": list(record.tokens),
        "tensors": [[name, tensor.dtype, list(tensor.shape)] for name, tensor in record.tensors.items()],
        "xxh3_128": checksum,
    }
    return checksum, [_line({"record": said, "nbytes": sum(view.nbytes for view in views)}), *views]


def unpacked(data: memoryview, checksum: str) -> Record[HostTensor]:
    """The record whose bytes `packed` made.

    Raises:
        ValueError: they are not, or it has not that checksum.
    """
    try:
        file = io.BytesIO(data)
        line = _read_line(file)
        said = line["record"]
        if said["xxh3_128"] != checksum:
            raise ValueError("it is another record")
        kind, tokens, parent = (
            _kind(said["kind"]),
            tuple(map(int, said["tokens"])),
            bytes.fromhex(said["parent"]),
        )
        tensors = _read_tensors(file, said, line["nbytes"])
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    return Record(record_hash(kind, parent, tokens), parent, tokens, kind, tensors)


def _line(said: Mapping[str, Any]) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _write_line(file: BinaryIO, said: Mapping[str, Any]) -> None:
    file.write(_line(said))


# In ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Names:
    """The names of the stream, and what they are called here."""

    renamed: dict[BlockHash, BlockHash]
    roots: dict[BlockHash, BlockHash]
    """By the name here of a record or a root: the root of its chain."""


def import_session(store: BlockStore, namespace: str, session_id: str, file: BinaryIO) -> int:
    """Read what `export_session` wrote and add it to a session; return the tokens of its longest branch.

    Raises:
        InvalidRequest: the stream is damaged or cut, or is none. No branch is added then.
        StoreError: the store cannot take it.
    """
    try:
        return _import(store, namespace, session_id, file)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"this is no exported session, or it is damaged: {error}.") from error


def _import(store: BlockStore, namespace: str, session_id: str, file: BinaryIO) -> int:
    if file.readline(len(_FIRST)) != _FIRST:
        raise ValueError("it does not begin as one")
    begin = _read_line(file)
    names = _Names({}, {})
    for identity in begin["roots"]:
        _take_root(store, names, identity, namespace)
    while "record" in (line := _read_line(file)):
        record = _take_record(names, line, file)
        if record is not None:
            root = names.roots[record.key]
            store.keep([record], SessionOwner(root=root, namespace=namespace, session_id=session_id))
    if not isinstance(line["end"], int):
        raise ValueError("it does not end as one")
    taken = [_take_branch(store, names, branch, namespace, session_id) for branch in begin["branches"]]
    return max(taken, default=0)


def _take_root(store: BlockStore, names: _Names, said: Mapping[str, str], namespace: str) -> None:
    identity = {name: value for name, value in said.items() if name != "name"}
    here = root_hash({**identity, "namespace": namespace})
    names.renamed[root_hash(identity)] = names.roots[here] = here
    store.identify(here, {**said, "namespace": namespace}, namespace)


def _take_record(names: _Names, line: Mapping[str, Any], file: BinaryIO) -> Record[HostTensor] | None:
    """The next record by its name here; None if what it follows was damaged where it came from."""
    said = line["record"]
    kind, tokens, before = _kind(said["kind"]), tuple(map(int, said["tokens"])), bytes.fromhex(said["parent"])
    tensors = _read_tensors(file, said, line["nbytes"])
    parent = names.renamed.get(before)
    if parent is None:
        return None
    key = record_hash(kind, parent, tokens)
    names.renamed[record_hash(kind, before, tokens)] = key
    names.roots[key] = names.roots[parent]
    return Record(key, parent, tokens, kind, tensors)


def _take_branch(
    store: BlockStore, names: _Names, said: Mapping[str, Any], namespace: str, session_id: str
) -> int:
    """Add a branch, if all of it came; return its tokens."""
    head, tail = bytes.fromhex(said["head"]), said["tail"]
    needed = [head, *([bytes.fromhex(tail)] if tail is not None else [])]
    if any(key not in names.renamed for key in needed):
        return 0
    here = [names.renamed[key] for key in needed]
    dependencies = [names.renamed.get(bytes.fromhex(key)) for key in said["dependencies"]]
    store.commit(
        [],
        BranchCommit(
            root=names.roots[here[0]],
            namespace=namespace,
            session_id=session_id,
            branch_id=None,
            generation=0,
            head=here[0],
            tail=here[1] if tail is not None else None,
            tokens=int(said["tokens"]),
            prompt_tokens=int(said["prompt_tokens"]),
            lane=str(said["lane"]),
            dependencies=tuple(key for key in dependencies if key is not None),
        ),
    )
    return int(said["tokens"])


def _kind(name: Any) -> RecordKind:
    if name not in RECORD_KINDS:
        raise ValueError(f"it has a record of the kind {name!r}")
    return cast(RecordKind, name)


def _read_tensors(file: BinaryIO, said: Mapping[str, Any], nbytes: int) -> dict[str, HostTensor]:
    shapes = [(str(name), str(dtype), tuple(map(int, shape))) for name, dtype, shape in said["tensors"]]
    sizes = [ITEM_BYTES[dtype] * math.prod(shape) for _, dtype, shape in shapes]
    if sum(sizes) != nbytes or not all(0 <= size <= _MOST_RECORD for size in sizes):
        raise ValueError("a record is not as long as its tensors")
    views = []
    for size in sizes:
        data = file.read(size)
        if len(data) != size:
            raise ValueError("it ends too early")
        views.append(memoryview(data))
    if checksum_of(views) != said["xxh3_128"]:
        raise ValueError("a record does not have its checksum")
    return {
        name: HostTensor(dtype, shape, view) for (name, dtype, shape), view in zip(shapes, views, strict=True)
    }


def _read_line(file: BinaryIO) -> dict[str, Any]:
    line = file.readline(_MOST_LINE)
    if not line.endswith(b"\n"):
        raise ValueError("it ends too early")
    said = json.loads(line)
    if not isinstance(said, dict):
        raise ValueError("it has a line that is no object")
    return said
