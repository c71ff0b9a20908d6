"""A mask leaves exactly the tokens that its grammar allows."""

from __future__ import annotations

import mlx.core as mx
import pytest
from support import made_tokenizers as made
from support.constrained_answers import ASK, Answer, allowed_by, grammars_of
from support.json_schemas import SCHEMAS

from agent_memory_core import ChatRequest
from agent_memory_core.structured.mask import Ban, LogitsProcessor

BEYOND = 50
"""Models often have more logits than their tokenizer has tokens."""


def left_by(processor: LogitsProcessor, ids: list[int]) -> list[int]:
    logits = processor(mx.array(ids), mx.zeros((1, len(made.tiny_chat()) + BEYOND)))
    values: list[float] = logits[0].tolist()  # type: ignore[assignment]
    assert set(values) <= {0, -float("inf")}
    return [token for token, value in enumerate(values) if value == 0]


@pytest.mark.parametrize("name", ["nested", "ünï"])
def test_a_mask_leaves_what_its_grammar_allows_and_always_something(name: str) -> None:
    answer = Answer(made.tiny_chat(), ChatRequest(ASK, response_schema=SCHEMAS[name]), 2)
    grammar = grammars_of(made.tiny_chat()).grammar(answer.request, answer.prompt.text)
    prompt = list(answer.prompt.token_ids)
    mask, matcher = grammar.mask(len(prompt)), grammar.matcher.deep_copy()
    for at, token in enumerate(answer.ids):
        allowed = left_by(mask, [*prompt, *answer.ids[:at]])
        # Where the next characters are certain, only the tokenizer's own spelling of them is left.
        assert allowed
        assert allowed == allowed_by(matcher, made.tiny_chat())
        assert all(matcher.validate_tokens([i]) for i in allowed)
        assert matcher.consume_token(token)


def test_a_token_is_read_once_and_a_complete_answer_ends() -> None:
    answer = Answer(made.tiny_chat(), ChatRequest(ASK, response_schema=SCHEMAS["string"]), 3)
    mask = grammars_of(made.tiny_chat()).grammar(answer.request, answer.prompt.text).mask(0)
    (eos,) = answer.tokenizer.eos_token_ids
    for _ in range(2):
        assert left_by(mask, answer.ids) == [eos]
    assert left_by(mask, [*answer.ids, eos, eos]) == [eos], "a batch asks one step after the end"


def test_a_ban_makes_one_token_impossible() -> None:
    everything = range(len(made.tiny_chat()) + BEYOND)
    assert left_by(Ban(7), [1, 2]) == [token for token in everything if token != 7]
