"""A stream holds all that a session reaches, once, and gives it to another store whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.stored_turns import (
    BLOCK,
    IDENTITY,
    files,
    ids,
    is_whole,
    open_store,
    path_of,
    records,
    turn,
    turn_with,
    windows,
)

from agent_memory_core.blocks.block import root_hash
from agent_memory_core.errors import InvalidRequest, SessionNotFound
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.portable import export_session, import_session

TOKENS = ids(3 * BLOCK + 2)


@pytest.fixture
def here(tmp_path: Path) -> BlockStore:
    return open_store(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> BlockStore:
    return open_store(tmp_path / "there")


def exported(store: BlockStore) -> bytes:
    stream = io.BytesIO()
    export_session(store, "default", "s", stream)
    return stream.getvalue()


def lanes(store: BlockStore, namespace: str = "default") -> list[tuple[Sequence[int], int, str]]:
    found = store.catalog.branches.of_session(namespace, "s")
    return [(store.catalog.branches.tokens(row), row.prompt_tokens, row.lane) for row in found]


def test_what_is_carried_is_what_was_there(here: BlockStore, there: BlockStore) -> None:
    turn_with(here, TOKENS, windows(TOKENS, 1, 2))
    turn(here, (*ids(BLOCK), *ids(BLOCK, 500)), lane="left")
    carried = exported(here)
    assert import_session(there, "default", "s", io.BytesIO(carried)) == len(TOKENS)
    assert lanes(there) == lanes(here)
    assert [path.name for path in files(there)] == [path.name for path in files(here)]
    assert is_whole(there, TOKENS)
    dependencies = [store.catalog.branches.dependencies(1) for store in (here, there)]
    assert len(dependencies[0]) == 2
    assert dependencies[0] == dependencies[1]
    # Four blocks, of which both branches begin with one, a tail and two windows.
    assert carried.count(b'{"record"') == 7


def test_another_namespace_has_names_of_its_own(here: BlockStore, there: BlockStore) -> None:
    turn(here, TOKENS)
    import_session(there, "other", "s", io.BytesIO(exported(here)))
    assert lanes(there, "other") == lanes(here)
    assert is_whole(there, TOKENS) is False
    root = root_hash({**IDENTITY, "namespace": "other"})
    assert {row.root for row in there.catalog.branches.of_session("other", "s")} == {root}
    assert {path.stem for path in files(there)} == {made.key.hex() for made in records(TOKENS, root, 8)}


def test_a_branch_that_is_not_whole_stays_behind_and_others_do_not(
    here: BlockStore, there: BlockStore
) -> None:
    turn(here, TOKENS)
    turn(here, (*ids(BLOCK), *ids(BLOCK, 500)))
    path_of(here, records(TOKENS)[2].key).unlink()
    import_session(there, "default", "s", io.BytesIO(exported(here)))
    assert [tokens for tokens, _, _ in lanes(there)] == [(*ids(BLOCK), *ids(BLOCK, 500))]


def test_a_stream_that_is_cut_or_changed_adds_no_branch(here: BlockStore, there: BlockStore) -> None:
    turn(here, TOKENS)
    carried = exported(here)
    lines = [place for place, byte in enumerate(carried) if byte == ord("\n")]
    for end in (0, 5, *lines[:3], *lines[-3:], len(carried) - 1):
        with pytest.raises(InvalidRequest, match="damaged"):
            import_session(there, "default", "s", io.BytesIO(carried[:end]))
    for place in range(0, len(carried), 997):
        changed = bytearray(carried)
        changed[place] ^= 0x80
        with pytest.raises(InvalidRequest, match="damaged"):
            import_session(there, "default", "s", io.BytesIO(changed))
    assert lanes(there) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "song"),
        ("tensors", [["a", "U9", [1]]]),
        ("tensors", [["a", "U8", [2**60]]]),
        ("tokens", [-1]),
    ],
)
def test_a_record_that_cannot_be_is_refused(
    here: BlockStore, there: BlockStore, name: str, value: object
) -> None:
    turn(here, TOKENS)
    first, begin, record, rest = exported(here).split(b"\n", 3)
    said = json.loads(record)
    said["record"][name] = value
    changed = b"\n".join([first, begin, json.dumps(said).encode(), rest])
    with pytest.raises(InvalidRequest, match="damaged"):
        import_session(there, "default", "s", io.BytesIO(changed))


def test_a_session_that_is_not_there_is_named(here: BlockStore) -> None:
    with pytest.raises(SessionNotFound, match="'s'"):
        exported(here)
