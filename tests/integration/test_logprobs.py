"""Log-probabilities of an answer's tokens: the model's own, wherever the KV came from and whoever shares the batch."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk
from mlx_lm import load
from mlx_lm.generate import generate_step
from support import engine_driver, made_tokenizers as made

from agent_memory_core import (
    AgentMemory,
    ChatRequest,
    ChatResult,
    Message,
    SamplingParams,
    TokenLogprob,
)
from agent_memory_core.engine.sampling import likeliest
from agent_memory_core.text.detokenizer import token_bytes
from langchain_agent_memory import ChatMLXPersistent

Open = Callable[..., engine_driver.Driver]
ASK = [{"role": "user", "content": "Tell me " + "1" * 90}]
NEW = 8


def values(result: ChatResult) -> list[list[float]]:
    return [[entry.logprob, *(likely.logprob for likely in entry.top)] for entry in result.logprobs]


@pytest.mark.parametrize("max_batch_size", [1, 4])
def test_they_are_what_mlx_lm_reports(llama: str, open_driver: Open, max_batch_size: int) -> None:
    driver = open_driver(llama, kv_bits=None, max_batch_size=max_batch_size)
    result = driver.memory.chat(ASK, max_tokens=NEW, top_logprobs=3)
    model, *_ = load(llama)
    steps = list(generate_step(mx.array(driver.prompts[-1]), model, max_tokens=NEW))
    assert [token for token, _ in steps] == list(result.token_ids)
    for (token, expected), entry in zip(steps, result.logprobs, strict=True):
        assert entry.logprob == pytest.approx(expected[token].item(), abs=1e-4)
        best = sorted(expected.tolist(), reverse=True)[:3]
        assert [likely.logprob for likely in entry.top] == pytest.approx(best, abs=1e-4)
        assert entry.top[0].token == entry.token, "greedy"


def test_they_are_the_same_bits_hot_and_after_a_restart(
    llama: str, open_driver: Open, tmp_path: Path
) -> None:
    def second_turn(store: Path, *, restart: bool) -> ChatResult:
        memory = open_driver(llama, cache_dir=store).memory
        first = memory.chat(ASK, session="s", max_tokens=NEW)
        if restart:
            memory.close()
            memory = open_driver(llama, cache_dir=store).memory
        more = [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And 2?"}]
        return memory.chat([*ASK, *more], session="s", max_tokens=NEW, top_logprobs=5)

    hot = second_turn(tmp_path / "hot", restart=False)
    restarted = second_turn(tmp_path / "restarted", restart=True)
    assert (hot.report.hit_tier, restarted.report.hit_tier) == ("hot", "warm")
    assert hot.logprobs == restarted.logprobs
    assert len(hot.logprobs) == len(hot.token_ids) == NEW


def test_a_batch_changes_them_by_no_more_than_rounding(llama: str, open_driver: Open) -> None:
    memory = open_driver(llama, kv_bits=None).memory
    asks = [f"Count to {n}: " + str(n) * (5 + 9 * n) for n in range(6)]
    alone = [memory.chat(ask, max_tokens=NEW, top_logprobs=2) for ask in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda ask: memory.chat(ask, max_tokens=NEW, top_logprobs=2), asks))
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        for a, b in zip(values(one), values(other), strict=True):
            assert a == pytest.approx(b, abs=1e-3)


def test_who_does_not_ask_pays_nothing(
    llama: str, open_driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(logprobs: mx.array, token: int, count: int) -> list[tuple[int, float]]:
        calls.append(token)
        return likeliest(logprobs, token, count)

    monkeypatch.setattr("agent_memory_core.engine.model_runner.likeliest", counted)
    memory = open_driver(llama).memory
    with ThreadPoolExecutor(2) as pool:
        quiet = pool.submit(memory.chat, "Say one.", max_tokens=30)
        asking = pool.submit(memory.chat, "Say two.", max_tokens=30, logprobs=True)
    assert quiet.result().logprobs == ()
    assert calls == list(asking.result().token_ids)
    assert all(entry.top == () for entry in asking.result().logprobs)


def test_a_form_leaves_only_what_fits_it(llama: str, open_driver: Open) -> None:
    schema = {"type": "object", "properties": {"ok": {"const": "ünï ✓"}}, "required": ["ok"]}
    params = SamplingParams(top_logprobs=20)
    request = ChatRequest((Message("user", "Well?"),), sampling=params, response_schema=schema)
    result = open_driver(llama).memory.chat(request)
    assert json.loads(result.text) == {"ok": "ünï ✓"}
    assert b"".join(entry.raw for entry in result.logprobs) == result.text.encode()
    found = [entry.logprob for one in result.logprobs for entry in (one, *one.top)]
    assert all(-math.inf < logprob <= 0 for logprob in found)
    assert min(len(entry.top) for entry in result.logprobs) < 20


def test_bytes_of_a_token_that_is_no_whole_character() -> None:
    for tokenizer in (made.llama3(), made.metaspace()):
        ids = tokenizer.encode("a✓", add_special_tokens=False)[-3:]
        assert b"".join(token_bytes(tokenizer, i) for i in ids) == "✓".encode()


# In LangChain


@pytest.fixture(scope="module")
def llm() -> Iterator[ChatMLXPersistent]:
    model = ChatMLXPersistent(cache_dir=None, temperature=0, max_tokens=16)
    yield model
    model.memory.close()


QUESTION = "My name is Ada. What is my name?"


def content(message: AIMessage) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = message.response_metadata["logprobs"]["content"]
    return found


def merge(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0] + chunks[1:]
    assert isinstance(whole, AIMessageChunk)
    return whole


async def drain(model: Any) -> list[AIMessageChunk]:
    return [chunk async for chunk in model.astream(QUESTION)]


def test_a_message_has_them_in_the_form_of_openai(llm: ChatMLXPersistent) -> None:
    message = llm.invoke(QUESTION, logprobs=True, top_logprobs=2)
    assert message.usage_metadata is not None
    # The token that ends the answer is counted and has no text.
    assert len(content(message)) in (
        message.usage_metadata["output_tokens"],
        message.usage_metadata["output_tokens"] - 1,
    )
    for entry in content(message):
        assert set(entry) == {"token", "bytes", "logprob", "top_logprobs"}
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert [set(likely) for likely in entry["top_logprobs"]] == [{"token", "bytes", "logprob"}] * 2
    assert "".join(entry["token"] for entry in content(message)) == message.text
    json.dumps(message.response_metadata)
    assert "logprobs" not in llm.invoke(QUESTION).response_metadata


@pytest.mark.parametrize("output_version", [None, "v1"])
def test_streamed_pieces_have_their_own_and_merge_to_the_whole(
    llm: ChatMLXPersistent, output_version: str | None
) -> None:
    model = llm.model_copy(update={"output_version": output_version})
    asking = model.bind(logprobs=True, top_logprobs=2)
    message = asking.invoke(QUESTION)
    for chunks in (list(asking.stream(QUESTION)), asyncio.run(drain(asking))):
        for chunk in chunks:
            text = "".join(
                e["token"] for e in chunk.response_metadata.get("logprobs", {"content": []})["content"]
            )
            assert text == chunk.text
        whole = merge(chunks)
        assert content(whole) == content(message)
        assert whole.usage_metadata is not None
        assert message.usage_metadata is not None
        assert whole.usage_metadata["output_tokens"] == message.usage_metadata["output_tokens"]
        for name in ("model_name", "model_provider", "finish_reason"):
            assert whole.response_metadata[name] == message.response_metadata[name]


def test_the_model_and_then_the_call_say_whether(llm: ChatMLXPersistent) -> None:
    asking = llm.model_copy(update={"logprobs": True, "top_logprobs": 3})
    assert len(content(asking.invoke(QUESTION))[0]["top_logprobs"]) == 3
    assert len(content(asking.invoke(QUESTION, top_logprobs=1))[0]["top_logprobs"]) == 1
    assert "logprobs" not in asking.invoke(QUESTION, logprobs=False).response_metadata
    assert content(asyncio.run(llm.ainvoke(QUESTION, logprobs=True)))[0]["top_logprobs"] == []
    assert asking.memory is llm.memory


def test_calls_of_tools_have_them_too(llm: ChatMLXPersistent) -> None:
    tool = {"name": "add", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
    bound = llm.bind_tools([tool], tool_choice="add", logprobs=True, max_tokens=80)
    whole, message = merge(list(bound.stream("Add 3."))), bound.invoke("Add 3.")
    assert whole.tool_calls[0]["args"] == message.tool_calls[0]["args"]
    assert content(whole) == content(message)
    assert "add" in "".join(entry["token"] for entry in content(message))


def test_memory_streams_them_beside_the_tokens() -> None:
    with AgentMemory(cache_dir=None) as memory:
        for delta in memory.chat(QUESTION, stream=True, max_tokens=16, logprobs=True):
            assert len(delta.logprobs) == len(delta.token_ids)
            assert all(isinstance(entry, TokenLogprob) for entry in delta.logprobs)
