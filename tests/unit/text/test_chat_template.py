"""Requests are rendered as the model's template writes them, and in plain messages where it cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support import made_tokenizers as made
from support.made_conversations import WEATHER, Make, chat, template_of

from agent_memory_core.errors import InvalidRequest
from agent_memory_core.messages import ChatRequest, Message, ToolCall
from agent_memory_core.text.chat_template import ChatTemplate


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


def test_a_template_that_refuses_is_quoted() -> None:
    template = ChatTemplate(made.byte_level("{{- raise_exception('I take nothing') -}}", []))
    with pytest.raises(InvalidRequest, match="I take nothing"):
        template.render(chat("Hi"))


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (ChatRequest(()), "messages is empty"),
        (chat("Hi", template_kwargs={"tokenize": True, "tools": []}), "may not hold tokenize, tools"),
        (chat("half a pair: \ud83d"), "not valid Unicode"),
    ],
)
def test_what_cannot_be_rendered_is_an_invalid_request(request_: ChatRequest, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        template_of(made.llama2).encode(request_)


def test_a_raw_prompt_is_its_text_after_the_bos_that_the_model_expects() -> None:
    for tokenizer in (made.tiny_chat(), made.llama3()):
        template = ChatTemplate(tokenizer)
        written = template.render(ChatRequest((Message("user", "Hello."),)))
        bos = tokenizer.bos_token if written.startswith(tokenizer.bos_token or "\0") else ""
        raw = ChatRequest((Message("user", written.removeprefix(bos)),), is_raw=True)
        assert template.render(raw) == written
        assert (
            template.encode(raw).token_ids
            == template.encode(ChatRequest((Message("user", "Hello."),))).token_ids
        )
