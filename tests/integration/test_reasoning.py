"""A model that thinks, in LangChain: thoughts apart from the text, over every route, and a next turn that is warm."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from support import made_tokenizers as made, tiny_models

from agent_memory_core import ChatRequest, Message, SamplingParams
from langchain_agent_memory import ChatMLXPersistent

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random llama with a tokenizer that knows think tags, and a template that opens a thought in each answer."""
    path = tmp_path_factory.mktemp("models") / "thinking"
    tokenizer = made.thinks()
    (eos,) = tokenizer.eos_token_ids
    config = tiny_models.LLAMA | {"vocab_size": len(tokenizer), "eos_token_id": eos}
    tiny_models.write(path, config, seed=3)
    tokenizer._tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[ChatMLXPersistent]:
    model = ChatMLXPersistent(
        model=folder, cache_dir=None, temperature=1, max_tokens=400, memory_budget_mb=64, kv_bits=None
    )
    yield model
    model.memory.close()


GOOD = 27
"""A seed with which the model thinks and then speaks here. On another machine its answers may differ."""


def thought(message: BaseMessage) -> str:
    return "".join(b["reasoning"] for b in message.content_blocks if b["type"] == "reasoning")


@pytest.fixture(scope="module")
def thoughtful(llm: ChatMLXPersistent) -> ChatMLXPersistent:
    """With a seed whose answer is a thought and a text: a random model ends a thought by chance."""
    for seed in (GOOD, *range(200)):
        model = llm.model_copy(update={"seed": seed})
        message = model.invoke(ASK)
        delimiters = [
            delimiter
            for delimiter in ("think>", "tool_call>", "<|im")
            if delimiter in message.text + thought(message)
        ]
        if len(message.text.strip()) > 100 and thought(message) and not delimiters:
            return model
    raise AssertionError("one of 200 random answers ends its thought once")


ASK = "What do you think of " + "1" * 60 + "?"


def merge(chunks: Sequence[Any]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole, AIMessageChunk)
    return whole


async def test_every_route_splits_the_thought_from_the_text_alike(thoughtful: ChatMLXPersistent) -> None:
    message = thoughtful.invoke(ASK)
    assert message.usage_metadata is not None
    counted = message.usage_metadata["output_token_details"]["reasoning"]
    assert 0 < counted < message.usage_metadata["output_tokens"]
    assert "think>" not in message.text + thought(message)
    assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]
    in_blocks = thoughtful.model_copy(update={"output_version": "v1"})
    events = [event async for event in thoughtful.astream_events(ASK, version="v2")]
    routes: dict[str, Any] = {
        "ainvoke": await thoughtful.ainvoke(ASK),
        "stream": merge(list(thoughtful.stream(ASK))),
        "astream": merge([chunk async for chunk in thoughtful.astream(ASK)]),
        "blocks": in_blocks.invoke(ASK),
        "blocks, streamed": merge(list(in_blocks.stream(ASK))),
        "events of version 2": merge(
            [event["data"]["chunk"] for event in events if event["event"] == "on_chat_model_stream"]
        ),
        "end of those events": events[-1]["data"]["output"],
    }
    for route, found in routes.items():
        assert (found.text, thought(found)) == (message.text, thought(message)), route
        assert found.usage_metadata["output_token_details"]["reasoning"] == counted, route
        assert found.response_metadata["model_provider"] == "mlx", route
    assert [block["type"] for block in routes["blocks"].content] == ["reasoning", "text"]


async def test_events_of_version_3_tell_thought_and_text_apart(thoughtful: ChatMLXPersistent) -> None:
    message = thoughtful.invoke(ASK)
    stream = thoughtful.stream_events(ASK, version="v3")
    assert "".join(stream.text) == message.text
    assert "".join(stream.reasoning) == thought(message)
    output = stream.output
    assert isinstance(output, AIMessage)
    assert output.usage_metadata is not None
    assert message.usage_metadata is not None
    assert output.usage_metadata["total_tokens"] == message.usage_metadata["total_tokens"]
    later = await thoughtful.astream_events(ASK, version="v3")
    assert "".join([part async for part in later.text]) == message.text


def _details(message: AIMessage) -> Any:
    assert message.usage_metadata is not None
    return message.usage_metadata["input_token_details"]


@pytest.mark.parametrize("prewarm", ["off", "idle"])
def test_a_stripped_thought_costs_the_next_turn_nothing_where_there_was_time(
    folder: str, thoughtful: ChatMLXPersistent, tmp_path: Path, prewarm: str
) -> None:
    llm = ChatMLXPersistent(
        model=folder,
        cache_dir=tmp_path,
        temperature=1,
        seed=thoughtful.seed,
        max_tokens=400,
        memory_budget_mb=64,
        kv_bits=None,
        prewarm=prewarm,
    )
    config: RunnableConfig = {"configurable": {"thread_id": "T"}}
    history: list[BaseMessage] = [HumanMessage(ASK)]
    first = llm.invoke(history, config)
    deadline = time.monotonic() + 30
    while prewarm == "idle" and llm.memory.stats().background_prefills < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    history += [first, HumanMessage("Why?")]
    second = llm.invoke(history, config)
    answer = llm.get_num_tokens(first.text)
    computed = _details(second)["cache_creation"]
    new = llm.get_num_tokens_from_messages([HumanMessage("Why?")])
    if prewarm == "idle":
        assert computed <= new + 1
        assert second.response_metadata["miss_reason"] == ""
    else:
        assert computed > new + answer - 10
    llm.memory.close()


def test_a_budget_bounds_the_thought_and_an_answer_follows_it(llm: ChatMLXPersistent) -> None:
    ask = ChatRequest((Message("user", ASK),), sampling=SamplingParams(temperature=1, max_tokens=40, seed=1))
    free = llm.memory.chat(ask)
    bounded = llm.memory.chat(replace(ask, thinking_budget=12))
    assert free.report.usage.reasoning_tokens > 12, "else the budget bounds nothing"
    # The thought is what it would have been, up to its budget.
    assert bounded.token_ids[:12] == free.token_ids[:12]
    assert llm.memory.decode(bounded.token_ids[12:13]) == "</think>"
    assert 0 < bounded.report.usage.reasoning_tokens <= 12
    assert bounded.text
