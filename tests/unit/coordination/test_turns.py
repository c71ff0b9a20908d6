"""Whose turn it is, in every topology and format."""

from __future__ import annotations

import pytest

from agent_memory_core import InvalidRequest
from agent_memory_core.coordination import books, formats, turns
from agent_memory_core.coordination.books import Book, Draft
from agent_memory_core.coordination.errors import InvalidTurn
from agent_memory_core.coordination.spec import AgentRole, SessionSpec


def book_of(*roles: str, **fields: object) -> Book:
    agents = [{"agent_id": f"a{i}", "role": role} for i, role in enumerate(roles)]
    return books.begin(SessionSpec.of({"agents": agents, **fields}))


def spoke(book: Book, who: str) -> Book:
    draft = Draft(book)
    turns.tell(draft, turns.ask(book, book.spec.agent(who)), "Yes.")
    return draft.done()


def speakers(book: Book, count: int) -> list[str]:
    found = []
    for _ in range(count):
        found.append(turns.next_speaker(book))
        book = spoke(book, found[-1])
    return found


@pytest.mark.parametrize(
    ("fields", "roles", "expected"),
    [
        ({}, ("p", "p", "p"), "0 1 2 0"),
        ({"topology": "round_robin"}, ("p", "moderator", "p"), "1 0 2 1"),
        ({"debate_format": "devils_advocate"}, ("critic", "p", "p"), "1 2 0 1"),
        ({"debate_format": "socratic"}, ("p", "p", "p"), "0 1 0 2 0"),
        ({"debate_format": "parliamentary"}, ("critic", "moderator", "advocate", "critic"), "1 2 0 3 1 1"),
        ({"debate_format": "socratic"}, ("p",), "0 0"),
    ],
)
def test_the_order_of_a_format(fields: dict[str, str], roles: tuple[str, ...], expected: str) -> None:
    book = book_of(*roles, **fields)
    assert speakers(book, len(expected.split())) == [f"a{i}" for i in expected.split()]


def test_a_speaker_may_be_named_and_even_twice_and_the_order_goes_on_after_it() -> None:
    book = spoke(spoke(book_of("p", "p", "p"), "a1"), "a1")
    assert turns.next_speaker(book) == "a2"


def test_people_are_not_in_the_order() -> None:
    spec = SessionSpec.of({"agents": [{"agent_id": "me", "is_human": True}, {"agent_id": "bot"}]})
    book = books.begin(spec)
    assert formats.order(spec) == ("bot",)
    with pytest.raises(InvalidTurn, match="is a person"):
        turns.chosen(book, "me", None)


def test_the_rounds_of_a_structured_debate_are_announced_once() -> None:
    book = book_of("p", "p", debate_format="structured")
    for _ in range(8):
        book = turns.announced(book)
        assert turns.announced(book) is book
        book = spoke(book, turns.next_speaker(book))
    said = [event.content for event in book.events]
    assert [said.index(stage) for stage in formats.STAGES] == [0, 3, 6]
    assert sum(event.sender_id == "system" for event in book.events) == 3


def test_a_session_ends_after_its_turns_or_its_decision() -> None:
    book = book_of("p", max_turns=1)
    assert not turns.is_over(book)
    assert turns.is_over(spoke(book, "a0"))
    draft = Draft(book)
    draft.add("decision", "system", "Tea.")
    assert turns.is_over(draft.done())


@pytest.mark.parametrize(
    ("fields", "speaker", "to", "says"),
    [
        ({"topology": "round_robin"}, "a1", None, "it is the turn of 'a0'"),
        ({"topology": "whisper"}, None, None, "needs to="),
        ({"topology": "whisper"}, None, "a0", "cannot whisper to itself"),
        ({}, None, "a1", "is for the topology whisper"),
    ],
)
def test_a_turn_that_cannot_be_is_refused(
    fields: dict[str, str], speaker: str | None, to: str | None, says: str
) -> None:
    with pytest.raises(InvalidTurn, match=says):
        turns.chosen(book_of("p", "p", **fields), speaker, to)


def test_a_round_is_what_is_left_of_it_and_whispers_go_round() -> None:
    assert turns.round_of(spoke(book_of("p", "p", "p"), "a0")) == [("a1", None), ("a2", None)]
    whispering = book_of("p", "p", topology="whisper")
    assert turns.round_of(whispering) == [("a0", "a1"), ("a1", "a0")]
    assert turns.round_of(whispering, [("a1", "a0")]) == [("a1", "a0")]


TWO = [{"agent_id": "a"}, {"agent_id": "b"}]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"agents": []}, "agents: "),
        ({"agents": [{"agent_id": "a"}] * 2}, "must differ"),
        ({"agents": [{"agent_id": "a", "display_name": "A: B"}]}, "agents.0"),
        ({"agents": TWO, "tpology": "whisper"}, "tpology"),
        ({"agents": TWO, "coordinator": "c"}, "'c' takes no part"),
        ({"agents": TWO, "decision_mode": "coordinator_decides"}, "needs a coordinator"),
        ({"agents": [{"agent_id": "a", "lifecycle": "permanent"}]}, "persistent_cache_prefix"),
        ({"agents": TWO, "view": "shared", "topology": "whisper"}, "no room for whispers"),
        ({"agents": [{"agent_id": "a", "is_human": True}]}, "at least one must be a model"),
        ({"agents": [{"agent_id": "a"}], "topology": "whisper"}, "needs two agents"),
    ],
)
def test_a_specification_that_cannot_be_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        SessionSpec.of(fields)


def test_an_agent_is_found_by_its_id_and_its_name() -> None:
    spec = SessionSpec.of({"agents": [AgentRole(agent_id="a", display_name="Ann")]})
    assert spec.agent("Ann") is spec.agent("a")
    with pytest.raises(InvalidRequest, match="takes no part"):
        spec.agent("b")
