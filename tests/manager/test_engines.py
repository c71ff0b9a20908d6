"""Engines that a manager is given or gives: one engine for all who reach it, and whoever made it closes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent_memory_core import AgentMemory, InvalidSetting
from agent_memory_core.manager import ModelConfig, ModelManager, UnknownModel

Make = Callable[..., ModelManager]
HELLO = "Hello. " * 30


@pytest.fixture
def memory(models: dict[str, str], tmp_path: Path) -> Iterator[AgentMemory]:
    folder = tmp_path / "given"
    with AgentMemory(
        model=models["d"], cache_dir=folder, memory_budget_mb=9, min_free_mb=0, prefill_chunk=128
    ) as made:
        yield made


def test_an_engine_that_was_given_makes_room_and_comes_back_like_any_other(
    make: Make, memory: AgentMemory
) -> None:
    manager = make(limit=15, models={"a": {}})
    given = manager.add_engine(memory)
    assert (given.name, manager.engine(given.name)) == (memory.model_name, memory)
    first = given.chat(HELLO, session="s", max_tokens=4)
    assert manager.list_loaded_models() == [given.name]
    manager.get_model("a")
    assert (manager.list_loaded_models(), memory.weights_bytes) == (["a"], 0)
    # Also a turn that knows nothing of the manager.
    again = memory.chat(HELLO, "s", max_tokens=4)
    assert again.token_ids == first.token_ids
    assert manager.list_loaded_models() == [given.name]
    manager.shutdown()
    assert memory.weights_bytes > 0
    assert memory.chat(HELLO, max_tokens=2).token_ids


def test_a_model_is_removed_when_it_is_not_in_memory(make: Make, memory: AgentMemory) -> None:
    manager = make(models={"a": {}, "b": {"fallback": ["a"]}}, default_model="b")
    given = manager.add_engine(memory)
    with pytest.raises(InvalidSetting, match="another"):
        manager.add_engine(memory)
    given.chat(HELLO, max_tokens=2)
    with pytest.raises(InvalidSetting, match="unload it first"):
        manager.remove_model_config(given.name)
    for named in ("a", "b"):
        with pytest.raises(InvalidSetting, match=f"'{named}'"):
            manager.remove_model_config(named)
    assert manager.list_available_models() == ["a", "b", given.name]
    assert manager.unload_model(given.name)
    manager.remove_model_config(given.name)
    assert manager.list_available_models() == ["a", "b"]
    with pytest.raises(UnknownModel, match="removed"):
        given.generate(HELLO)
    with pytest.raises(UnknownModel):
        manager.remove_model_config(given.name)
    assert memory.chat(HELLO, max_tokens=2).token_ids, "it belongs to nobody now"
    assert given.name not in manager.get_memory_usage()["models"]


def test_only_models_on_mlx_have_an_engine(make: Make) -> None:
    manager = make(models={"a": {}})
    manager.add_model_config(ModelConfig(name="o", type="openai", path="gpt"))
    assert manager.engine("a") is AgentMemory.shared(**manager.settings_of(manager.get_model("a").config))
    with pytest.raises(InvalidSetting, match="mlx"):
        manager.engine("o")


def test_an_unload_waits_for_those_who_use_a_model_as_long_as_it_is_told_to(make: Make) -> None:
    manager = make()
    model = manager.get_model("a")
    stream = model.stream(HELLO, max_tokens=8)
    assert not manager.unload_model("a")
    assert not manager.unload_model("a", timeout=0.01)
    tokens = [token for delta in stream for token in delta.token_ids]
    assert len(tokens) == 8
    assert manager.unload_model("a", timeout=30)


async def test_coroutines_that_wait_for_one_model_hold_up_no_turn_of_another(make: Make) -> None:
    manager = make(limit=15, models={"a": {}, "b": {}})
    loaded, other = manager.engine("a"), manager.engine("b")
    with manager.get_model("a").lease():
        # More than there are threads for all coroutines together.
        waiting = [asyncio.ensure_future(other.achat(HELLO, max_tokens=2)) for _ in range(40)]
        await asyncio.sleep(0.05)
        assert (await loaded.achat(HELLO, max_tokens=2)).token_ids
        assert not any(turn.done() for turn in waiting)
        for turn in waiting[1:]:
            turn.cancel()
    assert (await waiting[0]).token_ids
    await asyncio.gather(*waiting, return_exceptions=True)
    assert manager.list_loaded_models() == ["b"]
    while manager.get_model_stats()["b"].leases:
        await asyncio.sleep(0.01)
    assert manager.unload_model("b")
