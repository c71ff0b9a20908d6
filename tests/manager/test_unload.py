"""What a model took is the machine's again when it is unloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from agent_memory_core.testing import FAMILIES, random_model, save_model

LARGE = {**FAMILIES["llama"], "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 4096}

LOADS = """
import json, sys
from agent_memory_core.manager import ManagerConfig, ModelManager
model = {"name": "a", "type": "mlx", "path": sys.argv[1], "parameters": {"cache_dir": None, "max_tokens": 2}}
with ModelManager(ManagerConfig(models=[model])) as manager:
    for _ in range(int(sys.argv[2])):
        with manager.get_model("a").lease() as memory:
            weights = memory.weights_bytes / 2**20
            manager.get_model("a").generate("Hello.")
        assert manager.unload_model("a")
        print(json.dumps({"weights_mb": weights} | manager.get_memory_usage()), flush=True)
"""


def test_loads_and_unloads_leave_no_memory(tmp_path: Path) -> None:
    """In a process of its own, whose memory nobody else takes or gives back.

    The allocator of glibc gives each new thread a heap of its own, up to eight a core, and keeps what was freed there.
    That has an end and is not ours, so the process has one heap.
    """
    folder = save_model(tmp_path / "large", LARGE, random_model(LARGE))
    said = subprocess.run(
        [sys.executable, "-c", LOADS, str(folder), "3"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
        timeout=240,
    )
    first, *later = (json.loads(line) for line in said.stdout.splitlines())
    assert first["weights_mb"] > 40
    for usage in (first, *later):
        assert (usage["mlx_active_mb"], usage["mlx_cache_mb"], usage["total_mb"]) == (0, 0, 0), usage
    # Not the weights of even one load stay.
    assert later[-1]["process_rss_mb"] <= first["process_rss_mb"] + 20
