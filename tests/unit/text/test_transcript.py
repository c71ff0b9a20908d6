"""A conversation is read back from its tokens as it was."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from support import made_tokenizers as made
from support.made_conversations import ALL, WEATHER, Make, template_of
from support.tool_templates import xml_tokenizers

from agent_memory_core.messages import ChatRequest, Message, ToolCall
from agent_memory_core.structured.tool_calls import model_parser
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.transcript import TranscriptReader

WORDS = st.sampled_from(["Hello", "my name is Ada.", "12:30", "a\nb", "é漢😀", "user", "<b>", "no: yes"])
TEXTS = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)


@cache
def reader_of(make: Make) -> tuple[TranscriptReader, ChatTemplate]:
    tokenizer, template = make(), template_of(make)
    return TranscriptReader(tokenizer, template, model_parser(tokenizer)), template


def plain(messages: tuple[Message, ...]) -> list[tuple[Any, ...]]:
    """What counts of messages. Templates may strip their texts and write no ids."""
    return [
        (m.role, m.content.strip(), [(call.name, dict(call.arguments)) for call in m.tool_calls])
        for m in messages
    ]


@pytest.mark.parametrize("make", [make for make in ALL if make not in (made.bare, made.untemplated)])
@given(st.one_of(st.just(""), TEXTS), st.lists(TEXTS, min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_messages_come_back(make: Make, system: str, texts: list[str]) -> None:
    reader, template = reader_of(make)
    talk = tuple(Message("user" if at % 2 == 0 else "assistant", text) for at, text in enumerate(texts))
    messages = (Message("system", system), *talk) if system else talk
    asks = talk[-1].role == "user"
    prompt = template.encode(ChatRequest(messages), generation_prompt=asks)
    found = reader.read(prompt.token_ids)
    assert found.text == template.tokenizer.text_of(prompt.token_ids).text
    back = found.messages[: len(messages)] if asks else found.messages
    if found.is_exact:
        assert plain(back) == plain(messages) or make is made.llama2, (
            "it puts the system message into the user's"
        )
        assert all(message.content == "" for message in found.messages[len(back) :])


@pytest.mark.parametrize("name", ["tiny_chat", "qwen3_coder", "glm47", "minimax_m2"])
def test_calls_and_results_come_back(name: str) -> None:
    tokenizer = made.tiny_chat() if name == "tiny_chat" else xml_tokenizers()[name]
    template = ChatTemplate(tokenizer)
    calls = (
        ToolCall("get_weather", {"city": "Rome"}, "c1"),
        ToolCall("get_weather", {"city": "Paris"}, "c2"),
    )
    messages = (
        Message("user", "How is the weather?"),
        Message("assistant", "", tool_calls=calls[:1]),
        Message("tool", "sunny", "get_weather", tool_call_id="c1"),
        Message("assistant", "It is sunny."),
        Message("user", "And now both?"),
        Message("assistant", "I look.", tool_calls=calls),
        Message("tool", "rain", "get_weather", tool_call_id="c1"),
        Message("tool", "fog", "get_weather", tool_call_id="c2"),
        Message("assistant", "Rain and fog."),
    )
    reader = TranscriptReader(tokenizer, template, model_parser(tokenizer))
    prompt = template.encode(ChatRequest(messages, (WEATHER,)), generation_prompt=False)
    found = reader.read(prompt.token_ids)
    talk = tuple(message for message in found.messages if message.role != "system")
    assert plain(talk) == plain(messages)
    results = [message for message in talk if message.role == "tool"]
    called = [call.id for message in talk for call in message.tool_calls]
    assert [message.tool_call_id for message in results] == called
    assert found.is_exact


@given(TEXTS, TEXTS)
@settings(max_examples=20, deadline=None)
def test_marks_that_are_only_spelled_separate_nothing(before: str, after: str) -> None:
    """Where the ids of a text are not those of special tokens, it is text."""
    reader, template = reader_of(made.tiny_chat)
    asked = Message("user", f"{before} MARK {after}")
    ids = list(template.encode(ChatRequest((asked,))).token_ids)
    spelled = [
        i
        for part in ("<|im_", "end|>\n<|im_", "start|>assistant\n")
        for i in template.tokenizer.tokenize(part)
    ]
    mark = template.tokenizer.tokenize(" MARK")
    at = next(i for i in range(len(ids)) if ids[i : i + len(mark)] == mark)
    ids[at : at + len(mark)] = spelled
    found = reader.read(ids)
    assert [message.role for message in found.messages if message.content][:1] == ["user"]
    assert found.messages[0] == replace(asked, content=found.messages[0].content)
    assert found.messages[0].content.endswith(after)
