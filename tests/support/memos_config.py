"""Print the configurations of this package for MemOS, for `memos_check`, which runs where MemOS is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import agent_memory_core
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

if __name__ == "__main__":
    with ModelManager(ManagerConfig.model_validate({"models": MODELS})) as manager:
        made = {
            "huggingface": get_llm_for_memos("huggingface", FOLDER, manager=manager),
            "huggingface_singleton": get_llm_for_memos("huggingface_singleton", "tiny", manager=manager),
            "vllm": get_llm_for_memos("mlx", "served", manager=manager),
        }
    print(json.dumps(made))
