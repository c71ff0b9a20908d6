"""The head of a session in the cold tier: which branches it has, and which objects each of them is made of.

Pure data. A head has a generation, which grows by one with every change, and so has each of its branches. Whoever
changes a head says which generations it has seen; what moved meanwhile is left alone, and the change becomes a branch
of its own. So two machines that use one session at a time lose nothing, as two processes do with one store.

In the bucket a head is JSON, sealed where the store is encrypted. Names are in hex:

    {"version": 1, "namespace": ..., "session": ..., "generation": n, "last_use": t, "is_thread": b, "forgotten": t,
     "identities": [identity, ...],
     "records": [[key, checksum, bytes], ...],
     "branches": [{"name": ..., "generation": n, "root": ..., "head": ..., "tail": ... or null, "tokens": n,
       "prompt_tokens": n, "lane": ..., "last_use": t, "records": [index, ...], "dependencies": [key, ...]}, ...]}
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agent_memory_core.blocks.block import BlockHash, root_hash

VERSION = 1
MOST_BRANCHES = 64
"""Most branches of a head; beyond them the least recently used one is dropped."""


class NoHead(ValueError):
    """Bytes are no head, or one of a newer version."""


@dataclass(frozen=True, slots=True)
class HeadRecord:
    """One record, and its object."""

    key: BlockHash
    checksum: str
    """xxh3-128 of its tensors, in hex; together with the key it names the object"""
    nbytes: int
    """of the object"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadBranch:
    """One branch. See `BranchRow` for what its fields mean."""

    name: str
    """what every machine calls it"""
    generation: int
    root: BlockHash
    head: BlockHash
    tail: BlockHash | None
    tokens: int
    prompt_tokens: int
    lane: str
    last_use: float
    records: tuple[HeadRecord, ...]
    """all that it reaches, each after the one that it follows"""
    dependencies: tuple[BlockHash, ...] = ()

    @property
    def end(self) -> tuple[BlockHash, BlockHash, BlockHash | None, int, str]:
        """What two branches have in common that are the same."""
        return self.root, self.head, self.tail, self.tokens, self.lane


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A session."""

    namespace: str
    session_id: str
    generation: int = 0
    last_use: float = 0.0
    """seconds since the epoch"""
    is_thread: bool = False
    forgotten: float = 0.0
    """when it was forgotten: branches that were used before are not to come back; 0 if it never was"""
    identities: Mapping[BlockHash, Mapping[str, str]] = field(default_factory=dict)
    """what each root was hashed from"""
    branches: tuple[HeadBranch, ...] = ()

    @property
    def records(self) -> dict[BlockHash, HeadRecord]:
        """All records of all branches."""
        return {record.key: record for branch in self.branches for record in branch.records}


@dataclass(frozen=True, slots=True)
class Position:
    """Where a local branch stood when it was last the same as one of the head."""

    generation: int
    """of the local branch"""
    name: str
    """of the head's branch"""
    seen: int
    """generation of the head's branch"""


@dataclass(frozen=True, slots=True)
class Offer:
    """A local branch that changed since it was last the same as one of the head."""

    branch_id: int
    position: Position | None
    branch: HeadBranch
    """what it is now; name and generation count for nothing"""


def merged(
    head: Head, offers: Sequence[Offer], identities: Mapping[BlockHash, Mapping[str, str]], is_thread: bool
) -> tuple[Head, dict[int, Position]]:
    """The head with what a machine offers, and where the machine's branches stand in it then, by their local ids.

    Args:
        head: what is there.
        offers: the machine's changed branches, with the generations of the local ones in their ``branch``.
        identities: of their roots.
        is_thread: whether the session id is that of a framework's thread.
    """
    branches = {branch.name: branch for branch in head.branches}
    placed: dict[int, Position] = {}
    for offer in offers:
        new = _placed(branches, offer)
        branches[new.name] = new
        placed[offer.branch_id] = Position(offer.branch.generation, new.name, new.generation)
    kept = sorted(branches.values(), key=lambda branch: branch.last_use)[-MOST_BRANCHES:]
    roots = {branch.root for branch in kept}
    known = {**head.identities, **identities}
    return replace(
        head,
        generation=head.generation + 1,
        last_use=max([head.last_use, *(offer.branch.last_use for offer in offers)]),
        is_thread=is_thread and (head.is_thread or not head.branches),
        identities={root: identity for root, identity in known.items() if root in roots},
        branches=tuple(kept),
    ), placed


