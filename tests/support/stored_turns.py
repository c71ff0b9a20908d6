"""Turns made of nothing: blocks whose bytes follow from their name, so that any reader can tell a wrong one.

Run as a program it commits turns to a store until it is killed, and prints each one that was acknowledged; or it
fills a small volume.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent_memory_core.blocks.block import BlockHash, RecordKind, record_hash, root_hash
from agent_memory_core.config import Durability
from agent_memory_core.errors import StoreFull
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import BranchCommit, BranchRow
from agent_memory_core.storage.record import HostTensor, Record

BLOCK = 4
IDENTITY = {"model": "made", "namespace": "default"}
ROOT = root_hash(IDENTITY)
OTHER = root_hash({"model": "other"})
PAYLOAD = 3 * 4096 + 24
"""Bytes of one block or tail, in two tensors."""

FILE = 4096 + PAYLOAD
"""Bytes of its file."""

MANY = 1000 * FILE
"""A quota that no test exhausts unless it means to."""


def ids(count: int, start: int = 0) -> tuple[int, ...]:
    """Token ids in a row."""
    return tuple(range(start, start + count))


class RecordStore(BlockStore):
    """A store whose quota counts records alone, so that a test can say how many of them fit."""

    def record_quota(self) -> int:
        return self.quota_bytes


def open_store(path: Path, quota: int = MANY, durability: Durability = "process") -> BlockStore:
    """A store that knows what `ROOT` is, and whose quota is that of its records."""
    store = RecordStore(path, quota_bytes=quota, durability=durability)
    store.identify(ROOT, IDENTITY, "default")
    return store


def content(key: BlockHash, nbytes: int = PAYLOAD) -> bytes:
    """The bytes that the block of that name has, everywhere and always."""
    return random.Random(key).randbytes(nbytes)


def record(
    parent: BlockHash, tokens: Sequence[int], *, kind: RecordKind = "block", nbytes: int = PAYLOAD
) -> Record[HostTensor]:
    """A block or tail of that many payload bytes (a multiple of 8)."""
    key = record_hash(kind, parent, tokens)
    data = memoryview(content(key, nbytes))
    half = nbytes // 2
    tensors = {
        "0.k.codes": HostTensor("U32", (half // 4,), data[:half]),
        "0.v": HostTensor("BF16", (2, half // 4), data[half:]),
    }
    return Record(key, parent, tuple(tokens), kind, tensors)


def records(tokens: Sequence[int], root: BlockHash = ROOT, nbytes: int = PAYLOAD) -> list[Record[HostTensor]]:
    """All blocks of ``tokens``, and their tail where one is left over."""
    made: list[Record[HostTensor]] = []
    parent = root
    for start in range(0, len(tokens), BLOCK):
        part = tokens[start : start + BLOCK]
        made.append(record(parent, part, kind="tail" if len(part) < BLOCK else "block", nbytes=nbytes))
        parent = made[-1].key
    return made


def wanted(
    tokens: Sequence[int],
    session: str = "s",
    branch: BranchRow | None = None,
    *,
    root: BlockHash = ROOT,
    namespace: str = "default",
    **others: Any,
) -> BranchCommit:
    """The commit of a branch of ``tokens`` that goes on from ``branch``."""
    made = records(tokens, root, 8)
    tail = made.pop().key if made and made[-1].kind == "tail" else None
    return BranchCommit(
        root=root,
        namespace=namespace,
        session_id=session,
        branch_id=branch.branch_id if branch else None,
        generation=branch.generation if branch else 0,
        head=made[-1].key if made else root,
        tail=tail,
        tokens=len(tokens),
        prompt_tokens=len(tokens) // 2,
        **{"lane": "", **others},
    )


def turn(
    store: BlockStore,
    tokens: Sequence[int],
    session: str = "s",
    branch: BranchRow | None = None,
    *,
    root: BlockHash = ROOT,
    nbytes: int = PAYLOAD,
    **others: Any,
) -> BranchRow:
    """Commit a branch of ``tokens`` with all that it needs."""
    return store.commit(records(tokens, root, nbytes), wanted(tokens, session, branch, root=root, **others))


def turn_with(
    store: BlockStore,
    tokens: Sequence[int],
    dependencies: Sequence[Record[HostTensor]],
    session: str = "s",
    branch: BranchRow | None = None,
) -> BranchRow:
    """Commit a branch of ``tokens`` that depends on further records."""
    wish = wanted(tokens, session, branch, dependencies=tuple(record.key for record in dependencies))
    return store.commit([*records(tokens), *dependencies], wish)


def windows(tokens: Sequence[int], *indices: int) -> list[Record[HostTensor]]:
    """Window records of these blocks of ``tokens``."""
    chain = records(tokens, nbytes=8)
    return [record(chain[index].key, (), kind="window") for index in indices]


def allocate(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[np.ndarray[Any, Any], memoryview]]:
    """What an engine would allocate, in plain memory."""
    sizes = [{"U32": 4, "BF16": 2, "U8": 1}[dtype] * math.prod(shape) for dtype, shape in tensors]
    arrays = [np.zeros(nbytes, np.uint8) for nbytes in sizes]
    return [(array, array.data) for array in arrays]


def is_right(block: Record[Any]) -> bool:
    """Whether a loaded block has the bytes of its name."""
    return b"".join(block.tensors.values()) == content(block.key, block.nbytes)


def is_whole(store: BlockStore, tokens: Sequence[int], root: BlockHash = ROOT) -> bool:
    """Whether every block of ``tokens``, and their tail, can be loaded and has its own bytes."""
    loaded = [store.load(root, made.key, allocate) for made in records(tokens, root, 8)]
    return all(block is not None and is_right(block) for block in loaded)


def files(store: BlockStore) -> list[Path]:
    """All block files on disk."""
    return sorted(store.path.glob("ns/**/*.safetensors"))


def bytes_on_disk(store: BlockStore) -> int:
    """The size of all block files."""
    return sum(path.stat().st_size for path in files(store))


def names_in(store: BlockStore, folder: str) -> list[str]:
    """The names of the files in one folder of a root, such as ``windows``."""
    return sorted(path.stem for path in store.path.glob(f"ns/{ROOT.hex()}/{folder}/*/*.safetensors"))


def path_of(store: BlockStore, key: BlockHash) -> Path:
    """The one file of that name."""
    return next(path for path in files(store) if path.stem == key.hex())


def _commit_until_killed(path: Path, seed: int, sessions: int, quota: int, nbytes: int) -> None:
    store = open_store(path, quota)
    chance = random.Random(seed)
    while True:
        session = f"s{chance.randrange(sessions)}"
        branches = store.catalog.branches.of_session("default", session, ROOT)
        branch = max(branches, key=lambda b: b.last_use) if branches else None
        known = store.catalog.branches.tokens(branch) if branch else ()
        if len(known) > 20 * BLOCK:
            branch, known = None, known[: 2 * BLOCK]
        tokens = (*known, *(chance.randrange(1000) for _ in range(chance.randint(1, 2 * BLOCK))))
        try:
            done = turn(store, tokens, session, branch, nbytes=nbytes, max_branches=10_000)
        except StoreFull:
            # Another worker may hold the rest of a small budget at this moment.
            continue
        print(json.dumps([session, done.branch_id, done.generation, tokens]), flush=True)


def _fill(path: Path) -> None:
    """Fill a small volume with turns that may be evicted, then with turns that may not.

    A turn is large beside what the log of the catalog grows by: else that would hide what deleting frees.
    """
    store, large = open_store(path, 2**40), 8 * PAYLOAD
    for n in range(150):
        tokens = range(100 * n, 100 * n + 2 * BLOCK)
        turn(store, tokens, f"s{n}", nbytes=large)
        assert is_whole(store, tokens)
    assert store.stats()["evicted"] > 20
    for info in store.catalog.branches.sessions():
        store.catalog.branches.pin("default", info.session_id, True)
    refused = 0
    for n in range(150, 170):
        before = files(store)
        try:
            turn(store, range(100 * n, 100 * n + 8 * BLOCK), f"s{n}", nbytes=large)
            store.catalog.branches.pin("default", f"s{n}", True)
        except StoreFull:
            refused += 1
            assert files(store) == before
            assert list((path / "tmp").iterdir()) == []
    assert refused > 10
    report = store.check()
    assert report.clean, report
    assert report.files
    assert not report.unknown
    assert store.stats()["reserved"] == 0
    store.close()


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        _fill(Path(sys.argv[2]))
    else:
        _commit_until_killed(Path(sys.argv[1]), *map(int, sys.argv[2:]))
