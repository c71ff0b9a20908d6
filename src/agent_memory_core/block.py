"""Blocks: the KV of a fixed number of tokens, named by a hash of all tokens up to their end.

Pure book-keeping; what ``kv`` holds is known to the codec alone. The chain is

    root        = sha256("agent-memory root 1" || tagged identity fields)
    block hash  = sha256("agent-memory block 1" || parent hash || token ids as little-endian u32)

so two blocks of one hash stand for the same tokens after the same history, under the same model, codec,
block size and namespace. A *tail* is the unfinished last block of a branch: fewer tokens, and a name of
another tag, since its KV is kept unencoded.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BlockHash = bytes
"""A full sha256 digest, 32 bytes, never truncated."""


def root_hash(identity: Mapping[str, str]) -> BlockHash:
    """Hash what KV depends on besides tokens. Fields are tagged and length-prefixed, so none can pose as another."""
    digest = hashlib.sha256(b"agent-memory root 1")
    for name in sorted(identity):
        for part in (name.encode(), identity[name].encode()):
            digest.update(struct.pack("<I", len(part)))
            digest.update(part)
    return digest.digest()


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32, the form that is hashed and stored."""
    packed = array("I", tokens)
    assert packed.itemsize == 4
    return packed.tobytes()


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """The inverse of `pack_tokens`."""
    return tuple(array("I", data))


def block_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Name the block of ``tokens`` that follows ``parent``."""
    return hashlib.sha256(b"agent-memory block 1" + parent + pack_tokens(tokens)).digest()


def tail_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Name the tail of ``tokens`` that follows ``parent``."""
    return hashlib.sha256(b"agent-memory tail 1" + parent + pack_tokens(tokens)).digest()


def chain(
    root: BlockHash, tokens: Sequence[int], block_tokens: int, known: Sequence[BlockHash] = ()
) -> list[BlockHash]:
    """Names of all full blocks of ``tokens``, in order; the first of them may be ``known`` already."""
    hashes = list(known)
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        parent = block_hash(parent, tokens[start : start + block_tokens])
        hashes.append(parent)
    return hashes


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items of ``a`` and ``b`` are equal."""
    limit = min(len(a), len(b))
    if tuple(a[:limit]) == tuple(b[:limit]):
        return limit
    return next(i for i in range(limit) if a[i] != b[i])


@dataclass(slots=True)
class Block:
    """KV of ``tokens`` in all layers at rest, in memory.

    ``kv`` maps tensor names to arrays and is literally one safetensors file; ``ref_count`` counts the
    sequences that hold it (a held block is never evicted). Written by the block pool only.
    """

    hash: BlockHash
    parent: BlockHash
    tokens: tuple[int, ...]
    nbytes: int
    kv: Any = field(repr=False)
    is_tail: bool = False
    ref_count: int = 0
