"""Checkpoints lie where other prompts are likely to differ from a prompt."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support import made_tokenizers as made
from support.made_conversations import (
    ALL,
    MARKED,
    WEATHER,
    Make,
    answered,
    chat,
    decode,
    makes_all,
    spoken,
    template_of,
)

from agent_memory_core.blocks.block import common_prefix
from agent_memory_core.messages import ChatRequest, Message
from agent_memory_core.text import checkpoints as checkpoints_module
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.checkpoints import MIN_OPENING, CheckpointFinder
from agent_memory_core.text.token_text import Prompt

LONG = "You are terse and kind, and you never say more than you were asked. " * 8

systems = st.sampled_from(["", "Be brief.", LONG])
tool_lists = st.sampled_from([(), (WEATHER,)])


def conversation(system: str, contents: list[str], **more: Any) -> ChatRequest:
    """A system message, if there is one, and contents of user and assistant in turn."""
    first = (Message("system", system),) if system else ()
    return ChatRequest((*first, *chat(*contents).messages), **more)


@cache
def finder_of(template: ChatTemplate) -> CheckpointFinder:
    return CheckpointFinder(template)


def find(template: ChatTemplate, request: ChatRequest) -> tuple[tuple[int, ...], Prompt]:
    """The checkpoints of a request's prompt, and the prompt."""
    prompt = template.encode(request)
    return finder_of(template).find(request, prompt), prompt