def _placed(branches: Mapping[str, HeadBranch], offer: Offer) -> HeadBranch:
    """The branch of the head that an offer moves or is already; else a new one."""
    for branch in branches.values():
        if branch.end == offer.branch.end:
            return replace(branch, last_use=max(branch.last_use, offer.branch.last_use))
    before = branches.get(offer.position.name) if offer.position else None
    if before is not None and offer.position and before.generation == offer.position.seen:
        return replace(offer.branch, name=before.name, generation=before.generation + 1)
    return replace(offer.branch, name=uuid.uuid4().hex, generation=1)


def forgotten(head: Head, when: float) -> Head:
    """What is left of a session that was forgotten, so that no other machine brings it back."""
    return Head(
        namespace=head.namespace,
        session_id=head.session_id,
        generation=head.generation + 1,
        last_use=when,
        forgotten=max(when, head.forgotten),
    )


def to_bytes(head: Head) -> bytes:
    """A head as it lies in the bucket."""
    records = list(head.records.values())
    at = {record.key: index for index, record in enumerate(records)}
    said = {
        "version": VERSION,
        "namespace": head.namespace,
        "session": head.session_id,
        "generation": head.generation,
        "last_use": head.last_use,
        "is_thread": head.is_thread,
        "forgotten": head.forgotten,
        "identities": [dict(identity) for identity in head.identities.values()],
        "records": [[record.key.hex(), record.checksum, record.nbytes] for record in records],
        "branches": [_said(branch, at) for branch in head.branches],
    }
    return json.dumps(said, separators=(",", ":")).encode()


def _said(branch: HeadBranch, at: Mapping[BlockHash, int]) -> dict[str, Any]:
    return {
        "name": branch.name,
        "generation": branch.generation,
        "root": branch.root.hex(),
        "head": branch.head.hex(),
        "tail": branch.tail.hex() if branch.tail is not None else None,
        "tokens": branch.tokens,
        "prompt_tokens": branch.prompt_tokens,
        "lane": branch.lane,
        "last_use": branch.last_use,
        "records": [at[record.key] for record in branch.records],
        "dependencies": [key.hex() for key in branch.dependencies],
    }


def from_bytes(data: bytes | memoryview) -> Head:
    """The inverse of `to_bytes`.

    Raises:
        NoHead: it is none.
    """
    try:
        said = json.loads(bytes(data))
        if said["version"] != VERSION:
            raise NoHead(f"it has version {said['version']!r}, and this program knows {VERSION}")
        records = [
            HeadRecord(_name(key), bytes.fromhex(checksum).hex(), int(nbytes))
            for key, checksum, nbytes in said["records"]
        ]
        identities = [{str(k): str(v) for k, v in identity.items()} for identity in said["identities"]]
        return Head(
            namespace=str(said["namespace"]),
            session_id=str(said["session"]),
            generation=int(said["generation"]),
            last_use=float(said["last_use"]),
            is_thread=bool(said["is_thread"]),
            forgotten=float(said["forgotten"]),
            identities={_root_of(identity): identity for identity in identities},
            branches=tuple(_branch(branch, records) for branch in said["branches"]),
        )
    except NoHead:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise NoHead(f"it cannot be read: {error}") from error


def _root_of(identity: Mapping[str, str]) -> BlockHash:
    return root_hash({name: value for name, value in identity.items() if name != "name"})


def _branch(said: Mapping[str, Any], records: Sequence[HeadRecord]) -> HeadBranch:
    return HeadBranch(
        name=str(said["name"]),
        generation=int(said["generation"]),
        root=_name(said["root"]),
        head=_name(said["head"]),
        tail=_name(said["tail"]) if said["tail"] is not None else None,
        tokens=int(said["tokens"]),
        prompt_tokens=int(said["prompt_tokens"]),
        lane=str(said["lane"]),
        last_use=float(said["last_use"]),
        records=tuple(records[int(index)] for index in said["records"]),
        dependencies=tuple(_name(key) for key in said["dependencies"]),
    )


def _name(text: str) -> BlockHash:
    name = bytes.fromhex(text)
    if len(name) != 32:
        raise ValueError(f"{text[:80]!r} is no name of a record")
    return name
