"""A live cache that is kept holds the bits that restoring its records would give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support import engine_driver, families, tiny_models
from support.cases import some_of

from agent_memory_core import EngineConfig
from agent_memory_core.blocks.live_caches import LiveCache
from agent_memory_core.blocks.match import Hit, Match

BLOCK = 64
KINDS: list[Any] = [None, "6/4", 4]


def opened(model: str, store: Path | None, bits: Any = "6/4", **more: Any) -> engine_driver.Driver:
    settings = {"block_tokens": BLOCK, "min_free_mb": 0, "memory_budget_mb": 64} | more
    return engine_driver.Driver(EngineConfig(model=model, cache_dir=store, kv_bits=bits, **settings))


@pytest.fixture(scope="module", params=some_of(["llama", "deepseek_v2"], ["llama"]))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {"llama": tiny_models.LLAMA, "deepseek_v2": tiny_models.DEEPSEEK_V2}[request.param]
    return tiny_models.write(tmp_path_factory.mktemp("models") / request.param, shape)


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, model: str, tmp_path: Path) -> Iterator[engine_driver.Driver]:
    driver = opened(model, tmp_path / "store", request.param)
    yield driver
    driver.memory.close()


def live_caches(driver: engine_driver.Driver) -> list[LiveCache]:
    return list(driver.engine(lambda engine: list(engine.pool.live._caches)))


def whole_match(engine: Any, live: LiveCache) -> Match:
    """The match of all that a live cache holds."""
    blocks = [Hit(name, BLOCK, engine.pool.get(name), False) for name in live.names]
    tail = engine.pool.get(live.tail) if live.tail is not None else None
    end = Hit(tail.hash, len(tail.tokens), tail, False, "tail") if tail is not None else None
    return Match(blocks, end)


def assert_is_as_restored(engine: Any, live: LiveCache) -> None:
    match = whole_match(engine, live)
    assert match.tokens == live.tokens
    restored = engine.blocks.restore(match, 1)
    for cache, other in zip(
        engine.blocks.layout.arrays(live.kv), engine.blocks.layout.arrays(restored), strict=True
    ):
        assert mx.array_equal(cache[:, :, : live.tokens], other[:, :, : live.tokens])
    assert sum(x.nbytes for x in engine.blocks.layout.arrays(live.kv)) <= live.nbytes


def talk(driver: engine_driver.Driver, history: engine_driver.History, count: int, session: str) -> None:
    for number in range(count):
        history.append({"role": "user", "content": f"Tell me {number} " + "1" * (30 + 17 * number)})
        said = driver.turn(history, session)
        history.append({"role": "assistant", "content": said.text})


def test_what_is_kept_after_each_turn_is_what_restoring_gives(driver: engine_driver.Driver) -> None:
    history: engine_driver.History = []
    for _ in range(6):
        talk(driver, history, 1, "a")
        (live,) = live_caches(driver)
        driver.engine(lambda engine, live=live: assert_is_as_restored(engine, live))
    driver.engine(lambda engine: engine.pool.check())


def test_the_next_turn_takes_the_cache_over_and_a_fork_takes_a_copy(driver: engine_driver.Driver) -> None:
    history: engine_driver.History = []
    talk(driver, history, 3, "a")
    (before,) = live_caches(driver)
    elsewhere = [*history[:-2], {"role": "user", "content": "Something else."}]
    forked = driver.turn(elsewhere, "b")
    assert forked.tier == "hot"
    assert before in live_caches(driver)
    driver.engine(lambda engine: assert_is_as_restored(engine, before))
    talk(driver, history, 1, "a")
    assert before not in live_caches(driver)
    assert len(live_caches(driver)) == 2
    for live in live_caches(driver):
        driver.engine(lambda engine, live=live: assert_is_as_restored(engine, live))


def test_a_fork_of_a_live_cache_answers_as_one_that_was_restored(model: str, tmp_path: Path) -> None:
    answers = []
    for evicts in (False, True):
        driver = opened(model, tmp_path / str(evicts))
        history: engine_driver.History = []
        talk(driver, history, 3, "a")
        if evicts:
            driver.evict()
        assert len(live_caches(driver)) == (0 if evicts else 1)
        elsewhere = [*history[:-2], {"role": "user", "content": "Something else."}]
        forked = driver.turn(elsewhere, "b")
        answers.append((forked.logits, forked.token_ids, forked.cache_read))
        driver.memory.close()
    assert answers[0] == answers[1]


def test_nothing_is_kept_where_the_budget_has_no_room_for_it(model: str) -> None:
    driver = opened(model, None, memory_budget_mb=1)
    talk(driver, [], 2, "a")
    driver.engine(lambda engine: engine.pool.check())
    assert all(live.nbytes <= 2**20 for live in live_caches(driver))
    driver.memory.close()


def test_forgetting_a_session_forgets_its_live_cache(driver: engine_driver.Driver) -> None:
    talk(driver, [], 2, "a")
    assert len(live_caches(driver)) == 1
    driver.memory.forget("a")
    assert live_caches(driver) == []


def test_a_turn_of_a_session_that_is_forgotten_meanwhile_leaves_none(model: str, tmp_path: Path) -> None:
    driver = opened(model, tmp_path / "store")
    with driver.memory.chat("Tell me all.", "a", stream=True, max_tokens=64) as answer:
        next(answer)
        driver.memory.forget("a")
        list(answer)
    assert live_caches(driver) == []
    driver.memory.close()


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_5"])
def test_layers_for_which_that_is_not_proven_go_on_restoring(tmp_path: Path, name: str) -> None:
    driver = opened(families.write(tmp_path / name, name), tmp_path / "store")
    talk(driver, [], 2, "a")
    assert live_caches(driver) == []
    driver.memory.close()
