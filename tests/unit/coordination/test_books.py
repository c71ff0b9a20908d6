"""Views follow from the book, only grow, and hold nothing that their agent may not know."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from agent_memory_core import Message
from agent_memory_core.coordination import books, turns
from agent_memory_core.coordination.books import Book, Draft
from agent_memory_core.coordination.spec import SessionSpec

IDS = ("ann", "bob", "cyd")
Step = tuple[str, str, str | None]
STEPS = st.lists(
    st.tuples(st.sampled_from(IDS), st.sampled_from(["turn", "say", "whisper"]), st.sampled_from(IDS)),
    max_size=25,
)


def spec_of(**fields: object) -> SessionSpec:
    return SessionSpec.of(
        {"agents": [{"agent_id": name} for name in IDS], "initial_prompt": "A game.", **fields}
    )


def play(book: Book, steps: list[Step]) -> list[Book]:
    """The book after each step; every text is another."""
    played = [book]
    for number, (who, what, to) in enumerate(steps):
        book = played[-1]
        draft = Draft(book)
        if what == "turn":
            turns.tell(draft, turns.ask(book, book.spec.agent(who)), f"<turn {number} of {who}>")
        elif what == "say":
            draft.add("public", who, f"<say {number} of {who}>")
        elif to != who and to is not None:
            draft.add("whisper", who, f"<whisper {number} of {who} to {to}>", [to])
        played.append(draft.done())
    return played


@settings(deadline=None)
@given(STEPS)
def test_a_view_begins_with_every_earlier_one(steps: list[Step]) -> None:
    played = play(books.begin(spec_of()), steps)
    for name in IDS:
        for before, after in itertools.pairwise(played):
            earlier, later = books.view(before, name), books.view(after, name)
            assert later.messages()[: len(earlier.messages())] == earlier.messages()
            if later.messages() == earlier.messages():
                assert later.waiting.startswith(earlier.waiting)


@settings(deadline=None)
@given(STEPS)
def test_a_view_alternates_and_a_prompt_extends_the_last_one_with_its_answer(steps: list[Step]) -> None:
    played = play(books.begin(spec_of()), steps)
    for book, (who, what, _), after in zip(played, steps, played[1:], strict=False):
        if what == "turn":
            asked = turns.ask(book, book.spec.agent(who))
            roles = [message.role for message in asked.messages[1:]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
            said = after.spoken[-1].said
            assert books.view(after, who).messages() == (*asked.messages, Message("assistant", said))


@settings(deadline=None)
@given(STEPS)
def test_a_whisper_is_in_exactly_two_views_and_all_else_in_every_one(steps: list[Step]) -> None:
    book = play(books.begin(spec_of()), steps)[-1]
    texts = {name: "\n".join(m.content for m in books.view(book, name).prompt("")) for name in IDS}
    for event in book.events:
        knowing = {name for name in IDS if event.content in texts[name]}
        assert knowing == (set(event.visible_to) or set(IDS))
        assert all(text.count(event.content) <= 1 for text in texts.values())
    assert [event for event in books.known_events(book) if event.visible_to] == []


@settings(deadline=None)
@given(STEPS, STEPS)
def test_the_view_of_a_permanent_agent_goes_on_over_sessions(steps: list[Step], later: list[Step]) -> None:
    first = play(books.begin(spec_of()), steps)[-1]
    minds = {name: books.mind_after(first, name) for name in IDS}
    second = books.begin(spec_of(initial_prompt="The yard."), minds)
    for book in play(second, later):
        for name in IDS:
            before = books.view(first, name).messages()
            assert books.view(book, name).messages()[: len(before)] == before
    assert "The yard." in books.view(second, "ann").waiting


@settings(deadline=None)
@given(STEPS)
def test_a_shortened_view_is_one_message_and_goes_on_growing(steps: list[Step]) -> None:
    book = play(books.begin(spec_of()), steps)[-1]
    ann = book.spec.agent("ann")
    asked = turns.ask(book, ann, compact=True)
    assert [message.role for message in asked.messages] == ["system", "user"]
    draft = Draft(book)
    turns.tell(draft, asked, "Short.")
    after = draft.done()
    assert books.view(after, "ann").messages() == (*asked.messages, Message("assistant", "Short."))
    more = turns.ask(play(after, [("bob", "say", None)])[-1], ann)
    assert more.messages[:3] == books.view(after, "ann").messages()


def test_agents_share_the_beginning_of_their_system_message() -> None:
    book = books.begin(spec_of())
    systems = [books.view(book, name).system for name in IDS]
    shared = books.shared_text(book.spec)
    assert all(system.startswith(shared) for system in systems)
    assert [system.removeprefix(shared) for system in systems] == [f"\n\nYou are {name}." for name in IDS]


def test_a_shared_view_holds_all_that_was_said_in_one_message() -> None:
    book = books.begin(spec_of(view="shared"))
    last = play(book, [("ann", "turn", None), ("bob", "say", None), ("cyd", "turn", None)])[-1]
    prompts = [turns.ask(last, agent).messages for agent in last.spec.agents]
    assert {len(messages) for messages in prompts} == {2}
    assert len({messages[1].content.rpartition("\n\n")[0] for messages in prompts}) == 1
    assert all(event.content in prompts[0][1].content for event in last.events)


def test_a_prior_conversation_is_remembered_as_the_agents_own() -> None:
    prior = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada."},
        {"role": "user", "content": "One more thing."},
    ]
    seen = books.view(books.begin(spec_of(prior_agent_messages={"ann": prior})), "ann")
    assert [message.content for message in seen.messages()[1:]] == ["My name is Ada.", "Hello Ada."]
    assert seen.waiting == "One more thing."


def test_silence_is_an_event_and_the_view_keeps_what_the_model_wrote() -> None:
    book = books.begin(spec_of())
    draft = Draft(book)
    event = turns.tell(draft, turns.ask(book, book.spec.agent("ann")), "")
    assert event.content == turns.SILENCE
    assert books.view(draft.done(), "ann").messages()[-1] == Message("assistant", "")


def test_words_that_are_entered_for_an_agent_are_marked_as_its_own() -> None:
    book = play(books.begin(spec_of()), [("ann", "say", None), ("ann", "whisper", "bob")])[-1]
    assert books.view(book, "ann").waiting.startswith("[you said] <say 0 of ann>\n\n[you whispered to bob]")
    assert books.view(book, "bob").waiting.startswith("ann: <say 0 of ann>\n\n[whisper from ann]")


@pytest.mark.parametrize("lost", ["events", "spoken"])
def test_a_book_is_never_changed(lost: str) -> None:
    book = books.begin(spec_of())
    play(book, [("ann", "turn", None)])
    assert getattr(book, lost) == ()
    assert replace(book) == book
