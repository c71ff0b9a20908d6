"""A cache point is a place to resume from, in models that cannot be resumed after every token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from llama_index.core.base.llms.types import CachePoint, ChatMessage, TextBlock
from support import families
from support.cases import some_of

from agent_memory_core import AgentMemory, Message
from langchain_agent_memory import ChatMLXPersistent
from llama_index_agent_memory import MLXPersistentLLM

STABLE = "You are an assistant of the railway. You know all trains and their prices. " * 6
VOLATILE = ("It is Monday.", "It is raining today.")

Turn = Callable[[Path, str, str, bool], int]
"""One turn of a session of its own: its folder, the model, what follows the stable text; returns the reused tokens."""


@pytest.fixture(scope="module", params=some_of(["qwen3_next", "gpt_oss"], ["gpt_oss"]))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return families.write(tmp_path_factory.mktemp("models") / request.param, request.param)


def settings(folder: Path, model: str) -> dict[str, Any]:
    return {"model": model, "cache_dir": str(folder), "block_tokens": 64, "kv_bits": None, "min_free_mb": 0}


def core(folder: Path, model: str, volatile: str, marked: bool) -> int:
    points = (len(STABLE),) if marked else ()
    asked = [Message("system", STABLE + volatile, cache_points=points), Message("user", "Hello.")]
    with AgentMemory(**settings(folder, model)) as memory:
        return memory.chat(asked, volatile, max_tokens=2).report.usage.cache_read


def langchain(folder: Path, model: str, volatile: str, marked: bool) -> int:
    mark = {"cache_control": {"type": "ephemeral"}} if marked else {}
    system = SystemMessage([{"type": "text", "text": STABLE, **mark}, {"type": "text", "text": volatile}])
    llm = ChatMLXPersistent(**settings(folder, model), max_tokens=2)
    usage = llm.invoke([system, HumanMessage("Hello.")], session_id=volatile).usage_metadata
    assert usage is not None
    return usage["input_token_details"]["cache_read"]


def llama_index(folder: Path, model: str, volatile: str, marked: bool) -> int:
    mark = [CachePoint(cache_control={"type": "ephemeral"})] if marked else []
    blocks = [TextBlock(text=STABLE), *mark, TextBlock(text=volatile)]
    llm = MLXPersistentLLM(**settings(folder, model), max_tokens=2)
    asked = [ChatMessage(role="system", blocks=blocks), ChatMessage(role="user", content="Hello.")]
    raw: Any = llm.chat(asked, session_id=volatile).raw
    return int(raw["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("turn", [core, langchain, llama_index])
def test_the_text_before_a_cache_point_is_computed_once(turn: Turn, model: str, tmp_path: Path) -> None:
    reused = [
        [turn(tmp_path / str(marked), model, volatile, marked) for volatile in VOLATILE] for marked in (0, 1)
    ]
    assert [first for first, _ in reused] == [0, 0]
    with AgentMemory(model=model, cache_dir=None) as memory:
        stable = len(memory.encode(STABLE))
    without, with_point = (second for _, second in reused)
    assert with_point >= stable - 2
    assert without < with_point