@given(makes_all, systems, tool_lists, st.lists(spoken, min_size=1, max_size=3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_checkpoints_are_inside_their_prompt_and_in_order(
    make: Make, system: str, tools: tuple[Any, ...], contents: list[str], asks: bool
) -> None:
    template, request = template_of(make), conversation(system, contents, tools=tools)
    prompt = template.encode(request, generation_prompt=asks)
    checkpoints = finder_of(template).find(request, prompt)
    assert list(checkpoints) == sorted(set(checkpoints))
    assert all(0 < checkpoint < len(prompt.token_ids) for checkpoint in checkpoints)
    assert len(checkpoints) in (1, 2)


@example(made.metaspace, "", (WEATHER,), ["1", "\n"], [])  # a line feed merges with those of the template
@given(
    makes_all,
    systems,
    tool_lists,
    st.lists(spoken | answered, min_size=2, max_size=2),
    st.lists(answered, max_size=1),
)
@settings(max_examples=60, deadline=None)
def test_two_conversations_share_what_comes_before_their_opening_checkpoint(
    make: Make, system: str, tools: tuple[Any, ...], firsts: list[str], answers: list[str]
) -> None:
    template = template_of(make)
    ones = [[first, *(part for answer in answers for part in (answer, "go on"))] for first in firsts]
    (checkpoints, prompt), (others, other) = (
        find(template, conversation(system, contents, tools=tools)) for contents in ones
    )
    opens = [found[0] for found in (checkpoints, others) if len(found) == 2]
    if opens:
        shared = min(opens)
        assert shared >= MIN_OPENING
        assert prompt.token_ids[:shared] == other.token_ids[:shared]
    if make in MARKED and all(first[0] == "x" for first in firsts):
        assert len(opens) in (0, 2)
        assert len(set(opens)) <= 1, (
            "where no space merges with the template's, they end at the very same place"
        )
        assert opens or system != LONG


@pytest.mark.parametrize("make", ALL)
def test_the_opening_holds_all_of_the_system_message_and_the_tools(make: Make) -> None:
    template = template_of(make)
    (opening, _), prompt = find(template, conversation(LONG, ["Hi"], tools=(WEATHER,)))
    before = decode(make, prompt.token_ids[:opening])
    assert LONG.strip().replace(" ", "") in before.replace(" ", "")
    assert "get_weather" in before
    assert "Hi" not in before
    for first in "a", "1", "aa":
        assert find(template, conversation(LONG, [first], tools=(WEATHER,)))[0][0] == opening
    (other, _), _ = find(template, conversation(LONG, ["Hi"]))
    assert other < opening


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("system", ["", LONG])
@pytest.mark.parametrize("contents", [["Hi"], ["Hi", "Hello.", "And now?"]])
def test_the_last_checkpoint_is_where_the_generation_prompt_begins(
    make: Make, system: str, contents: list[str]
) -> None:
    template, request = template_of(make), conversation(system, contents)
    checkpoints, prompt = find(template, request)
    closed = template.encode(request, generation_prompt=False).token_ids
    whole = prompt.token_ids
    asks_in_tokens = len(closed) < len(whole) and whole[: len(closed)] == closed
    assert checkpoints[-1] == (len(closed) if asks_in_tokens else len(whole) - 1)
    assert asks_in_tokens or make in (made.llama2, made.bare, made.untemplated)
    assert (
        finder_of(template).find(request, template.encode(request, generation_prompt=False))[-1]
        == len(closed) - 1
    )


def test_a_generation_prompt_that_depends_on_an_argument_is_found_for_each() -> None:
    thinking = made.CHATML.replace(
        "assistant\\n'", "assistant\\n' ~ ('<think>\\n' if think else '<think>\\n\\n</think>\\n\\n')"
    )
    template = ChatTemplate(made.byte_level(thinking, made.special("<|im_start|>", "<|im_end|>")))
    asked = set()
    for think in (True, False, True):
        request = chat("Hi", template_kwargs={"think": think})
        checkpoints, prompt = find(template, request)
        closed = template.encode(request, generation_prompt=False).token_ids
        assert checkpoints == (len(closed),)
        asked.add(prompt.token_ids[checkpoints[-1] :])
    assert len(asked) == 2


REFUSES = "{%- if messages | length < 3 -%}{{- raise_exception('say more') -}}{%- endif -%}" + made.BARE


@pytest.mark.parametrize("how", ["a template", "a renderer"])
def test_a_probe_that_is_refused_gives_no_opening_checkpoint(how: str) -> None:
    def refuses(messages: list[dict[str, Any]], tools: Any = None, **_: Any) -> str:
        assert len(messages) > 2, "say more"
        return "".join(f"{m['role']}:\n{m['content']}\n\n" for m in messages)

    tokenizer = made.byte_level(REFUSES, [])
    if how == "a renderer":
        tokenizer = TokenizerWrapper(tokenizer._tokenizer, chat_template=refuses)
    template = ChatTemplate(tokenizer)
    checkpoints, prompt = find(template, conversation(LONG, ["Hi", "Hello.", "And now?"]))
    assert checkpoints == (len(prompt.token_ids) - 1,)


def test_a_prompt_that_is_only_an_opening_has_no_checkpoint_at_its_end() -> None:
    template, request = template_of(made.tiny_chat), ChatRequest((Message("system", LONG),))
    prompt = template.encode(request, generation_prompt=False)
    assert finder_of(template).find(request, prompt) == (len(prompt.token_ids) - 1,)


def test_openings_are_probed_once_and_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints_module, "MAX_PROBES", 4)
    template = ChatTemplate(made.tiny_chat())
    finder = CheckpointFinder(template)
    tokenised, tokenize = list[str](), template.tokenizer.tokenize

    def watched(text: str) -> list[int]:
        tokenised.append(text)
        return tokenize(text)

    requests = [conversation(f"{n} {LONG}", ["Hi"]) for n in range(9)]
    prompts = [template.encode(request) for request in requests]
    monkeypatch.setattr(template.tokenizer, "tokenize", watched)
    found = [finder.find(request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
    assert len(finder._probes) <= 4
    tokenised.clear()
    assert finder.find(conversation(f"8 {LONG}", ["Bye"]), prompts[8]) == found[8]
    assert len(tokenised) == 0
    assert [finder.find(*one) for one in zip(requests, prompts, strict=True)] == found
    assert len(finder._probes) <= 4


@given(makes_all, systems, tool_lists, st.lists(spoken, min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_cache_point_is_where_the_marked_text_ends(
    make: Make, system: str, tools: tuple[Any, ...], contents: list[str], data: st.DataObject
) -> None:
    template, plain = template_of(make), conversation(system, contents, tools=tools)
    index = data.draw(st.integers(0, len(plain.messages) - 1))
    message = plain.messages[index]
    point = data.draw(st.integers(0, len(message.content)))
    marked = replace(message, cache_points=(point,))
    request = replace(plain, messages=(*plain.messages[:index], marked, *plain.messages[index + 1 :]))
    found, prompt = find(template, request)
    assert template.encode(plain) == prompt, "a cache point changes no token"
    (place,) = set(found) - set(find(template, plain)[0]) or {0}
    changed = replace(message, content=message.content[:point] + "\u0416 other")
    other = replace(plain, messages=(*plain.messages[:index], changed, *plain.messages[index + 1 :]))
    # Whatever follows the point, a later prompt has all tokens before it, but for one that the cut itself changes.
    shared = common_prefix(template.encode(other).token_ids, prompt.token_ids)
    assert place <= shared + 1


def test_only_the_last_cache_points_count() -> None:
    message = Message("user", "one two three four five six", cache_points=(3, 7, 13, 18, 23))
    template = template_of(made.tiny_chat)
    found, prompt = find(template, ChatRequest((message,)))
    texts = [decode(made.tiny_chat, prompt.token_ids[:place]) for place in found[:-1]]
    assert [text.split("\n", 1)[-1] for text in texts] == [message.content[:p] for p in (7, 13, 18, 23)]
