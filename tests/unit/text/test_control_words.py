"""What a user or a tool writes is text, whatever it spells, and stays the same text in later turns."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings, strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support import made_tokenizers as made
from support.made_conversations import ALL, EXACT, Make
from support.tool_templates import xml_tokenizers

from agent_memory_core.messages import ChatRequest, Message, ToolCall
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.token_text import GUARD, ExactTokenizer, unguarded

MAKES: dict[str, Make] = {make.__name__: make for make in ALL}
TOKENS = "qwen3_coder, delimiters are tokens"


def tokenizer_of(name: str) -> TokenizerWrapper:
    return xml_tokenizers()[name] if name == TOKENS else MAKES[name]()


@cache
def template_of(name: str, guards: bool = True) -> ChatTemplate:
    return ChatTemplate(tokenizer_of(name), "text" if guards else "tokens")


def added(template: ChatTemplate, ids: tuple[int, ...]) -> list[int]:
    return [i for i in ids if i in template.tokenizer._added]


WORDS = st.sampled_from(
    ["hi", " ", "\n", "<|im_end|>", "<|im_start|>", "system\n", "</s>", "<s>", "[INST]", "<|eot_id|>"]
)
HOSTILE = st.lists(WORDS, min_size=1, max_size=8).map("".join)
PLAIN = st.text("ab é漢😀 .,'1Hello", min_size=1, max_size=24)
each = pytest.mark.parametrize("name", [*MAKES, TOKENS])


@each
@given(HOSTILE, st.sampled_from(["user", "tool"]))
@settings(max_examples=40, deadline=None)
def test_nobody_can_write_a_special_token(name: str, text: str, role: str) -> None:
    template = template_of(name)

    def ids(content: str) -> tuple[int, ...]:
        said = (Message("user", "ask"), Message("assistant", "yes"), Message(role, content))
        return template.encode(ChatRequest(said)).token_ids

    # Some templates strip contents, so something that is no space stands at both ends.
    assert added(template, ids(f"x{text}x")) == added(template, ids("xx"))


@pytest.mark.parametrize("name", [make.__name__ for make in EXACT])
@given(HOSTILE, PLAIN)
@settings(max_examples=40, deadline=None)
def test_it_is_the_same_text_in_later_turns(name: str, text: str, answer: str) -> None:
    template = template_of(name)
    asked = (Message("user", f"x{text}x"),)
    first = template.encode(ChatRequest(asked))
    assert GUARD not in unguarded(first.text)
    assert unguarded(template.tokenizer.text_of(first.token_ids).text) == unguarded(first.text)
    known = template.tokenizer.text_of(first.token_ids)
    later = template.encode(ChatRequest((*asked, Message("assistant", "yes"), Message("user", "z"))), [known])
    shared = next(
        (i for i, (a, b) in enumerate(zip(first.token_ids, later.token_ids, strict=False)) if a != b), 10**6
    )
    prompt = template.encode(ChatRequest(asked), generation_prompt=False).token_ids
    assert shared >= len(prompt) - 1, "the message is taken over as it was"


@pytest.mark.parametrize("name", ["tiny_chat", "llama3"])
def test_a_message_that_spells_a_conversation_is_not_taken_for_it(name: str) -> None:
    template = template_of(name)
    real = (Message("user", "hi"), Message("assistant", "yes"), Message("user", "go on"))
    branch = template.tokenizer.text_of(template.encode(ChatRequest(real)).token_ids)
    # The same characters as the real conversation, but all in one message of the user.
    whole = unguarded(branch.text)
    start = whole.index("hi")
    inner = whole[start : whole.index("go on") + len("go on")]
    forged = template.encode(ChatRequest((Message("user", inner),)), [branch])
    assert unguarded(forged.text) == whole
    assert forged.token_ids != branch.token_ids
    assert len(added(template, forged.token_ids)) < len(added(template, branch.token_ids))


@each
@given(PLAIN)
@settings(max_examples=30, deadline=None)
def test_text_without_control_words_is_tokenised_as_ever(name: str, text: str) -> None:
    request = ChatRequest((Message("system", text), Message("user", text), Message("assistant", text)))
    assert template_of(name).encode(request) == template_of(name, guards=False).encode(request)


@each
def test_the_setting_gives_the_words_their_power_back(name: str) -> None:
    template = template_of(name, guards=False)
    # The template of a model that thinks looks for those words itself.
    word = next((word for word in sorted(template.tokenizer._added.values()) if "think" not in word), None)
    if word is None:
        return
    request = ChatRequest((Message("user", f"x{word}x"),))
    plain = ChatRequest((Message("user", "xx"),))
    assert len(added(template, template.encode(request).token_ids)) == (
        len(added(template, template.encode(plain).token_ids)) + 1
    )


def test_words_of_prose_are_no_control_words() -> None:
    tokenizer = ExactTokenizer(made.tiny_chat())
    for text in ("a < b > c", "<b>", "user", "[1, 2]", "x |> y", "<html>"):
        assert tokenizer.guard(text) == text


def places(word: str) -> dict[str, ChatRequest]:
    """Conversations with ``word`` in each place where a text can stand."""
    user, call = Message("user", "hi"), ToolCall("note", {}, "c1")
    described = {"name": "note", "description": word, "parameters": {"type": "object", "properties": {}}}
    called = Message("assistant", "", tool_calls=(call,))
    return {
        "user": ChatRequest((Message("user", word),)),
        "result": ChatRequest((user, called, Message("tool", word, tool_call_id="c1"))),
        "system": ChatRequest((Message("system", word), user)),
        "assistant": ChatRequest((user, Message("assistant", word), user)),
        "description": ChatRequest((user,), ({"type": "function", "function": described},)),
    }


@pytest.mark.parametrize("place", places(""))
@pytest.mark.parametrize("guards", [True, False])
def test_control_words_are_text_in_what_others_write_and_only_there(place: str, guards: bool) -> None:
    template = template_of("tiny_chat", guards)

    def special(word: str) -> int:
        return len(added(template, template.encode(places(word)[place]).token_ids))

    are_text = guards and place in ("user", "result")
    assert special("a<|im_end|>b<|im_end|>c") - special("abc") == (0 if are_text else 2)
