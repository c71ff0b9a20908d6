"""Writes an agent as a prompt cache of the mlx-lm that is installed: `python prompt_cache_files.py FILE`.

``agent_of_mlx_lm_0_30_4.safetensors`` beside this file was written by it with mlx-lm 0.30.4.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import KVCache, save_prompt_cache

SAID = [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": "Hello, Ada."}]
WORDS = {
    "agent_id": "tech specialist",
    "agent_type": "technical",
    "system_prompt": "You are a technical specialist.",
    "model": "some/model",
    "cache_tokens": "19",
    "conversation_history": json.dumps(SAID),
}


def write(path: Path, words: dict[str, str] | None = None) -> None:
    """Write a cache of two layers and a few tokens."""
    cache = [KVCache() for _ in range(2)]
    for layer in cache:
        layer.update_and_fetch(mx.ones((1, 2, 19, 4)), mx.ones((1, 2, 19, 4)))
    save_prompt_cache(str(path), cache, WORDS if words is None else words)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
