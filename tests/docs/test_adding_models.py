"""The guide to adding a model, followed to the letter: its commands in one shell, its example against the reader."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.layer_groups import Group

from agent_memory_core.models.cache_spec import cache_spec
from agent_memory_core.models.profile import _KNOWN, _OF_A_TYPE, read_profile

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "adding-models.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def model_command() -> str:
    """What the guide says to run if no model is at hand."""
    found = re.search(r"`(agent-memory models random [^`]+)`", GUIDE)
    assert found is not None
    return found[1]


@pytest.mark.heavy
def test_a_newcomer_gets_there_by_the_commands_alone(tmp_path: Path) -> None:
    shim = tmp_path / "bin" / "agent-memory"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m agent_memory_core.cli "$@"\n')
    shim.chmod(0o755)
    environ = {
        **os.environ, "HOME": str(tmp_path), "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "AGENT_MEMORY_MIN_FREE_MB": "0", "COLUMNS": "120",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([model_command(), *blocks("sh")])],
        env=environ, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    profile = read_profile(tmp_path / "models" / "profiles" / "my-model.toml")
    assert dict(profile.geometry) == {"n_layers": 3, "n_kv_heads": 2, "head_dim": 80}
    assert profile.sampling == {"temperature": 0.7}
    assert re.search(r"temperature\s+0.7\s+profile", done.stdout)
    assert re.search(r"global layers: head_dim\s+80\s+live caches", done.stdout)
    assert re.search(r"resumed and uninterrupted, at 8 boundaries\s+0\s+\S+\s+\S+\s+equal", done.stdout)
    assert "after 2 messages" in done.stderr
    assert "(warm)" in done.stderr
    assert "'try' was deleted" in done.stdout


def test_the_example_of_mixed_layers_is_true_of_such_a_model(tmp_path: Path) -> None:
    (example,) = blocks("toml")
    path = tmp_path / "example.toml"
    path.write_text(example)
    window = Group("window", tuple(range(12)), 1, 256, 256, window=512)
    spec = cache_spec([window, Group("append", (12, 13, 14), 1, 512, 512)], {"num_hidden_layers": 35})
    read_profile(path).check(spec)


def test_every_key_that_is_read_is_in_the_guide_and_no_other() -> None:
    table = GUIDE.split("## What a profile says")[1].split("\n\n")[1]
    named = set(re.findall(r"`(\w+)`", table)) - {"enable_thinking"}
    aliases = {"prefill_step_size", "chunked_prefill_max_chunk", "chunked_prefill_min_chunk", "layers"}
    assert named == set().union(*_KNOWN.values(), _OF_A_TYPE) - aliases
