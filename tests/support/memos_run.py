"""Give configurations of this package to the real MemOS, in an environment of its own: make test-memos.

The argument is the Python where MemOS is. What it does there is in `memos_check`; the model that is served is here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support import http_server

import agent_memory_core
from agent_memory_core import AgentMemory, TurnFinished
from agent_memory_core.manager import ManagerConfig, ModelManager, get_llm_for_memos

FOLDER = str(Path(agent_memory_core.__file__).parent / "tiny_chat")
MODELS: list[dict[str, Any]] = [
    {
        "name": "tiny",
        "type": "huggingface",
        "path": FOLDER,
        "context_length": 4096,
        "parameters": {"temperature": 0.01, "max_tokens": 24, "do_sample": False},
    },
    {"name": "served", "type": "mlx", "path": "tiny-chat", "parameters": {"max_tokens": 24}},
]


def configurations(url: str) -> dict[str, dict[str, Any]]:
    """One configuration for each way in which MemOS keeps KV."""
    with ModelManager(ManagerConfig.model_validate({"models": MODELS})) as manager:
        return {
            "huggingface": get_llm_for_memos("huggingface", FOLDER, manager=manager),
            "huggingface_singleton": get_llm_for_memos("huggingface_singleton", "tiny", manager=manager),
            "vllm": get_llm_for_memos("mlx", "served", manager=manager, api_base=f"{url}/v1"),
        }


def check(python: str, memory: AgentMemory) -> None:
    """Run the check on a server, whose turns for MemOS must read what the turns before them left."""
    turns: list[Any] = []
    memory.observe(lambda event: turns.append(event.report) if isinstance(event, TurnFinished) else None)
    with http_server.serve(memory, model_alias="served") as server:
        made = json.dumps(configurations(server.url))
        program = Path(__file__).with_name("memos_check.py")
        subprocess.run([python, program], input=made, text=True, check=True)
    memory.flush()
    extracted, asked = turns
    assert asked.usage.cache_read >= extracted.usage.prompt_tokens - 8, asked
    (session,) = memory.sessions()
    assert session.session_id == "memos", session
    print(f"vllm: {asked.usage.cache_read} of {asked.usage.prompt_tokens} tokens were read from the store")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as store, AgentMemory(cache_dir=store, min_free_mb=0) as opened:
        check(sys.argv[1], opened)
