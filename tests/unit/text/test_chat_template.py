"""Prompts are exact: the ids of a branch never change, and what is new decodes to what was rendered."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support import made_tokenizers as made

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest, Message, ToolCall
from agent_memory_core.text import chat_template
from agent_memory_core.text.chat_template import MIN_OPENING, ChatTemplate, Prompt, TokenText

WEATHER: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

# Tokenizers whose ids decode to the very text they came from.
EXACT = [made.tiny_chat, made.llama3, made.thinks, made.bare, made.untemplated, made.metaspace]
ALL = [*EXACT, made.swallows, made.llama2]
# Of those, the ones that set special tokens round each turn and keep history as it was.
MARKED = [made.tiny_chat, made.llama3, made.metaspace, made.llama2, made.swallows]

Make = Callable[[], TokenizerWrapper]

templates: dict[Make, ChatTemplate] = {}


def template_of(make: Make) -> ChatTemplate:
    if make not in templates:
        templates[make] = ChatTemplate(make())
    return templates[make]


def chat(*contents: str, **more: Any) -> ChatRequest:
    """Contents said in turn by user and assistant."""
    roles = ("user", "assistant")
    return ChatRequest(tuple(Message(roles[i % 2], content) for i, content in enumerate(contents)), **more)


def decode(template: ChatTemplate, token_ids: tuple[int, ...]) -> str:
    return str(template._tokenizer.decode(list(token_ids)))


LETTERS = "ab eé漢😀 \n\t.,<>'|1Hello "
said = st.text(LETTERS, min_size=1, max_size=24)
# One template trims what is said, one sets a space before it.
answered = st.builds("x{}y".format, st.text(LETTERS, max_size=24))
turns = st.lists(st.tuples(said, answered, st.integers(0, 2**32)), min_size=1, max_size=4)
makes_exact, makes_all = st.sampled_from(EXACT), st.sampled_from(ALL)


def play(make: Make, conversation: list[tuple[str, str, int]]) -> list[tuple[Prompt, TokenText]]:
    """Play turns as an engine would: each answer is spelled at random and joins the branch, closed by an EOS."""
    template, history, branch = template_of(make), list[str](), TokenText()
    played = []
    for question, answer, seed in conversation:
        history.append(question)
        prompt = template.encode(chat(*history), [branch] if branch.token_ids else [])
        played.append((prompt, branch))
        # Llama 2 writes the space before an answer itself.
        spelled = made.spell(make(), " " + answer if make is made.llama2 else answer, seed)
        branch = template.extend(template.text_of(prompt.token_ids), [*spelled, *make().eos_token_ids])
        history.append(answer)
    return played


# What the ids say


@given(makes_exact, turns)
@settings(max_examples=150, deadline=None)
def test_the_ids_decode_to_the_rendered_text(make: Make, conversation: list[tuple[str, str, int]]) -> None:
    for prompt, _ in play(make, conversation):
        assert decode(template_of(make), prompt.token_ids) == prompt.text


@given(st.sampled_from(MARKED), turns)
@settings(max_examples=150, deadline=None)
def test_no_id_of_a_branch_ever_changes(make: Make, conversation: list[tuple[str, str, int]]) -> None:
    for prompt, branch in play(make, conversation):
        assert prompt.token_ids[: len(branch.token_ids)] == branch.token_ids
        assert prompt.reused == len(branch.token_ids)


@given(makes_all, turns)
@settings(max_examples=150, deadline=None)
def test_what_is_counted_as_reused_is_the_branch(
    make: Make, conversation: list[tuple[str, str, int]]
) -> None:
    for prompt, branch in play(make, conversation):
        assert prompt.token_ids[: prompt.reused] == branch.token_ids[: prompt.reused]
        assert (prompt.source is None) == (prompt.reused == 0)


@given(makes_all, st.lists(said, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_a_prompt_without_a_branch_is_what_the_tokenizer_itself_makes(
    make: Make, contents: list[str]
) -> None:
    template, request = template_of(make), chat(*contents)
    own = make().encode(template.render(request), add_special_tokens=False)
    assert template.encode(request).token_ids == tuple(own)


@given(makes_all, turns)
@settings(max_examples=150, deadline=None)
def test_canonical_answers_give_the_canonical_prompt(
    make: Make, conversation: list[tuple[str, str, int]]
) -> None:
    """Continuing and starting anew agree to the last token where the model spelled as the tokenizer does."""
    template, contents = template_of(make), [text for turn in conversation for text in turn[:2]]
    known: list[TokenText] = []
    for end in range(1, len(contents) + 1, 2):
        prompt = template.encode(chat(*contents[:end]), known)
        assert prompt.token_ids == template.encode(chat(*contents[:end])).token_ids
        known.append(template.text_of(prompt.token_ids))


@pytest.mark.parametrize("make", [made.llama3, made.untemplated])
def test_six_turns_hold_one_bos_and_lose_no_token(make: Make) -> None:
    """Tokenising each turn's new text by itself inserts a BOS at every turn, and cuts a real token for it."""
    tokenizer, template = make(), template_of(make)
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("Hello")[0] == bos, "this tokenizer adds a BOS to all it is given"
    played = play(make, [(f"Question {n}?", f"Answer {n}.", n) for n in range(6)])
    for prompt, _ in played:
        assert prompt.token_ids.count(bos) == 1
        assert prompt.token_ids[0] == bos
        assert decode(template, prompt.token_ids) == prompt.text
    texts = [prompt.text for prompt, _ in played]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@pytest.mark.parametrize("make", [made.tiny_chat, made.llama3, made.metaspace])
