"""Answers of a model without preferences: each token is drawn at random from those that its grammar allows."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
from llguidance import LLMatcher
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agent_memory_core import ChatRequest, Delta, Message
from agent_memory_core.structured.grammar import Grammars
from agent_memory_core.structured.tool_calls import parser_for
from agent_memory_core.text.chat_template import ChatTemplate
from agent_memory_core.text.detokenizer import Detokenizer, starts_in_reasoning

ASK = (Message("user", "ask"),)


@cache
def template_of(tokenizer: TokenizerWrapper) -> ChatTemplate:
    return ChatTemplate(tokenizer)


@cache
def grammars_of(tokenizer: TokenizerWrapper) -> Grammars:
    return Grammars(tokenizer, template_of(tokenizer))


def allowed_by(matcher: LLMatcher, tokenizer: TokenizerWrapper) -> list[int]:
    """The tokens that may follow."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    tokens: list[int] = np.flatnonzero(bits[: len(tokenizer)]).tolist()
    return tokens


class Answer:
    """One answer. It begins with ``likes`` as far as the grammar allows it, and ends after ``most`` tokens."""

    def __init__(
        self, tokenizer: TokenizerWrapper, request: ChatRequest, seed: int, most: int = 400, likes: str = ""
    ) -> None:
        self.prompt = template_of(tokenizer).encode(request)
        self.tokenizer, self.request = tokenizer, request
        matcher = grammars_of(tokenizer).grammar(request, self.prompt.text).matcher.deep_copy()
        self.ids: list[int] = []
        self.ended = False
        rng = random.Random(seed)
        liked = tokenizer.encode(likes, add_special_tokens=False)
        while len(self.ids) < most:
            allowed = allowed_by(matcher, tokenizer)
            wanted = liked[len(self.ids)] if len(self.ids) < len(liked) else None
            token = wanted if wanted in allowed else rng.choice(allowed)
            if token in tokenizer.eos_token_ids:
                self.ended = True
                return
            assert matcher.consume_token(token)
            self.ids.append(token)

    @property
    def text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=False))

    def read(self) -> Delta:
        """The answer as the engine reads it."""
        reader = Detokenizer(
            self.tokenizer,
            calls=parser_for(self.tokenizer, self.request),
            in_reasoning=starts_in_reasoning(self.tokenizer, self.prompt.text),
        )
        parts = [*(reader.push(token) for token in self.ids), reader.finish()]
        return Delta(
            "".join(p.text for p in parts),
            "".join(p.reasoning for p in parts),
            tuple(call for p in parts for call in p.tool_calls),
            tuple(call for p in parts for call in p.invalid_tool_calls),
        )
