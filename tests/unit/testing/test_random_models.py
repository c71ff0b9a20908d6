"""The small models for users' own tests: they load, they run, and a seed says all of their weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_memory_core import AgentMemory, InvalidSetting
from agent_memory_core.testing import FAMILIES, write_random_model


@pytest.mark.model
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_and_remembers(family: str, tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "model", family)
    settings = {"model": str(folder), "cache_dir": tmp_path / "store", "min_free_mb": 0, "block_tokens": 64}
    prompt = "The same beginning. " * 40
    with AgentMemory(**settings) as memory:
        first = memory.chat(prompt, session="s", max_tokens=4)
    with AgentMemory(**settings) as memory:
        second = memory.chat(prompt, session="s", max_tokens=4)
    assert second.token_ids == first.token_ids
    assert second.report.usage.cache_read >= 64


def test_the_seed_says_all_of_the_weights(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        return (write_random_model(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()

    assert weights("a", 1) == weights("b", 1)
    assert weights("c", 2) != weights("b", 1)


def test_what_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"'gpt' is not known: choose from llama, olmo2, qwen3"):
        write_random_model(tmp_path, "gpt")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidSetting, match="cannot be written"):
        write_random_model(tmp_path / "file" / "model")