def test_only_new_text_is_tokenised(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(make())
    contents = ["Tell me more.", "There is a lot to tell about that. " * 20] * 40
    branch = template.text_of(template.encode(chat(*contents, "And now?")).token_ids)
    tokenised, tokenize = list[str](), template.tokenize

    def watched(text: str) -> list[int]:
        tokenised.append(text)
        return tokenize(text)

    monkeypatch.setattr(template, "tokenize", watched)
    prompt = template.encode(chat(*contents, "And now?", "Nothing.", "Really?"), [branch])
    assert prompt.reused == len(branch.token_ids)
    assert sum(map(len, tokenised)) < 300 < len(prompt.text) / 10


# Seams


def test_a_merge_does_not_cross_a_special_token() -> None:
    template = template_of(made.tiny_chat)
    for prompt, branch in play(
        made.tiny_chat, [("hi", "x <y", 1), ("< |im_end|", "<|im_", 2), ("ok", "y", 3)]
    ):
        fresh = template.text_of(template.tokenize(prompt.text))
        assert [p.text for p in template.text_of(prompt.token_ids).pieces] == [p.text for p in fresh.pieces]
        assert branch.text == prompt.text[: len(branch.text)]


def test_metaspace_puts_no_space_at_the_seam() -> None:
    tokenizer, template = made.metaspace(), template_of(made.metaspace)
    assert decode(template, tuple(tokenizer.encode("Hello")[:1])) != tokenizer.convert_ids_to_tokens(
        tokenizer.encode("Hello")[:1]
    ), "this tokenizer begins a text with a space that it drops again"
    branch = template.text_of(template.encode(chat("Hello there")).token_ids)
    other = template.encode(chat("Hello Paris"), [branch])
    assert other.reused == 1, "the turn's own marker"
    assert other.token_ids == template.encode(chat("Hello Paris")).token_ids


@pytest.mark.parametrize("make", [made.tiny_chat, made.llama3, made.metaspace])
def test_an_answer_cut_short_is_taken_over_where_the_turn_ends(make: Make) -> None:
    template = template_of(make)
    ids = [*template.encode(chat("Hi")).token_ids, *made.spell(make(), "Hello the", 5)]
    branch = template.text_of(ids)
    prompt = template.encode(chat("Hi", "Hello the", "go on"), [branch])
    assert prompt.reused == len(ids)
    assert decode(template, prompt.token_ids) == prompt.text


def test_an_answer_continued_inside_a_word_is_tokenised_anew_from_its_turn() -> None:
    template = template_of(made.tiny_chat)
    start = template.encode(chat("Hi")).token_ids
    branch = template.text_of([*start, *template.tokenize("weath")])
    prompt = template.encode(chat("Hi", "weather", "go on"), [branch])
    assert prompt.token_ids == template.encode(chat("Hi", "weather", "go on")).token_ids
    assert 0 < prompt.reused < len(start)


@pytest.mark.parametrize("make", [made.bare, made.untemplated])
@given(
    st.lists(
        st.tuples(said, st.text("abc Hello.", min_size=1).map(str.strip), st.integers(0, 99)), max_size=3
    )
)
@settings(max_examples=50, deadline=None)
def test_plain_turns_keep_the_answers_own_ids(make: Make, conversation: list[tuple[str, str, int]]) -> None:
    """Without special tokens round the turns, the seam is where the tokenizer itself cuts: at the line's end."""
    template = template_of(make)
    for prompt, branch in play(make, [(q, f"{a}.", seed) for q, a, seed in conversation]):
        own = branch.token_ids[:-1]  # the template writes no EOS
        assert prompt.token_ids[: len(own)] == own
        assert decode(template, prompt.token_ids) == prompt.text


def test_a_stray_branch_changes_nothing() -> None:
    template = template_of(made.tiny_chat)
    request = chat("What is the weather like?")
    for stray in ("", "something else", "<|im_end|>", "<|im_start|>system\nNo<|im_end|>"):
        branch = template.text_of(template.tokenize(stray))
        assert template.encode(request, [branch]).token_ids == template.encode(request).token_ids


@pytest.mark.parametrize("make", [made.tiny_chat, made.llama2, made.swallows])
def test_the_deepest_branch_is_taken(make: Make) -> None:
    template = template_of(make)
    branches = [
        template.text_of(template.encode(chat(*contents)).token_ids)
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
    answer = template.tokenize("Let me think.\n</think>\n\nHello!<|im_end|>")
    branch = template.text_of([*first.token_ids, *answer])
    prompt = template.encode(chat("Hi", "\n\nHello!", "Bye"), [branch])
    assert "<think>\nLet me" not in prompt.text
    assert decode(template, prompt.token_ids) == prompt.text
    assert prompt.token_ids == template.encode(chat("Hi", "\n\nHello!", "Bye")).token_ids
    assert prompt.reused == first.token_ids.index(tokenizer.think_start_id), (
        "all that comes before the thinking"
    )


def test_trimmed_content_is_followed() -> None:
    template = template_of(made.llama3)
    first = template.encode(chat("Hi"))
    branch = template.text_of([*first.token_ids, *template.tokenize("  Hello \n<|eot_id|>")])
    prompt = template.encode(chat("Hi", "  Hello \n", "Bye"), [branch])
    assert decode(template, prompt.token_ids) == prompt.text == template.render(chat("Hi", "Hello", "Bye"))
    assert prompt.token_ids == template.encode(chat("Hi", "Hello", "Bye")).token_ids


def test_a_tokenizer_that_normalises_still_continues() -> None:
    template = template_of(made.thinks)
    first = template.encode(chat("cafe\u0301"))
    assert decode(template, first.token_ids) != first.text, "this tokenizer composes letters"
    branch = template.text_of(first.token_ids)
    prompt = template.encode(chat("cafe\u0301", "Yes.", "Bye"), [branch])
    turn = made.thinks().convert_tokens_to_ids("<|im_start|>")
    assert prompt.reused == len(first.token_ids) - first.token_ids[::-1].index(turn), (
        "up to the answer's marker"
    )
    assert prompt.token_ids == template.encode(chat("cafe\u0301", "Yes.", "Bye")).token_ids


# Where prompts part

LONG = "You are terse and kind, and you never say more than you were asked. " * 8

systems = st.sampled_from(["", "Be brief.", LONG])
tool_lists = st.sampled_from([(), (WEATHER,)])


def conversation(system: str, contents: list[str], **more: Any) -> ChatRequest:
    """A system message, if there is one, and contents said in turn."""
    first = (Message("system", system),) if system else ()
    return ChatRequest((*first, *chat(*contents).messages), **more)


def marks_of(template: ChatTemplate, request: ChatRequest) -> tuple[tuple[int, ...], Prompt]:
    prompt = template.encode(request)
    return template.checkpoints(request, prompt), prompt


@given(makes_all, systems, tool_lists, st.lists(said, min_size=1, max_size=3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_marks_are_inside_their_prompt_and_in_order(
    make: Make, system: str, tools: tuple[Any, ...], contents: list[str], asks: bool
) -> None:
    template, request = template_of(make), conversation(system, contents, tools=tools)
    prompt = template.encode(request, generation_prompt=asks)
    checkpoints = template.checkpoints(request, prompt)
    assert list(checkpoints) == sorted(set(checkpoints))
    assert all(0 < checkpoint < len(prompt.token_ids) for checkpoint in checkpoints)
    assert len(checkpoints) in (1, 2)


@example(made.metaspace, "", (WEATHER,), ["1", "\n"], [])  # a line feed merges with those of the template
@given(
    makes_all,
    systems,
    tool_lists,
    st.lists(said | answered, min_size=2, max_size=2),
    st.lists(answered, max_size=1),
)
@settings(max_examples=100, deadline=None)
def test_two_conversations_share_what_comes_before_their_opening_mark(
    make: Make, system: str, tools: tuple[Any, ...], firsts: list[str], answers: list[str]
) -> None:
    template = template_of(make)
    ones = [[first, *(part for answer in answers for part in (answer, "go on"))] for first in firsts]
    (checkpoints, prompt), (others, other) = (
        marks_of(template, conversation(system, contents, tools=tools)) for contents in ones
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
    (opening, _), prompt = marks_of(template, conversation(LONG, ["Hi"], tools=(WEATHER,)))
    before = decode(template, prompt.token_ids[:opening])
    assert LONG.strip().replace(" ", "") in before.replace(" ", "")
    assert "get_weather" in before
    assert "Hi" not in before
    for said in "a", "1", "aa":
        assert marks_of(template, conversation(LONG, [said], tools=(WEATHER,)))[0][0] == opening
    (other, _), _ = marks_of(template, conversation(LONG, ["Hi"]))
    assert other < opening


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("system", ["", LONG])
@pytest.mark.parametrize("contents", [["Hi"], ["Hi", "Hello.", "And now?"]])
def test_the_last_mark_is_where_the_generation_prompt_begins(
    make: Make, system: str, contents: list[str]
) -> None:
    template, request = template_of(make), conversation(system, contents)
    checkpoints, prompt = marks_of(template, request)
    closed = template.encode(request, generation_prompt=False).token_ids
    whole = prompt.token_ids
    asks_in_tokens = len(closed) < len(whole) and whole[: len(closed)] == closed
    assert checkpoints[-1] == (len(closed) if asks_in_tokens else len(whole) - 1)
    assert asks_in_tokens or make in (made.llama2, made.bare, made.untemplated)
    assert (
        template.checkpoints(request, template.encode(request, generation_prompt=False))[-1]
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
        checkpoints, prompt = marks_of(template, request)
        closed = template.encode(request, generation_prompt=False).token_ids
        assert checkpoints == (len(closed),)
        asked.add(prompt.token_ids[checkpoints[-1] :])
    assert len(asked) == 2


REFUSES = "{%- if messages | length < 3 -%}{{- raise_exception('say more') -}}{%- endif -%}" + made.BARE


@pytest.mark.parametrize("how", ["a template", "a renderer"])
def test_a_probe_that_is_refused_gives_no_opening_mark(how: str) -> None:
    def refuses(messages: list[dict[str, Any]], tools: Any = None, **_: Any) -> str:
        assert len(messages) > 2, "say more"
        return "".join(f"{m['role']}:\n{m['content']}\n\n" for m in messages)

    tokenizer = made.byte_level(REFUSES, [])
    if how == "a renderer":
        tokenizer = TokenizerWrapper(tokenizer._tokenizer, chat_template=refuses)
    template = ChatTemplate(tokenizer)
    checkpoints, prompt = marks_of(template, conversation(LONG, ["Hi", "Hello.", "And now?"]))
    assert checkpoints == (len(prompt.token_ids) - 1,)


def test_a_prompt_that_is_only_an_opening_has_no_mark_at_its_end() -> None:
    template, request = template_of(made.tiny_chat), ChatRequest((Message("system", LONG),))
    prompt = template.encode(request, generation_prompt=False)
    assert template.checkpoints(request, prompt) == (len(prompt.token_ids) - 1,)


def test_openings_are_probed_once_and_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROBES", 4)
    template = ChatTemplate(made.tiny_chat())
    tokenised, tokenize = list[str](), template.tokenize

    def watched(text: str) -> list[int]:
        tokenised.append(text)
        return tokenize(text)

    requests = [conversation(f"{n} {LONG}", ["Hi"]) for n in range(9)]
    prompts = [template.encode(request) for request in requests]
    monkeypatch.setattr(template, "tokenize", watched)
    found = [template.checkpoints(request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
    assert len(template._probes) <= 4
    tokenised.clear()
    assert template.checkpoints(conversation(f"8 {LONG}", ["Bye"]), prompts[8]) == found[8]
    assert len(tokenised) == 0
    assert [template.checkpoints(*one) for one in zip(requests, prompts, strict=True)] == found
    assert len(template._probes) <= 4


# The text of ids


@given(makes_all, st.lists(st.integers(0, 409), max_size=30), st.lists(st.integers(0, 30), max_size=4))
@settings(max_examples=150, deadline=None)
def test_extending_is_the_same_as_starting_anew(make: Make, ids: list[int], cuts: list[int]) -> None:
    template, grown = template_of(make), TokenText()
    places = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for start, end in pairwise(places):
        before = copy.copy(grown)
        grown, known = template.extend(grown, ids[start:end]), grown
        assert known == before
    assert grown == template.text_of(ids)


@given(makes_exact, turns)
@settings(max_examples=100, deadline=None)
def test_pieces_cover_all_ids_and_all_text(make: Make, conversation: list[tuple[str, str, int]]) -> None:
    template = template_of(make)
    known = template.text_of(play(make, conversation)[-1][0].token_ids)
    assert [piece.start for piece in known.pieces] == [0, *(piece.end for piece in known.pieces)][:-1]
    assert known.pieces[-1].end == len(known.token_ids)
    ends = accumulate(len(piece.text) for piece in known.pieces)
    for piece, end in zip(known.pieces, ends, strict=True):
        assert known.text[end - len(piece.text) : end] == piece.text
    assert known.text == decode(template, known.token_ids)


def test_a_special_token_is_a_piece_of_its_own() -> None:
    template = template_of(made.tiny_chat)
    text = "<|im_start|>user\nhi<|im_end|><|im_end|>\n<tool_call>"
    pieces = [piece.text for piece in template.text_of(template.tokenize(text)).pieces]
    assert pieces == ["<|im_start|>", "user\nhi", "<|im_end|>", "<|im_end|>", "\n", "<tool_call>"]


# Rendering


def test_key_order_and_tools_reach_the_text() -> None:
    arguments = {"zone": 1, "city": "Zürich", "alpha": [True, None]}
    messages = (
        Message("user", "Weather?"),
        Message("assistant", "", tool_calls=(ToolCall("get_weather", arguments, "call_1"),)),
        Message("tool", "rain", name="get_weather", tool_call_id="call_1"),
    )
    text = template_of(made.tiny_chat).render(ChatRequest(messages, tools=(WEATHER,)))
    assert (
        '{"name": "get_weather", "arguments": {"zone": 1, "city": "Zürich", "alpha": [true, null]}}' in text
    )
    assert '{"name": "get_weather", "arguments": {"city": string}} The weather.' in text
    assert "<|im_start|>tool\nrain<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_a_request_is_not_changed() -> None:
    def render(messages: list[dict[str, Any]], tools: Any = None, **_: Any) -> str:
        text = f"{messages} {tools}"
        messages[0]["content"] = "changed"
        for message in messages:
            for call in message.pop("tool_calls", []):
                call["function"]["arguments"].get("days", []).clear()
                call["function"]["arguments"].clear()
        tools and tools[0]["function"]["parameters"].clear()
        return text

    template = ChatTemplate(TokenizerWrapper(made.bare()._tokenizer, chat_template=render))
    call = ToolCall("get_weather", {"city": {"name": "Paris"}, "days": [1]}, "call_1")
    request = ChatRequest(
        (Message("user", "Hi"), Message("assistant", "", tool_calls=(call,))),
        tools=(copy.deepcopy(WEATHER),),
        template_kwargs={"enable_thinking": False},
    )
    before = copy.deepcopy(request)
    assert "'arguments': {'city': {'name': 'Paris'}, 'days': [1]}" in template.encode(request).text
    assert request == before


def test_arguments_are_text_where_the_template_joins_them() -> None:
    joins = "{%- for m in messages -%}{{- m.role ~ m.content -}}{%- for c in m.tool_calls or [] -%}"
    joins += "{{- c.function.name + ' ' + c.function.arguments -}}{%- endfor -%}{%- endfor -%}"
    template = ChatTemplate(made.byte_level(joins, []))
    call = ToolCall("get_weather", {"z": "é", "a": 1}, "call_1")
    request = ChatRequest((Message("user", "Hi"), Message("assistant", "", tool_calls=(call,))))
    assert template.render(request) == 'userHiassistantget_weather {"z": "é", "a": 1}'


def test_ids_are_short_where_the_template_checks_them() -> None:
    checks = "{%- for m in messages -%}{%- for c in m.tool_calls or [] -%}"
    checks += "{%- if c.id | length != 9 -%}{{- raise_exception('length 9') -}}{%- endif -%}"
    checks += "{{- c.id ~ ' ' ~ c.function.name ~ ' ' -}}{%- endfor -%}{{- m.tool_call_id ~ m.content -}}{%- endfor -%}"
    template = ChatTemplate(made.byte_level(checks, []))
    called = Message("assistant", "", tool_calls=(ToolCall("f", {}, "call_0123456789abcdef"),))
    result = Message("tool", "", tool_call_id="call_0123456789abcdef")
    first, second = template.render(ChatRequest((called, result))).split(" f ")
    assert first == second
    assert len(first) == 9


def test_a_template_without_tools_gets_plain_messages() -> None:
    call = ToolCall("get_weather", {"city": "Paris"}, "call_1")
    messages = (
        Message("system", "Be brief."),
        Message("user", "Weather?"),
        Message("assistant", "I look.", tool_calls=(call,)),
        Message("tool", "rain", tool_call_id="call_1"),
        Message("tool", "wind", tool_call_id="call_2"),
        Message("user", "So?"),
    )
    text = template_of(made.llama2).render(ChatRequest(messages, tools=(WEATHER,)))
    assert text.startswith("<s>[INST] Be brief.\n\n# Tools\n")
    assert '"name": "get_weather", "description": "The weather."' in text
    assert text.endswith(
        '</tool_call>\n\nWeather? [/INST] I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}'
        "\n</tool_call></s><s>[INST] <tool_response>\nrain\n</tool_response>\n\n"
        "<tool_response>\nwind\n</tool_response>\n\nSo? [/INST]"
    )


def test_a_tool_list_without_a_system_message_makes_one() -> None:
    text = template_of(made.thinks).render(chat("Hi", tools=(WEATHER,)))
    assert text.startswith("<|im_start|>system\n# Tools\n")
    assert '"get_weather"' in text


def test_no_template_is_rendered_plainly() -> None:
    assert template_of(made.untemplated).render(chat("Hi", "Hello", "Bye")) == (
        "<s>user:\nHi\n\nassistant:\nHello\n\nuser:\nBye\n\nassistant:\n"
    )


def test_no_bos_is_written_for_a_tokenizer_that_adds_none() -> None:
    tokenizer = made.byte_level(None, made.special("<s>"))
    tokenizer.bos_token = "<s>"
    assert ChatTemplate(tokenizer).render(chat("Hi")) == "user:\nHi\n\nassistant:\n"


@pytest.mark.parametrize("make", [made.tiny_chat, made.llama3, made.untemplated])
def test_without_a_generation_prompt_it_ends_with_the_last_message(make: Make) -> None:
    template = template_of(make)
    open_, closed = (template.render(chat("Hi", "Hello"), generation_prompt=on) for on in (True, False))
    assert open_.startswith(closed)
    assert "assistant" in open_.removeprefix(closed)
    assert template.render(chat("Hi", "Hello", "Bye")).startswith(closed)


def test_template_arguments_reach_the_template() -> None:
    template = ChatTemplate(made.byte_level("{{- mood ~ messages[0].content -}}", []))
    assert template.render(chat("Hi", template_kwargs={"mood": "glad "})) == "glad Hi"


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (ChatRequest(()), "messages is empty"),
        (chat("Hi", template_kwargs={"tokenize": True, "tools": []}), "may not hold tokenize, tools"),
        (ChatRequest((Message("assistant", "Hi"),)), "roles must alternate user/assistant"),
        (chat("half a pair: \ud83d"), "not valid Unicode"),
    ],
)
def test_what_cannot_be_rendered_is_an_invalid_request(request_: ChatRequest, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        template_of(made.llama2).encode(request_)
