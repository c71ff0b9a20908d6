"""Blocks: the KV of a fixed number of tokens, named by a hash of all tokens up to their end.

Pure data; what ``kv`` holds, only the package ``kv`` knows. The names form a chain:

    root        = sha256("agent-memory root 1" || tagged identity fields)
    block hash  = sha256("agent-memory block 1" || parent hash || token ids as little-endian u32)

so two blocks with one name hold the same tokens after the same tokens, under the same model, codec, block size and
namespace. Besides blocks there are records of other kinds; their names contain the kind:

    tail        the unfinished last block of a branch or of a prompt: fewer tokens than a block, perhaps none, not
                encoded, and with it the whole state of the layers that have one
    window      what window layers keep of one block, which it names as its parent
    token_tail  the tokens of an unfinished block whose KV could not be kept
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

START_TOKENS = 8
"""If fewer tokens than this of a record are shared and there are more, they are computed rather than restored."""

RecordKind = Literal["block", "tail", "window", "token_tail"]
RECORD_KINDS: tuple[RecordKind, ...] = ("block", "tail", "window", "token_tail")


def root_hash(identity: Mapping[str, str]) -> BlockHash:
    """Hash what KV depends on besides tokens. Lengths are hashed too, so no field can pose as another."""
    digest = hashlib.sha256(b"agent-memory root 1")
    for name in sorted(identity):
        for part in (name.encode(), identity[name].encode()):
            digest.update(struct.pack("<I", len(part)))
            digest.update(part)
    return digest.digest()


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32, as they are hashed and stored."""
    packed = array("I", tokens)
    assert packed.itemsize == 4
    return packed.tobytes()


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """The inverse of `pack_tokens`."""
    return tuple(array("I", data))


def record_hash(kind: RecordKind, parent: BlockHash, tokens: Sequence[int] = ()) -> BlockHash:
    """Name the record of ``tokens`` that follows ``parent``; a window names its block as parent and has no tokens."""
    return hashlib.sha256(f"agent-memory {kind} 1".encode() + parent + pack_tokens(tokens)).digest()


def start_name(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Name what records share that follow ``parent`` and have the same first `START_TOKENS` tokens, or are shorter."""
    start = pack_tokens(tokens[:START_TOKENS])
    return hashlib.sha256(b"agent-memory start 1" + parent + start).digest()


def start_names(parent: BlockHash, rest: Sequence[int]) -> list[BlockHash]:
    """The starts of all records after ``parent`` that can be used for a prompt that goes on with ``rest``.

    A shorter record than `START_TOKENS` can be used only if it is a prefix of the rest.
    """
    return [start_name(parent, rest[:count]) for count in range(min(START_TOKENS, len(rest)) + 1)]


def block_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Name the full block of ``tokens`` that follows ``parent``."""
    return record_hash("block", parent, tokens)


def chain(
    root: BlockHash, tokens: Sequence[int], block_tokens: int, known: Sequence[BlockHash] = ()
) -> list[BlockHash]:
    """Names of all full blocks of ``tokens``, in order. ``known`` are the names of the first ones, if known already."""
    hashes = list(known)
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        parent = block_hash(parent, tokens[start : start + block_tokens])
        hashes.append(parent)
    return hashes


def common_prefix(a: Sequence[int] | str, b: Sequence[int] | str) -> int:
    """How many leading items of ``a`` and ``b`` are equal."""
    limit = min(len(a), len(b))
    if tuple(a[:limit]) == tuple(b[:limit]):
        return limit
    return next(i for i in range(limit) if a[i] != b[i])


@dataclass(slots=True)
class Block:
    """One record in memory: the KV of ``tokens``, of all layers or of those that records of its kind are for."""

    hash: BlockHash
    """Its name."""
    parent: BlockHash
    """Name of the block that it follows; of a window record, the block that it belongs to."""
    tokens: tuple[int, ...]
    nbytes: int
    kv: Any = field(repr=False)
    """Arrays by name, exactly as in the safetensors file of the record."""
    kind: RecordKind = "block"
    ref_count: int = 0
    """How many sequences hold it. A held block is never evicted. Only the block pool changes this."""
    start: BlockHash = field(init=False, repr=False)
    """What it shares with records that begin alike, see `start_name`."""

    def __post_init__(self) -> None:
        self.start = start_name(self.parent, self.tokens)
