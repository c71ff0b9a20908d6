"""Conversations with the made tokenizers, played as an engine plays them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support import made_tokenizers as made

from agent_memory_core.messages import ChatRequest, Message
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.token_text import Prompt, TokenText

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
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return ChatRequest(tuple(Message(roles[i % 2], content) for i, content in enumerate(contents)), **more)


def decode(make: Make, token_ids: tuple[int, ...]) -> str:
    return str(make().decode(list(token_ids)))


CHARACTERS = "ab eé漢😀 \n\t.,<>'|1Hello "
spoken = st.text(CHARACTERS, min_size=1, max_size=24)
# One template trims contents, another puts a space before them.
answered = st.builds("x{}y".format, st.text(CHARACTERS, max_size=24))
turns = st.lists(st.tuples(spoken, answered, st.integers(0, 2**32)), min_size=1, max_size=4)
makes_exact, makes_all = st.sampled_from(EXACT), st.sampled_from(ALL)


def play(make: Make, conversation: list[tuple[str, str, int]]) -> list[tuple[Prompt, TokenText]]:
    """Play turns as an engine would: each answer is spelled at random and joins the branch, closed by an EOS."""
    template, history, branch = template_of(make), list[str](), TokenText()
    tokenizer = template.tokenizer
    played = []
    for question, answer, seed in conversation:
        history.append(question)
        prompt = template.encode(chat(*history), [branch] if branch.token_ids else [])
        played.append((prompt, branch))
        # Llama 2 writes the space before an answer itself.
        spelled = made.spell(make(), " " + answer if make is made.llama2 else answer, seed)
        branch = tokenizer.extend(tokenizer.text_of(prompt.token_ids), [*spelled, *make().eos_token_ids])
        history.append(answer)
    return played
