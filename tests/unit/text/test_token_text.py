"""Prompts are exact: the ids of a branch never change, and what is new decodes to what was rendered."""

from __future__ import annotations

import copy
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings, strategies as st
from support import made_tokenizers as made
from support.made_conversations import (
    MARKED,
    Make,
    chat,
    decode,
    makes_all,
    makes_exact,
    play,
    spoken,
    template_of,
    turns,
)

from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.token_text import TokenText

# What the ids say


@given(makes_exact, turns)
@settings(max_examples=80, deadline=None)
def test_the_ids_decode_to_the_rendered_text(make: Make, conversation: list[tuple[str, str, int]]) -> None:
    for prompt, _ in play(make, conversation):
        assert decode(make, prompt.token_ids) == prompt.text


@given(st.sampled_from(MARKED), turns)
@settings(max_examples=80, deadline=None)
def test_no_id_of_a_branch_ever_changes(make: Make, conversation: list[tuple[str, str, int]]) -> None:
    for prompt, branch in play(make, conversation):
        assert prompt.token_ids[: len(branch.token_ids)] == branch.token_ids
        assert prompt.reused == len(branch.token_ids)


@given(makes_all, turns)
@settings(max_examples=80, deadline=None)
def test_what_is_counted_as_reused_is_the_branch(
    make: Make, conversation: list[tuple[str, str, int]]
) -> None:
    for prompt, branch in play(make, conversation):
        assert prompt.token_ids[: prompt.reused] == branch.token_ids[: prompt.reused]
        assert (prompt.source is None) == (prompt.reused == 0)


@given(makes_all, st.lists(spoken, min_size=1, max_size=3))
@settings(max_examples=80, deadline=None)
def test_a_prompt_without_a_branch_is_what_the_tokenizer_itself_makes(
    make: Make, contents: list[str]
) -> None:
    template, request = template_of(make), chat(*contents)
    own = make().encode(template.render(request), add_special_tokens=False)
    assert template.encode(request).token_ids == tuple(own)


@given(makes_all, turns)
@settings(max_examples=80, deadline=None)
def test_canonical_answers_give_the_canonical_prompt(
    make: Make, conversation: list[tuple[str, str, int]]
) -> None:
    """Continuing and starting anew agree to the last token where the model spelled as the tokenizer does."""
    template, contents = template_of(make), [text for turn in conversation for text in turn[:2]]
    known: list[TokenText] = []
    for end in range(1, len(contents) + 1, 2):
        prompt = template.encode(chat(*contents[:end]), known)
        assert prompt.token_ids == template.encode(chat(*contents[:end])).token_ids
        known.append(template.tokenizer.text_of(prompt.token_ids))


@pytest.mark.parametrize("make", [made.llama3, made.untemplated])
def test_six_turns_hold_one_bos_and_lose_no_token(make: Make) -> None:
    """Tokenising each turn's new text by itself inserts a BOS at every turn, and cuts a real token for it."""
    tokenizer = make()
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("Hello")[0] == bos, "this tokenizer adds a BOS to all it is given"
    played = play(make, [(f"Question {n}?", f"Answer {n}.", n) for n in range(6)])
    for prompt, _ in played:
        assert prompt.token_ids.count(bos) == 1
        assert prompt.token_ids[0] == bos
        assert decode(make, prompt.token_ids) == prompt.text
    texts = [prompt.text for prompt, _ in played]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@pytest.mark.parametrize("make", [made.tiny_chat, made.llama3, made.metaspace])
