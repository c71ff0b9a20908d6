"""What tiny-chat is trained on: never what is held out, while the questions of its evaluation stay the same."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
QUESTIONS = "c375fd15a77a021eddcb418e6d0fde748d31657b62474d3e9fadac38aecbbb60"
"""Changes with any question of the evaluation. Figures of before and after such a change cannot be compared."""


@pytest.fixture(scope="module")
def training() -> Any:
    """The modules by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield lambda name: importlib.import_module(f"training.tiny_chat.{name}")


def held_out(training: Any) -> set[str]:
    """The sentence forms of calls that are kept for evaluation."""
    tools, words = training("tools"), training("words")
    sets = (tools._NONE, tools._ONE, tools._MANY, tools._ORDERED)
    return {form.lower().rstrip(".?") for forms in sets for form in words.split_wordings(forms)[1]}


def test_no_further_wording_is_one_that_is_held_out(training: Any) -> None:
    wordings = training("wordings")
    for forms in (wordings.CALL_NONE, wordings.CALL_ONE, wordings.CALL_MANY, wordings.CALL_ORDERED):
        assert len(set(forms)) == len(forms)
        assert not {form.lower().rstrip(".?") for form in forms} & held_out(training)


def test_no_further_wording_of_a_fact_is_one_that_is_held_out(training: Any) -> None:
    """Nor does it become one by what it begins with."""
    facts, words, wordings = training("facts"), training("words"), training("wordings")
    assert wordings.SAID.keys() == wordings.ASKED.keys() == set(facts.FORM_NAMES)
    source = words.Source(5)
    for form in facts.FORMS:
        for forms, more in ((form.says, wordings.SAID[form.name]), (form.asks, wordings.ASKED[form.name])):
            held = {words.plain(wording) for wording in words.split_wordings(forms)[1]}
            assert len({*forms, *more}) == len(forms) + len(more)
            assert not set(map(words.plain, more)) & held
            slots = {slot: f"{{{slot}}}" for slot in "abnv"}
            said = {source.phrase(forms, more=more, leads=wordings.LEADS, **slots) for _ in range(2000)}
            # Only two of the first sets differ in nothing else than a capital letter.
            assert not {words.plain(wording) for wording in said} & held or form.name in ("name", "home")


def test_a_wording_that_is_varied_does_not_become_one_that_is_held_out(training: Any) -> None:
    facts, words = training("facts"), training("words")
    form = next(form for form in facts.FORMS if form.name == "name")
    held = words.split_wordings(form.says)[1]
    assert held == ["my name is {v}"]
    source = words.Source(3)
    said = {source.phrase(form.says, v="X") for _ in range(3000)}
    assert "my name is X." in said
    assert "My name is X" in said
    assert "my name is X" not in said


def test_training_draws_values_and_schema_words_that_are_not_held_out(training: Any) -> None:
    corpus, words = training("corpus"), training("words")
    for seed in range(30):
        schemas = corpus.conversation(seed, tool_share=1.0).schemas()
        names = {name for schema in schemas for name in schema["function"]["parameters"]["properties"]}
        assert not names & words.RESERVED


def test_the_questions_of_the_evaluation_are_the_same_as_ever(training: Any) -> None:
    evaluate, words = training("evaluate"), training("words")
    found = hashlib.sha256()
    for index, (_, make, both) in enumerate(evaluate.plan()):
        for held in (True, False) if both else (True,):
            source = words.Source(7_000 + index, held_values=True, held_wordings=held)
            for _ in range(4):
                talk = make(source).talk
                found.update(json.dumps([talk.messages(), talk.schemas()]).encode())
    assert found.hexdigest() == QUESTIONS
