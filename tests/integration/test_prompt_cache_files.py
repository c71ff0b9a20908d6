"""A session as a prompt cache of mlx-lm: its tokens are named, and mlx-lm goes on from it as the engine would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache
from support import engine_driver, families

from agent_memory_core import InvalidRequest, SessionNotFound, StoreError

Open = Callable[..., engine_driver.Driver]
TALK: engine_driver.History = [{"role": "user", "content": "A first question, and not a short one. " * 12}]


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba2"])
def test_a_cache_file_holds_what_its_tokens_give(
    open_driver: Open, tmp_path: Path, family: str, restarted: bool
) -> None:
    name = families.write(tmp_path / family, family)
    driver = open_driver(name, kv_bits=None)
    driver.turn(TALK, "one")
    if restarted:
        driver.memory.close()
        driver = open_driver(name, kv_bits=None)
    path = tmp_path / "one.safetensors"
    tokens = driver.memory.export_prompt_cache("one", path, metadata={"agent_id": "ada"})
    cache, said = load_prompt_cache(str(path), return_metadata=True)
    ids = json.loads(said["token_ids"])
    assert (said["agent_id"], said["model"], len(ids)) == ("ada", name, tokens)
    model: Any = families.loaded(family).model
    went_on = model(mx.array([[5]]), cache=cache)[0, -1]
    afresh = model(mx.array([[*ids, 5]]))[0, -1]
    assert mx.allclose(went_on, afresh, atol=1e-3).item()


def test_a_session_in_memory_only_can_be_written(open_driver: Open, llama: str, tmp_path: Path) -> None:
    driver = open_driver(llama, cache_dir=None)
    driver.turn(TALK, "one")
    assert driver.memory.export_prompt_cache("one", tmp_path / "one.safetensors") > 0


def test_what_cannot_be_written_is_named(open_driver: Open, llama: str, tmp_path: Path) -> None:
    driver = open_driver(llama)
    with pytest.raises(SessionNotFound, match="nobody"):
        driver.memory.export_prompt_cache("nobody", tmp_path / "x.safetensors")
    with pytest.raises(InvalidRequest, match="ends in"):
        driver.memory.export_prompt_cache("nobody", tmp_path / "x")
    driver.turn(TALK, "one")
    with pytest.raises(StoreError, match="cannot be written"):
        driver.memory.export_prompt_cache("one", tmp_path / "nowhere" / "x.safetensors")
