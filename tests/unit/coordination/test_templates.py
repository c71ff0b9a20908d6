"""Every prompt that arises is accepted by templates that demand strict turns, and begins with the one before it."""

from __future__ import annotations

import random
from functools import cache

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support import made_tokenizers as made
from support.made_conversations import Make, template_of
from support.people import people

from agent_memory_core import ChatRequest, Message
from agent_memory_core.coordination import Draft, SessionSpec, ask, begin, tell

# As Gemma: no system role, which becomes a part of the first user message; anything but strict turns is an error.
GEMMA = (
    "{{- bos_token -}}{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content ~ '\\n\\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for m in rest -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate user/assistant') -}}{%- endif -%}"
    "{{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' -}}"
    "{{- (first if loop.first else '') ~ m.content | trim ~ '<end_of_turn>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)


@cache
def gemma() -> TokenizerWrapper:
    names = ("<bos>", "<start_of_turn>", "<end_of_turn>")
    return made.byte_level(GEMMA, made.special(*names), bos_token=names[0], eos_token=names[2])


MAKERS = [gemma, made.llama2, made.llama3, made.thinks, made.bare, made.tiny_chat]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_prompts_extend_each_other_as_a_template_writes_them(make: Make) -> None:
    template, rng = template_of(make), random.Random(1)
    book = begin(SessionSpec.of({"agents": people("ann", "bob", "cyd"), "initial_prompt": "A game."}))
    before: dict[str, str] = {}
    for number in range(30):
        agent = rng.choice(book.spec.agents)
        draft = Draft(book)
        if rng.random() < 0.4:
            draft.add("public", agent.agent_id, f"Word {number}.")
        else:
            asked = ask(book, agent)
            text = template.render(ChatRequest(asked.messages))
            assert text.startswith(before.get(agent.agent_id, ""))
            said = f"Answer {number}."
            after = (*asked.messages, Message("assistant", said), Message("user", "x"))
            whole = template.render(ChatRequest(after))
            before[agent.agent_id] = whole[: whole.rindex("x")].rstrip()[: len(text) + len(said)]
            tell(draft, asked, said)
        book = draft.done()
    assert len(before) == 3
