"""Hundreds of agent runs leave no memory behind."""

from __future__ import annotations

import gc
import os
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from support import tiny_models

from langchain_agent_memory import ChatMLXPersistent
from langchain_agent_memory.langgraph import follow

RUNS, WARM_UP = 500, 100
# A run that kept its live cache, rounded up to 256 tokens, would add 256 KiB: 100 MiB in all.
ALLOWED_MIB = 40


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "sunny"


def resident_mib() -> float:
    """Resident memory of this process, once what can be freed is."""
    gc.collect()
    mx.clear_cache()
    said = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(said.stdout) / 1024


def run(chat: Any, saver: InMemorySaver, number: int) -> None:
    """One short thread: answered, streamed, or left in the middle; every other one is deleted with its session."""
    name = f"thread {number}"
    config: RunnableConfig = {"configurable": {"thread_id": name}}
    asked = {"messages": [HumanMessage(f"My number is {number * 7919}.")]}
    if number % 5:
        chat.invoke(asked, config)
    else:
        for _ in chat.stream(asked, config, stream_mode="messages"):
            if number % 2:
                break
    if number % 2:
        saver.delete_thread(name)
    else:
        InMemorySaver.delete_thread(saver, name)


@pytest.mark.heavy
def test_memory_is_flat_over_500_agent_runs(tmp_path: Path) -> None:
    model = tiny_models.write(tmp_path / "llama", tiny_models.LLAMA)
    llm = ChatMLXPersistent(
        model=model, cache_dir=tmp_path / "caches", memory_budget_mb=8, max_tokens=4, temperature=0
    )
    saver = follow(InMemorySaver(), llm.memory)
    chat = create_agent(llm, [get_weather], system_prompt="Be brief.", checkpointer=saver)
    seen = {}
    for number in range(1, RUNS + 1):
        run(chat, saver, number)
        if number in (WARM_UP, RUNS):
            seen[number] = resident_mib()
    stats = llm.memory.stats()
    assert len(llm.memory.sessions()) == RUNS // 2
    llm.memory.close()
    assert stats.waiting == stats.running == stats.memory.reserved_bytes == 0
    assert seen[RUNS] - seen[WARM_UP] < ALLOWED_MIB, seen
