"""A thought that has come to its budget can only end."""

from __future__ import annotations

import mlx.core as mx
import pytest
from support import made_tokenizers as made

from agent_memory_core.structured.thinking import ThinkingLimit, thinking_limit
from agent_memory_core.text.token_text import Prompt

START, END, WORD, WIDTH = 1, 2, 3, 5
EVERYTHING = list(range(WIDTH))


def left_after(answer: list[int], *, is_open: bool, budget: int = 2) -> list[int]:
    limit = ThinkingLimit(START, END, budget, prompt_tokens=1, is_open=is_open)
    logits = limit(mx.array([START, *answer]), mx.zeros((1, WIDTH)))
    values: list[float] = logits[0].tolist()  # type: ignore[assignment]
    return [token for token, value in enumerate(values) if value == 0]


@pytest.mark.parametrize(
    ("answer", "is_open", "left"),
    [
        ([], True, EVERYTHING),
        ([WORD], True, EVERYTHING),
        ([WORD, WORD], True, [END]),
        ([WORD, WORD, END], True, EVERYTHING),
        ([WORD, WORD, END, WORD, WORD, WORD], True, EVERYTHING),
        ([WORD, WORD, WORD], False, EVERYTHING),
        ([START, WORD], False, EVERYTHING),
        ([WORD, START, WORD, WORD], False, [END]),
        # All thoughts of an answer share the budget.
        ([START, WORD, END, START], False, EVERYTHING),
        ([START, WORD, END, START, WORD], False, [END]),
        ([WORD, END, START, WORD, END, START], True, [END]),
    ],
)
def test_only_a_thought_is_ended_and_only_at_its_budget(
    answer: list[int], is_open: bool, left: list[int]
) -> None:
    assert left_after(answer, is_open=is_open) == left


def test_a_budget_of_nothing_ends_the_thought_that_the_prompt_began() -> None:
    assert left_after([], is_open=True, budget=0) == [END]


def test_a_model_that_does_not_think_needs_no_limit() -> None:
    prompt = Prompt((1, 2), "<think>\n", 0, None)
    assert thinking_limit(made.tiny_chat(), 5, prompt) == []
    assert thinking_limit(made.thinks(), None, prompt) == []
    assert len(thinking_limit(made.thinks(), 5, prompt)) == 1
