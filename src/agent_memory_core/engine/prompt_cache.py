"""What is stored of a session, put together as one cache and written as a prompt cache of mlx-lm.

The engine's thread finds out what is needed and builds the cache; what is not in memory is read on the caller's thread
in between, so that turns go on meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent_memory_core.blocks.block import Block, BlockHash
from agent_memory_core.blocks.match import Match
from agent_memory_core.blocks.prefix_cache import PrefixCache
from agent_memory_core.engine.block_io import HostBytes
from agent_memory_core.engine.engine import Engine
from agent_memory_core.errors import StoreError
from agent_memory_core.kv.prompt_cache import write_prompt_cache
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.record import Record


@dataclass(slots=True)
class PromptCache:
    """A branch on its way into a file."""

    root: BlockHash
    token_ids: tuple[int, ...]
    match: Match
    read: dict[BlockHash, Record[HostBytes]]
    """What was not in memory, by name."""


def find(engine: Engine, owner: tuple[str, str]) -> PromptCache:
    """What it takes to restore the branch of a session that was used last. Runs on the engine's thread.

    Raises:
        SessionNotFound: this model has read nothing of the session.
    """
    branch = engine.branch(owner, None)
    root = engine.intake.root(owner[0])
    prefixes = PrefixCache(engine.pool, engine.blocks.resume)
    tails = [branch.tail] if branch.tail is not None else []
    # A match leaves one token to evaluate: here one that is not there.
    match = prefixes.match(root, (*branch.token_ids, 0), branch.hashes, engine.disk.tier, tails=tails)
    return PromptCache(root, branch.token_ids[: match.tokens], match, {})


def read(store: BlockStore, wanted: PromptCache) -> None:
    """Read what is not in memory. Runs on any thread.

    Raises:
        StoreError: a part of it is gone.
    """
    for hit in wanted.match.missing:
        record = store.load(wanted.root, hit.key, HostBytes.allocate)
        if record is None:
            raise StoreError(
                "a part of the session is damaged or gone: run a turn of it, which computes it again."
            )
        wanted.read[hit.key] = record


def write(engine: Engine, wanted: PromptCache, path: Path, metadata: Mapping[str, str]) -> int:
    """Build the cache and write it; return its tokens. Runs on the engine's thread.

    Raises:
        StoreError: nothing of the session can be restored, or the file cannot be written.
    """
    if not wanted.token_ids:
        raise StoreError("nothing of the session can be restored: run a turn of it, which computes it again.")
    for hit in wanted.match.missing:
        record = wanted.read[hit.key]
        arrays = {name: host.array() for name, host in record.tensors.items()}
        hit.block = Block(record.key, record.parent, record.tokens, record.nbytes, arrays, record.kind)
    cache = engine.blocks.restore(wanted.match, room=0)
    told = {"model": engine.loaded.name, "tokenizer_config": "{}", "token_ids": json.dumps(wanted.token_ids)}
    try:
        write_prompt_cache(path, cache, {**told, **metadata})
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}.") from error
    return len(wanted.token_ids)
