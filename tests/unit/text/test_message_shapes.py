"""Whatever roles follow each other, every message is rendered once, in its place, and the same in every turn."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given, settings, strategies as st
from support import made_tokenizers as made

from agent_memory_core import ChatRequest, InvalidRequest, Message, ToolCall
from agent_memory_core.text.chat_template import ChatTemplate

TEMPLATES = {
    "takes anything": made.CHATML,
    # As Gemma's: no system message, and roles have to take turns.
    "refuses systems": (
        "{%- for m in messages -%}{%- if m.role == 'system' -%}{{- raise_exception('System role not supported') -}}"
        "{%- endif -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{- raise_exception('Conversation roles must alternate') -}}{%- endif -%}"
        "{{- '<start_of_turn>' ~ m.role ~ '\\n' ~ m.content | trim ~ '<end_of_turn>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
    ),
    # As Llama 2's and many others: the first message may be a system message, the others are passed over.
    "reads the first system only": (
        "{%- if messages[0].role == 'system' -%}{{- '<<SYS>>' ~ messages[0].content ~ '<</SYS>>' -}}{%- endif -%}"
        "{%- for m in messages if m.role != 'system' -%}{{- '[' ~ m.role ~ ']' ~ m.content ~ '[/]' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '[assistant]' -}}{%- endif -%}"
    ),
    # As some of Mistral's: all system messages are put before the rest.
    "moves systems": (
        "{%- for m in messages if m.role == 'system' -%}{{- '[S]' ~ m.content ~ '[/S]' -}}{%- endfor -%}"
        "{%- for m in messages if m.role != 'system' -%}{{- '[' ~ m.role ~ ']' ~ m.content ~ '[/]' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '[assistant]' -}}{%- endif -%}"
    ),
    # Only the last of several answers is shown.
    "drops answers": (
        "{%- for m in messages -%}{%- if not (m.role == 'assistant' and loop.nextitem is defined and "
        "loop.nextitem.role == 'assistant') -%}{{- '[' ~ m.role ~ ']' ~ m.content ~ '[/]' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '[assistant]' -}}{%- endif -%}"
    ),
}


@cache
def template_of(name: str) -> ChatTemplate:
    return ChatTemplate(made.byte_level(TEMPLATES[name], made.special("<|im_start|>", "<|im_end|>")))


def words(text: str) -> list[str]:
    return re.findall(r"word\d+", text)


def conversation(roles: list[str]) -> list[Message]:
    return [Message(role, f"word{i}") for i, role in enumerate(roles)]


ROLES = st.lists(st.sampled_from(["user", "assistant", "system"]), min_size=1, max_size=9)


@pytest.mark.parametrize("name", TEMPLATES)
@given(roles=ROLES)
@settings(max_examples=40, deadline=None)
def test_every_message_is_rendered_once_and_in_its_place(name: str, roles: list[str]) -> None:
    # The first system messages are one: the adapters join them.
    leading = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    roles = ["system"] * min(leading, 1) + roles[leading:]
    text = template_of(name).render(ChatRequest(tuple(conversation(roles))))
    assert words(text) == [f"word{i}" for i in range(len(roles))]


@pytest.mark.parametrize("name", TEMPLATES)
@given(before=ROLES, after=ROLES)
@settings(max_examples=40, deadline=None)
def test_a_conversation_that_goes_on_begins_as_before(name: str, before: list[str], after: list[str]) -> None:
    leading = next((i for i, role in enumerate(before) if role != "system"), len(before))
    before = [*before[leading:], "user"]
    messages = conversation([*before, "assistant", "user", *after])
    first = template_of(name).render(ChatRequest(tuple(messages[: len(before)])), generation_prompt=False)
    # Up to what closes the last message, behind which a message of the same role may be joined to it.
    known = first[: first.rindex(f"word{len(before) - 1}")]
    assert template_of(name).render(ChatRequest(tuple(messages))).startswith(known)


def test_calls_of_messages_that_are_joined_stay() -> None:
    call = Message("assistant", "word1", tool_calls=(ToolCall("add", {"x": 1}, "1"),))
    asked = ChatRequest(
        (Message("user", "word0"), call, Message("assistant", "word2"), Message("user", "word3"))
    )
    for name in ("drops answers", "refuses systems"):
        text = template_of(name).render(asked)
        assert '"add"' in text
        assert words(text) == ["word0", "word1", "word2", "word3"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_continued_where_it_ends(name: str) -> None:
    begun = (Message("user", "word0"), Message("assistant", "word1 and "))
    text = template_of(name).render(ChatRequest(begun, continue_final_message=True))
    assert text.rstrip().endswith("word1 and")
    longer = template_of(name).render(ChatRequest((begun[0], Message("assistant", "word1 and more"))))
    assert longer.startswith(text.rstrip())


def test_what_a_template_does_not_write_cannot_be_continued() -> None:
    template = ChatTemplate(made.byte_level("{{- messages[0].content -}}", []))
    begun = (Message("user", "Hi"), Message("assistant", "Hello"))
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        template.render(ChatRequest(begun, continue_final_message=True))
