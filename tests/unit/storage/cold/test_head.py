"""Heads say the same after a way through bytes, and what two machines do to one comes together without a loss."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st
from support.stored_turns import IDENTITY, ROOT, ids, records

from agent_memory_core.storage.cold.head import (
    MOST_BRANCHES,
    Head,
    HeadBranch,
    HeadRecord,
    NoHead,
    Offer,
    Position,
    forgotten,
    from_bytes,
    merged,
    to_bytes,
)

EMPTY = Head(namespace="default", session_id="s")
IDENTITIES = {ROOT: IDENTITY}


def branch(count: int, lane: str = "", last_use: float = 1.0, generation: int = 1) -> HeadBranch:
    """A local branch of so many tokens."""
    made = records(ids(count), nbytes=8)
    tail = made[-1].key if made[-1].kind == "tail" else None
    head = made[-2] if tail and len(made) > 1 else made[-1]
    return HeadBranch(
        name="",
        generation=generation,
        root=ROOT,
        head=head.key if head.kind == "block" else ROOT,
        tail=tail,
        tokens=count,
        prompt_tokens=count // 2,
        lane=lane,
        last_use=last_use,
        records=tuple(HeadRecord(record.key, f"{n:032x}", 100 + n) for n, record in enumerate(made)),
    )


def offered(head: Head, *offers: Offer) -> tuple[Head, dict[int, Position]]:
    return merged(head, offers, IDENTITIES, is_thread=True)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 40), st.text(max_size=3)), max_size=5), st.text(min_size=1))
def test_bytes_say_the_same(branches: list[tuple[int, str]], session_id: str) -> None:
    offers = [Offer(n, None, branch(count, lane)) for n, (count, lane) in enumerate(branches)]
    head, _ = offered(replace(EMPTY, session_id=session_id), *offers)
    assert from_bytes(to_bytes(head)) == head


def test_what_one_machine_extends_stays_one_branch() -> None:
    head, placed = offered(EMPTY, Offer(7, None, branch(5, generation=3)))
    assert placed[7].generation == 3
    head, placed = offered(head, Offer(7, placed[7], branch(9, generation=4)))
    assert [found.tokens for found in head.branches] == [9]
    assert (head.generation, head.branches[0].generation) == (2, 2)


def test_what_another_machine_moved_is_left_alone() -> None:
    head, placed = offered(EMPTY, Offer(1, None, branch(5)))
    head, _ = offered(head, Offer(1, placed[1], branch(9)))
    head, late = offered(head, Offer(4, placed[1], branch(12)))
    assert sorted(found.tokens for found in head.branches) == [9, 12]
    assert late[4].name != placed[1].name


def test_the_same_turn_on_two_machines_is_one_branch() -> None:
    head, one = offered(EMPTY, Offer(1, None, branch(5)))
    head, other = offered(head, Offer(2, None, branch(5)))
    assert len(head.branches) == 1
    assert one[1].name == other[2].name


def test_lanes_are_apart() -> None:
    head, _ = offered(EMPTY, Offer(1, None, branch(5, "a")), Offer(2, None, branch(5, "b")))
    assert len(head.branches) == 2


def test_the_least_recently_used_branches_make_way() -> None:
    offers = [Offer(n, None, branch(5, f"{n}", last_use=float(n))) for n in range(MOST_BRANCHES + 3)]
    head, _ = offered(EMPTY, *offers)
    assert {found.last_use for found in head.branches} == {float(n) for n in range(3, MOST_BRANCHES + 3)}


def test_a_forgotten_session_keeps_nothing_but_when() -> None:
    head, _ = offered(EMPTY, Offer(1, None, branch(5)))
    gone = forgotten(head, 9.0)
    assert (gone.branches, gone.records, gone.identities) == ((), {}, {})
    assert (gone.forgotten, gone.generation) == (9.0, head.generation + 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"version": 2}',
        to_bytes(EMPTY)[:-1],
        json.dumps(json.loads(to_bytes(EMPTY)) | {"branches": [{}]}).encode(),
        json.dumps(json.loads(to_bytes(EMPTY)) | {"records": [["ab", "cd", 1]]}).encode(),
    ],
)
def test_anything_else_is_no_head(data: bytes) -> None:
    with pytest.raises(NoHead):
        from_bytes(data)
