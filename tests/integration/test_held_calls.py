"""A model that may call tools writes valid calls only, and text that it writes stays what it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest
from support import engine_driver
from support.json_schemas import SCHEMAS, fits, tool

from agent_memory_core import AgentMemory, ChatRequest, ChatResult, Message, SamplingParams
from agent_memory_core.engine.model_runner import ModelRunner

Open = Callable[..., engine_driver.Driver]
TOOLS = (tool("add", SCHEMAS["array"]), tool("find", SCHEMAS["optional"]), tool("stop", SCHEMAS["nothing"]))
PARAMETERS = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}


def ask(text: str, seed: int = 1, new: int = 400, **wanted: Any) -> ChatRequest:
    sampling = SamplingParams(max_tokens=new, temperature=1.0, seed=seed)
    return ChatRequest((Message("user", text),), sampling=sampling, **wanted)


@pytest.fixture(scope="module")
def memory(llama: str) -> Iterator[AgentMemory]:
    with AgentMemory(model=llama, cache_dir=None, kv_bits=None, max_batch_size=4) as opened:
        yield opened


class Eager:
    """Makes the first token of an answer, and the one after a call, the start delimiter of a call."""

    def __init__(self, start_id: int, end_id: int, calls: int) -> None:
        self.start_id, self.end_id, self.calls = start_id, end_id, calls

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        known: list[int] = tokens.tolist()  # type: ignore[assignment]
        begun, ended = known.count(self.start_id), known.count(self.end_id)
        if begun - ended or begun >= self.calls:
            return logits
        return mx.where(mx.arange(logits.shape[-1]) == self.start_id, 1e4, logits)


def calls_eagerly(patch: pytest.MonkeyPatch, memory: AgentMemory, calls: int = 1) -> None:
    """Let a random model begin calls, as one that was trained for tools does."""
    memory.load()
    real = ModelRunner.slot
    start, end = memory.encode("<tool_call>")[0], memory.encode("</tool_call>")[0]

    def slot(
        self: ModelRunner, seq_id: int, sampling: SamplingParams, cache: list[Any], fed: int, processors: Any
    ) -> Any:
        return real(self, seq_id, sampling, cache, fed, [Eager(start, end, calls), *processors])

    patch.setattr(ModelRunner, "slot", slot)


@pytest.mark.parametrize("calls", [1, pytest.param(2, marks=pytest.mark.heavy)])
async def test_a_random_models_calls_are_valid_alone_and_in_a_batch(
    memory: AgentMemory, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    calls_eagerly(monkeypatch, memory, calls)
    before = memory.stats()
    requests = [ask("Do something.", seed, tools=TOOLS) for seed in range(3)]
    alone: list[ChatResult] = [memory.chat(request) for request in requests]
    together = await asyncio.gather(*(memory.achat(request) for request in requests))
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    for result in alone:
        whole = result.report.finish_reason != "length"
        assert len(result.tool_calls) >= whole
        assert whole is False or result.invalid_tool_calls == ()
        assert all(fits(call.arguments, PARAMETERS[call.name]) for call in result.tool_calls)
    after = memory.stats()
    assert after.calls_held - before.calls_held >= 6
    assert after.calls_saved - before.calls_saved >= 6, "a random model writes no call by itself"


def test_text_is_what_it_was(memory: AgentMemory) -> None:
    for seed in range(4):
        free = memory.chat(ask("Tell me a story.", seed, 40, tools=TOOLS, tool_choice="none"))
        may = memory.chat(ask("Tell me a story.", seed, 40, tools=TOOLS))
        same = [a == b for a, b in zip(free.token_ids, may.token_ids, strict=False)]
        assert all(same) or may.tool_calls or may.invalid_tool_calls


def test_a_trained_models_call_is_not_changed(open_driver: Open) -> None:
    weather = tool(
        "get_weather", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    )
    driver = open_driver("tiny-chat", cache_dir=None)
    asked = ChatRequest(
        (Message("user", "What is the weather in Paris?"),),
        (weather,),
        SamplingParams(max_tokens=60, temperature=0),
    )
    result = driver.memory.chat(asked)
    assert [(call.name, dict(call.arguments)) for call in result.tool_calls] == [
        ("get_weather", {"city": "Paris"})
    ]
    stats = driver.memory.stats()
    assert (stats.calls_held, stats.calls_saved) == (1, 0)


def test_a_call_of_a_tool_that_is_not_there_cannot_be_written(open_driver: Open) -> None:
    """tiny-chat would call the tool that its question is about."""
    clock = tool("clock", {"type": "object", "properties": {"zone": {"enum": ["utc"]}}, "required": ["zone"]})
    driver = open_driver("tiny-chat", cache_dir=None)
    for question in ("What is the weather in Paris?", "Add 4 and 9.", "What time is it?"):
        asked = ChatRequest(
            (Message("user", question),), (clock,), SamplingParams(max_tokens=60, temperature=0)
        )
        result = driver.memory.chat(asked)
        assert result.invalid_tool_calls == ()
        assert all((c.name, dict(c.arguments)) == ("clock", {"zone": "utc"}) for c in result.tool_calls)


def test_a_tool_that_cannot_be_written_leaves_the_model_free(memory: AgentMemory) -> None:
    unique = tool("bad", {"type": "object", "properties": {"xs": {"type": "array", "uniqueItems": True}}})
    held = memory.stats().calls_held
    memory.chat(ask("Do something.", new=20, tools=(*TOOLS, unique)))
    assert memory.stats().calls_held == held
