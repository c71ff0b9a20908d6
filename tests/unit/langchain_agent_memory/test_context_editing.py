"""Old results are cleared in steps: between two steps a prompt begins with the one before it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("langchain.agents", reason="LangChain's agents are not installed")

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage

from agent_memory_core import InvalidRequest
from langchain_agent_memory.context_editing import PLACEHOLDER, PrefixContextEditing


def count(messages: Any) -> int:
    return sum(len(str(message.content)) for message in messages)


def grown(sizes: list[int]) -> list[list[AnyMessage]]:
    """The prompts of an agent that calls one tool after the other, whose results have these sizes."""
    messages: list[AnyMessage] = [HumanMessage("ask")]
    prompts = [list(messages)]
    for at, size in enumerate(sizes):
        call = {"name": "look", "args": {}, "id": str(at)}
        messages += [
            AIMessage("", tool_calls=[call]),
            ToolMessage("x" * size, name="look", tool_call_id=str(at)),
        ]
        prompts.append(list(messages))
    return prompts


def common(one: list[AnyMessage], other: list[AnyMessage]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a.content != b.content), len(one)
    )


@given(
    st.lists(st.integers(1, 400), max_size=30),
    st.integers(100, 2000),
    st.integers(0, 4),
    st.integers(1, 600),
    st.sampled_from([0.0, 0.5, 2.0]),
)
@settings(max_examples=150, deadline=None)
def test_prompts_keep_their_beginning_but_for_steps_that_pay(
    sizes: list[int], trigger: int, keep: int, least: int, worth: float
) -> None:
    rule = PrefixContextEditing(
        trigger=trigger, keep=keep, clear_at_least=least, worth=worth, count_tokens=count
    )
    before: list[AnyMessage] = []
    for prompt in grown(sizes):
        edited = rule.edited(prompt)
        assert [m.content for m in edited if not isinstance(m, ToolMessage)] == [
            m.content for m in prompt if not isinstance(m, ToolMessage)
        ]
        results = [m for m in edited if isinstance(m, ToolMessage)]
        assert all(m.content != PLACEHOLDER for m in results[max(0, len(results) - keep) :])
        shared = common(before, edited)
        if shared < len(before):
            # A step: it was time, and it frees enough for what it costs.
            uncut = [*before, *prompt[len(before) :]]
            freed = count(uncut) - count(edited)
            assert count(uncut) >= trigger
            assert freed >= least
            assert freed >= worth * count(edited[shared:]) or count(uncut) >= 2 * trigger
        before = edited


def test_a_long_run_computes_far_less_than_a_border_that_always_moves() -> None:
    """What LangChain's own rule would compute again: all but three results are cleared in each prompt."""
    prompts = grown([300] * 40)
    rule = PrefixContextEditing(trigger=2000, keep=3, clear_at_least=1500, count_tokens=count)
    ours, steps, before = 0, 0, list[AnyMessage]()
    for prompt in prompts:
        edited = rule.edited(prompt)
        shared = common(before, edited)
        steps += shared < len(before)
        ours += count(edited[shared:])
        before = edited
    always = sum(min(4, at) * 300 for at in range(1, 41))
    assert 3 < steps < 10
    assert ours < always / 2


def test_results_of_excluded_tools_stay_and_numbers_are_checked() -> None:
    prompt = grown([500] * 12)[-1]
    rule = PrefixContextEditing(trigger=100, clear_at_least=1, exclude_tools=["look"], count_tokens=count)
    assert rule.edited(prompt) == prompt
    for wrong in ({"trigger": 0}, {"keep": -1}, {"clear_at_least": -1}, {"worth": -0.1}):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            PrefixContextEditing(**wrong)
