"""Blocks: the KV of a fixed number of tokens, named by a hash of all tokens up to their end.

Pure book-keeping; what ``kv`` holds is known to the codec alone. The chain is

    root        = sha256("agent-memory root 1" || tagged identity fields)
    block hash  = sha256("agent-memory block 1" || parent hash || token ids as little-endian u32)

so two blocks of one hash stand for the same tokens after the same history, under the same model, codec,
block size and namespace. Beside blocks there are records of other kinds, each with its kind for a tag:

    tail     the unfinished last block of a branch, or of a prompt: fewer tokens, perhaps none, kept unencoded,
             with the whole state of the layers that have one
    window   what the window layers keep of the block that it names as its parent
    token_tail  the tokens of an unfinished block whose KV was not kept
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

BlockHash = bytes
"""A full sha256 digest, 32 bytes, never truncated."""

RecordKind = Literal["block", "tail", "window", "token_tail"]
RECORD_KINDS: tuple[RecordKind, ...] = ("block", "tail", "window", "token_tail")


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


def record_hash(kind: RecordKind, parent: BlockHash, tokens: Sequence[int] = ()) -> BlockHash:
    """Name the record of ``tokens`` that follows ``parent``; a window names its block as parent and has no tokens."""
    return hashlib.sha256(f"agent-memory {kind} 1".encode() + parent + pack_tokens(tokens)).digest()


def block_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Name the full block of ``tokens`` that follows ``parent``."""
    return record_hash("block", parent, tokens)


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
    """KV of ``tokens`` at rest, in memory: of all layers, or of those that its kind is about.

    ``kv`` maps tensor names to arrays and is literally one safetensors file; ``ref_count`` counts the
    sequences that hold it (a held block is never evicted). Written by the block pool only.
    """

    hash: BlockHash
    parent: BlockHash
    tokens: tuple[int, ...]
    nbytes: int
    kv: Any = field(repr=False)
    kind: RecordKind = "block"
    ref_count: int = 0