def test_only_new_text_is_tokenised(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(make())
    contents = ["Tell me more.", "There is a lot to tell about that. " * 20] * 40
    branch = template.tokenizer.text_of(template.encode(chat(*contents, "And now?")).token_ids)
    tokenised, tokenize = list[str](), template.tokenizer.tokenize

    def watched(text: str) -> list[int]:
        tokenised.append(text)
        return tokenize(text)

    monkeypatch.setattr(template.tokenizer, "tokenize", watched)
    prompt = template.encode(chat(*contents, "And now?", "Nothing.", "Really?"), [branch])
    assert prompt.reused == len(branch.token_ids)
    assert sum(map(len, tokenised)) < 300 < len(prompt.text) / 10


# Seams


def test_a_merge_does_not_cross_a_special_token() -> None:
    template = template_of(made.tiny_chat)
    for prompt, branch in play(
        made.tiny_chat, [("hi", "x <y", 1), ("< |im_end|", "<|im_", 2), ("ok", "y", 3)]
    ):
        fresh = template.tokenizer.text_of(template.tokenizer.tokenize(prompt.text))
        assert [p.text for p in template.tokenizer.text_of(prompt.token_ids).pieces] == [
            p.text for p in fresh.pieces
        ]
        assert branch.text == prompt.text[: len(branch.text)]


def test_metaspace_puts_no_space_at_the_seam() -> None:
    tokenizer, template = made.metaspace(), template_of(made.metaspace)
    assert decode(made.metaspace, tuple(tokenizer.encode("Hello")[:1])) != tokenizer.convert_ids_to_tokens(
        tokenizer.encode("Hello")[:1]
    ), "this tokenizer begins a text with a space that it drops again"
    branch = template.tokenizer.text_of(template.encode(chat("Hello there")).token_ids)
    other = template.encode(chat("Hello Paris"), [branch])
    assert other.reused == 1, "the turn's own marker"
    assert other.token_ids == template.encode(chat("Hello Paris")).token_ids


@pytest.mark.parametrize("make", [made.tiny_chat, made.llama3, made.metaspace])
def test_an_answer_cut_short_is_taken_over_where_the_turn_ends(make: Make) -> None:
    template = template_of(make)
    ids = [*template.encode(chat("Hi")).token_ids, *made.spell(make(), "Hello the", 5)]
    branch = template.tokenizer.text_of(ids)
    prompt = template.encode(chat("Hi", "Hello the", "go on"), [branch])
    assert prompt.reused == len(ids)
    assert decode(make, prompt.token_ids) == prompt.text


def test_an_answer_continued_inside_a_word_is_tokenised_anew_from_its_turn() -> None:
    template = template_of(made.tiny_chat)
    start = template.encode(chat("Hi")).token_ids
    branch = template.tokenizer.text_of([*start, *template.tokenizer.tokenize("weath")])
    prompt = template.encode(chat("Hi", "weather", "go on"), [branch])
    assert prompt.token_ids == template.encode(chat("Hi", "weather", "go on")).token_ids
    assert 0 < prompt.reused < len(start)


@pytest.mark.parametrize("make", [made.bare, made.untemplated])
@given(
    st.lists(
        st.tuples(spoken, st.text("abc Hello.", min_size=1).map(str.strip), st.integers(0, 99)), max_size=3
    )
)
@settings(max_examples=50, deadline=None)
def test_plain_turns_keep_the_answers_own_ids(make: Make, conversation: list[tuple[str, str, int]]) -> None:
    """Without special tokens round the turns, the seam is where the tokenizer itself cuts: at the line's end."""
    for prompt, branch in play(make, [(q, f"{a}.", seed) for q, a, seed in conversation]):
        own = branch.token_ids[:-1]  # the template writes no EOS
        assert prompt.token_ids[: len(own)] == own
        assert decode(make, prompt.token_ids) == prompt.text


def test_a_stray_branch_changes_nothing() -> None:
    template = template_of(made.tiny_chat)
    request = chat("What is the weather like?")
    for stray in ("", "something else", "<|im_end|>", "<|im_start|>system\nNo<|im_end|>"):
        branch = template.tokenizer.text_of(template.tokenizer.tokenize(stray))
        assert template.encode(request, [branch]).token_ids == template.encode(request).token_ids


@pytest.mark.parametrize("make", [made.tiny_chat, made.llama2, made.swallows])
def test_the_deepest_branch_is_taken(make: Make) -> None:
    template = template_of(make)
    branches = [
        template.tokenizer.text_of(template.encode(chat(*contents)).token_ids)
        for contents in (
            ["one"],
            ["one", "two", "three"],
            ["one", "two", "other"],
            ["one"],
        )
    ]
    assert template.encode(chat("one", "two", "three", "four", "five"), branches).source == 1
    assert template.encode(chat("one", "2", "three"), branches).source == 0, "the first of equals"
    assert template.encode(chat("one"), []).source is None


# Templates that rewrite history


def test_stripped_thinking_ends_the_match_and_stays_exact() -> None:
    tokenizer, template = made.thinks(), template_of(made.thinks)
    first = template.encode(chat("Hi"))
    answer = template.tokenizer.tokenize("Let me think.\n</think>\n\nHello!<|im_end|>")
    branch = template.tokenizer.text_of([*first.token_ids, *answer])
    prompt = template.encode(chat("Hi", "\n\nHello!", "Bye"), [branch])
    assert "<think>\nLet me" not in prompt.text
    assert decode(made.thinks, prompt.token_ids) == prompt.text
    assert prompt.token_ids == template.encode(chat("Hi", "\n\nHello!", "Bye")).token_ids
    assert prompt.reused == first.token_ids.index(tokenizer.think_start_id), (
        "all that comes before the thinking"
    )


def test_trimmed_content_is_followed() -> None:
    template = template_of(made.llama3)
    first = template.encode(chat("Hi"))
    branch = template.tokenizer.text_of(
        [*first.token_ids, *template.tokenizer.tokenize("  Hello \n<|eot_id|>")]
    )
    prompt = template.encode(chat("Hi", "  Hello \n", "Bye"), [branch])
    assert decode(made.llama3, prompt.token_ids) == prompt.text == template.render(chat("Hi", "Hello", "Bye"))
    assert prompt.token_ids == template.encode(chat("Hi", "Hello", "Bye")).token_ids


def test_a_tokenizer_that_normalises_still_continues() -> None:
    template = template_of(made.thinks)
    first = template.encode(chat("cafe\u0301"))
    assert decode(made.thinks, first.token_ids) != first.text, "this tokenizer composes characters"
    branch = template.tokenizer.text_of(first.token_ids)
    prompt = template.encode(chat("cafe\u0301", "Yes.", "Bye"), [branch])
    turn = made.thinks().convert_tokens_to_ids("<|im_start|>")
    assert prompt.reused == len(first.token_ids) - first.token_ids[::-1].index(turn), (
        "up to the answer's marker"
    )
    assert prompt.token_ids == template.encode(chat("cafe\u0301", "Yes.", "Bye")).token_ids


# The text of ids


@given(makes_all, st.lists(st.integers(0, 409), max_size=30), st.lists(st.integers(0, 30), max_size=4))
@settings(max_examples=80, deadline=None)
def test_extending_is_the_same_as_starting_anew(make: Make, ids: list[int], cuts: list[int]) -> None:
    template, grown = template_of(make), TokenText()
    places = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for start, end in pairwise(places):
        before = copy.copy(grown)
        grown, known = template.tokenizer.extend(grown, ids[start:end]), grown
        assert known == before
    assert grown == template.tokenizer.text_of(ids)


@given(makes_exact, turns)
@settings(max_examples=60, deadline=None)
def test_pieces_cover_all_ids_and_all_text(make: Make, conversation: list[tuple[str, str, int]]) -> None:
    template = template_of(make)
    known = template.tokenizer.text_of(play(make, conversation)[-1][0].token_ids)
    assert [piece.start for piece in known.pieces] == [0, *(piece.end for piece in known.pieces)][:-1]
    assert known.pieces[-1].end == len(known.token_ids)
    ends = accumulate(len(piece.text) for piece in known.pieces)
    for piece, end in zip(known.pieces, ends, strict=True):
        assert known.text[end - len(piece.text) : end] == piece.text
    assert known.text == decode(make, known.token_ids)


def test_a_special_token_is_a_piece_of_its_own() -> None:
    template = template_of(made.tiny_chat)
    text = "<|im_start|>user\nhi<|im_end|><|im_end|>\n<tool_call>"
    pieces = [piece.text for piece in template.tokenizer.text_of(template.tokenizer.tokenize(text)).pieces]
    assert pieces == ["<|im_start|>", "user\nhi", "<|im_end|>", "<|im_end|>", "\n", "<tool_call>"]
