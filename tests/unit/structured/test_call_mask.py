"""A call is valid by construction also where its start delimiter is spelled in several tokens, in any way."""

from __future__ import annotations

import random
from functools import cache

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support.constrained_answers import ASK, grammars_of, template_of
from support.json_schemas import SCHEMAS, fits, tool
from support.tool_templates import xml_tokenizers

from agent_memory_core import ChatRequest, ToolCall
from agent_memory_core.structured.mask import SpelledCallMask
from agent_memory_core.text.detokenizer import Detokenizer

TOOLS = (tool("find", SCHEMAS["optional"]), tool("stop", SCHEMAS["nothing"]))
PARAMETERS = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}


@cache
def tokenizers() -> dict[str, TokenizerWrapper]:
    return xml_tokenizers()


def spelled(tokenizer: TokenizerWrapper, text: str, rng: random.Random) -> list[int]:
    """A text in tokens, cut at random places."""
    ids: list[int] = []
    while text:
        size = rng.randint(1, 6)
        ids += tokenizer.encode(text[:size], add_special_tokens=False)
        text = text[size:]
    return ids


def calls_of(
    tokenizer: TokenizerWrapper, begin: str, seed: int, *, ahead: bool
) -> tuple[list[ToolCall], SpelledCallMask]:
    """The calls of a model without preferences that begins its answer with ``begin``."""
    request = ChatRequest(ASK, TOOLS)
    prompt = template_of(tokenizer).encode(request)
    mask = grammars_of(tokenizer).call_mask(request, prompt)
    assert isinstance(mask, SpelledCallMask)
    rng = random.Random(seed)
    forced = spelled(tokenizer, begin, rng)
    ids: list[int] = []
    calls: list[ToolCall] = []
    reader = Detokenizer(tokenizer, calls=grammars_of(tokenizer).call_parser(request))
    for step in range(600):
        logits = mx.random.normal((1, len(tokenizer) + 3), key=mx.random.key(1000 * seed + step))
        chosen = mask(mx.array([*prompt.token_ids, *ids]), logits)
        token = forced[step] if step < len(forced) else int(mx.argmax(chosen).item())
        if ahead and ids:
            mask.accept(ids[-1], is_call=True)
        ids.append(token)
        if not ahead:
            mask.accept(token, is_call=True)
        delta = reader.push(token)
        assert delta.invalid_tool_calls == ()
        calls += delta.tool_calls
        if calls or (step > len(forced) and mask.held == 0):
            break
    return calls, mask


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", ["qwen3_coder", "glm47", "minimax_m2"])
def test_a_spelled_call_is_valid(name: str, ahead: bool) -> None:
    tokenizer = tokenizers()[name]
    start = grammars_of(tokenizer).call_parser(ChatRequest(ASK, TOOLS)).start  # type: ignore[union-attr]
    for seed in range(6):
        calls, mask = calls_of(tokenizer, f"1 < 2 <tool {start}", seed, ahead=ahead)
        assert (len(calls), mask.held) == (1, 1)
        assert fits(calls[0].arguments, PARAMETERS[calls[0].name])
        mask.end()
        assert mask.saved <= 1


def test_what_only_looks_like_a_delimiter_is_text() -> None:
    tokenizer = tokenizers()["qwen3_coder"]
    for seed in range(4):
        calls, mask = calls_of(tokenizer, "a < b, <tool> and <tool_cal", seed, ahead=False)
        assert (calls, mask.held) == ([], 0)
