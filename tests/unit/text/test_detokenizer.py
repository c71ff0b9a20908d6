"""An answer's text is exact however its ids are cut; calls and stop strings are found across tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings, strategies as st
from mlx_lm.generate import make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support import made_tokenizers as made

from agent_memory_core.messages import Delta
from agent_memory_core.structured.tool_calls import model_parser
from agent_memory_core.text.detokenizer import Detokenizer, starts_in_reasoning
from agent_memory_core.text.token_text import ExactTokenizer, TextDecoder

Make = Callable[[], TokenizerWrapper]

MAKES = [made.tiny_chat, made.llama3, made.thinks, made.metaspace, made.llama2]

LETTERS = "abc eé漢😀 \n\t.<tool>x{}\"'"
texts, seeds, makes = st.text(LETTERS, max_size=40), st.integers(0, 2**32), st.sampled_from(MAKES)


def joined(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        tuple(call for delta in deltas for call in delta.tool_calls),
        tuple(call for delta in deltas for call in delta.invalid_tool_calls),
    )


def read(reader: Detokenizer, ids: Sequence[int]) -> Delta:
    """What the reader makes of all ids, pushed until it has stopped."""
    deltas = []
    for token_id in ids:
        deltas.append(reader.push(token_id))
        if reader.stopped:
            break
    read = joined([*deltas, reader.finish()])
    assert read.text == reader.text
    return read


def reader_of(tokenizer: TokenizerWrapper, **options: Any) -> Detokenizer:
    """As the engine makes one for a request with tools, where the model has a parser of its own."""
    calls = model_parser(tokenizer) if tokenizer.has_tool_calling else None
    return Detokenizer(tokenizer, calls=calls, **options)


def read_text(tokenizer: TokenizerWrapper, text: str, **options: Any) -> Delta:
    return read(reader_of(tokenizer, **options), tokens(tokenizer, text))


def tokens(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


# Text


@given(makes, texts, seeds)
@settings(max_examples=120, deadline=None)
def test_streamed_text_is_the_whole_text(make: Make, text: str, seed: int) -> None:
    assert read(reader_of(make()), made.spell(make(), text, seed)).text == text


@given(makes, st.lists(st.integers(0, 400), max_size=12))
@settings(max_examples=120, deadline=None)
def test_any_ids_read_as_the_branch_remembers_them(make: Make, ids: list[int]) -> None:
    """What the caller is told and what the next prompt is compared with must be one text."""
    ids = [i for i in ids if i not in make().added_tokens_decoder]
    branch = exact(make).text_of([*tokens(make(), "a"), *ids]).text[1:]
    # Byte tokens that SentencePiece finds broken are shown broken together, also those that were whole when read.
    assume("\ufffd" not in branch or make not in (made.metaspace, made.llama2))
    assert read(reader_of(make()), ids).text == branch


@cache
def exact(make: Make) -> ExactTokenizer:
    return ExactTokenizer(make())


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    "text", ["  indented", "def f():\n    if x:\n        return 1\n", "a   b  \n\n\n c", " \n"]
)
def test_spaces_and_lines_are_kept(make: Make, text: str) -> None:
    assert read(reader_of(make()), made.spell(make(), text, 0)).text == text


def test_a_letter_of_several_tokens_is_held_until_it_is_whole() -> None:
    reader, ids = reader_of(made.tiny_chat()), tokens(made.tiny_chat(), "a😀")
    assert len(ids) == 5
    assert [reader.push(i).text for i in ids] == ["a", "", "", "", "😀"]


def test_a_letter_that_never_became_whole_is_shown_broken() -> None:
    reader, ids = reader_of(made.tiny_chat()), tokens(made.tiny_chat(), "a😀")
    assert "".join(reader.push(i).text for i in ids[:3]) == "a"
    assert set(reader.finish().text) == {"\ufffd"}


def test_text_that_is_no_marker_after_all_is_given() -> None:
    reader = reader_of(made.tiny_chat())
    parts = [reader.push(i).text for i in tokens(made.tiny_chat(), "a <to") + tokens(made.tiny_chat(), "p>")]
    assert "".join(parts) == "a <top>"
    assert "<" not in "".join(parts[:-2])


# Stop strings


@given(makes, texts, st.text(LETTERS, min_size=1, max_size=4), seeds)
@settings(max_examples=120, deadline=None)
def test_nothing_from_the_stop_string_on_is_given(make: Make, text: str, stop: str, seed: int) -> None:
    reader = reader_of(make(), stop=[stop])
    assert read(reader, made.spell(make(), text, seed)).text == text.split(stop)[0]
    assert reader.stopped == (stop in text)


@given(makes, texts, st.lists(st.text("abc .<", min_size=1, max_size=3), max_size=4), seeds)
@settings(max_examples=120, deadline=None)
def test_the_stop_string_that_is_complete_first_wins(
    make: Make, text: str, stops: list[str], seed: int
) -> None:
    places = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert read(reader_of(make(), stop=stops), made.spell(make(), text, seed)).text == (
        text[: min(places)[1]] if places else text
    )


@given(makes, texts, st.text(LETTERS, min_size=1, max_size=4), seeds)
@settings(max_examples=120, deadline=None)
def test_kept_tokens_stand_for_text_before_the_stop_string(
    make: Make, text: str, stop: str, seed: int
) -> None:
    reader, ids = reader_of(make(), stop=[stop]), made.spell(make(), text, seed)
    read(reader, ids)
    kept = TextDecoder(make()).inner(ids[: reader.tokens_before_stop])
    given_text = text.split(stop)[0]
    assert given_text.startswith(kept)
    if reader.stopped:
        longer = TextDecoder(make()).inner(ids[: reader.tokens_before_stop + 1])
        assert not given_text.startswith(longer), "the next token would not have fitted"
    else:
        assert reader.tokens_before_stop == len(ids)


def test_a_token_that_holds_the_beginning_of_the_stop_string_is_not_kept() -> None:
    tokenizer = made.tiny_chat()
    assert len(tokens(tokenizer, " remember")) == 1
    reader, ids = reader_of(tokenizer, stop=["emem"]), tokens(tokenizer, "the remember is")
    before = len(tokens(tokenizer, "the"))
    assert read(reader, ids).text == "the r"
    assert reader.tokens_before_stop == before
    assert reader.push(ids[-1]) == Delta()
    assert reader.tokens_before_stop == before


def test_stop_strings_are_found_in_text_only() -> None:
    tokenizer = made.thinks()
    answer = '<think>STOP</think>a <tool_call>{"name": "STOP", "arguments": {}}</tool_call>ST'
    both = read_text(tokenizer, answer + "<think></think>OP", stop=["STOP"])
    assert both.text == "a STOP", "two pieces of text with a marker between are not one"
    assert (both.reasoning, both.tool_calls[0].name) == ("STOP", "STOP")
    assert read_text(tokenizer, answer + "OP and more", stop=["STOP"]).text == "a"


def test_a_stop_string_that_begins_like_a_marker_leaves_the_marker_alone() -> None:
    answer = 'a<tool_call>{"name": "f", "arguments": {}}</tool_call>b<c'
    got = read_text(made.tiny_chat(), answer, stop=["<"])
    assert (got.text, got.tool_calls[0].name) == ("ab", "f")


# Reasoning


def test_reasoning_and_text_are_told_apart() -> None:
    got = read_text(made.thinks(), "\n I think.\n</think>\n\nHello.", in_reasoning=True)
    assert (got.reasoning, got.text) == ("\n I think.\n", "\n\nHello.")
    got = read_text(made.thinks(), "<think>I think.</think>Hello.")
    assert (got.reasoning, got.text) == ("I think.", "Hello.")


def test_a_model_that_does_not_think_has_no_reasoning() -> None:
    assert read_text(made.tiny_chat(), "Hello.", in_reasoning=True).text == "Hello."


@pytest.mark.parametrize(
    ("prompt", "open_"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_the_prompt_tells_whether_reasoning_is_open(prompt: str, open_: bool) -> None:
    tokenizer = made.thinks()
    assert starts_in_reasoning(tokenizer, prompt) is open_
    assert starts_in_reasoning(tokenizer, tokens(tokenizer, prompt)) is open_
    assert starts_in_reasoning(made.tiny_chat(), prompt) is False


# Tool calls

CALL = '<tool_call>\n{"name": "f", "arguments": {"b": 1, "a": "é"}}\n</tool_call>'


def test_a_call_is_read_and_has_no_text() -> None:
    got = read_text(made.tiny_chat(), f"\n{CALL}\n{CALL}\n")
    assert got.text == ""
    assert [(call.name, list(call.arguments.items())) for call in got.tool_calls] == [
        ("f", [("b", 1), ("a", "é")])
    ] * 2
    ids = [call.id for call in got.tool_calls]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("call_[0-9a-f]{16}", call_id) for call_id in ids)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (f"I look.\n{CALL}", "I look."),
        (f"I look.  \n\n{CALL}\n\n{CALL}\n", "I look."),
        (f"  I look.\n{CALL} Done. \n", "  I look.\n Done. \n"),
        (f"\n\n{CALL}Done.", "\n\nDone."),
        ("I look.\n\n", "I look.\n\n"),
        (" \n", " \n"),
    ],
)
def test_only_space_that_ends_in_a_call_is_left_out(answer: str, text: str) -> None:
    assert read_text(made.tiny_chat(), answer).text == text


def test_a_call_is_given_as_soon_as_it_is_closed() -> None:
    reader = reader_of(made.tiny_chat())
    deltas = [reader.push(i) for i in tokens(made.tiny_chat(), CALL)]
    assert [len(delta.tool_calls) for delta in deltas] == [0] * (len(deltas) - 1) + [1]


@given(seeds, st.dictionaries(st.text("abé"), st.text('xé"\\ \n<>/') | st.integers() | st.none(), max_size=3))
@settings(max_examples=60, deadline=None)
def test_calls_are_read_however_they_are_spelled(seed: int, arguments: dict[str, Any]) -> None:
    text = "<tool_call>" + json.dumps({"name": "f", "arguments": arguments}) + "</tool_call>"
    got = read(reader_of(made.tiny_chat()), made.spell(made.tiny_chat(), text, seed))
    assert [dict(call.arguments) for call in got.tool_calls] == [arguments]
    assert got.invalid_tool_calls == ()


@pytest.mark.parametrize("end", ["", "\n", "\n</tool", "\n</tool_call"])
def test_a_call_that_was_never_closed_still_counts(end: str) -> None:
    got = read_text(made.tiny_chat(), CALL.removesuffix("\n</tool_call>") + end)
    assert [call.name for call in got.tool_calls] == ["f"]


def test_a_call_cut_in_two_is_given_as_text() -> None:
    got = read_text(made.tiny_chat(), '<tool_call>{"name": "a</too')
    assert [call.text for call in got.invalid_tool_calls] == ['{"name": "a</too']


def test_without_a_parser_a_call_is_text() -> None:
    assert read(Detokenizer(made.tiny_chat()), tokens(made.tiny_chat(), f"a {CALL}\n")).text == f"a {CALL}\n"


def test_a_call_that_cannot_be_parsed_is_given_as_text() -> None:
    got = read_text(made.tiny_chat(), "<tool_call>no call</tool_call>after")
    assert [call.text for call in got.invalid_tool_calls] == ["no call"]
    assert (got.tool_calls, got.text) == ((), "after")
    assert got.invalid_tool_calls[0].error.startswith("JSONDecodeError: ")


def test_markers_are_those_of_mlx_lm() -> None:
    """The states this reader knows are the states its machine has."""
    machine = make_text_state_machine(made.thinks())
    assert set(machine.make_state()[2]) == {"normal", "reasoning", "tool"}
