"""What a turn takes of memory stays below its budget and what `stats` states as working set."""

from __future__ import annotations

import threading
from pathlib import Path

import mlx.core as mx
import pytest
from support import families

from agent_memory_core import AgentMemory
from agent_memory_core.engine.events import Event


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v2", "mamba2", "qwen3_5", "gpt_oss"])
def test_several_turns_at_once_peak_below_what_is_stated(tmp_path: Path, name: str) -> None:
    model = families.write(tmp_path / name, name)
    with AgentMemory(model=model, cache_dir=None, prefill_chunk=512, memory_budget_mb=64) as memory:
        memory.chat("hello", max_tokens=1)
        engine = memory._thread._engine
        assert engine is not None
        stated: list[int] = []

        def watch(event: Event) -> None:
            now = engine.stats().memory
            stated.append(now.block_bytes + now.reserved_bytes + now.live_bytes + now.working_bytes)

        memory.observe(watch)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        texts = [letter * 900 for letter in "abc"]
        talks = [
            threading.Thread(target=lambda text=text: memory.chat(text, max_tokens=8, top_k=5))
            for text in texts
        ]
        for talk in talks:
            talk.start()
        for talk in talks:
            talk.join()
        assert mx.get_peak_memory() - before <= max(stated)
        idle = memory.stats().memory
        assert idle.working_bytes == 0
        assert idle.block_bytes + idle.live_bytes + idle.reserved_bytes <= idle.budget_bytes
