"""Budgets hold: many more sessions than fit mean slower turns, never a refusal, a leak or a cap passed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from support import engine_driver, tiny_models

from agent_memory_core import StoreFull

Open = Callable[..., engine_driver.Driver]
MIB = 2**20
SESSIONS = 50


def store_bytes(store: Path) -> int:
    return sum(
        path.stat().st_size for path in store.rglob("*") if path.is_file() and "catalog" not in path.name
    )


@pytest.mark.slow
def test_50_sessions_under_a_budget_that_holds_5(open_driver: Open, tmp_path: Path) -> None:
    wide = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 256}
    model = tiny_models.write(tmp_path / "wide", tiny_models.LLAMA | wide)
    driver = open_driver(model, memory_budget_mb=12, disk_budget_mb=20, kv_bits=None)
    driver.memory.load()
    mx.clear_cache()
    weights = driver.engine(lambda _: mx.get_active_memory())
    one = driver.turn([{"role": "user", "content": "7" * 100}], "probe")
    per_session = driver.memory.stats().memory.block_bytes
    assert one.prompt_tokens > 100
    assert 4 <= 12 * MIB / per_session <= 7, f"a session takes {per_session} bytes"
    active, on_disk = [], []
    for _ in range(3):
        for number in range(SESSIONS):
            question = [{"role": "user", "content": f"{number:03d}" + "7" * 97}]
            seen = driver.turn(question, f"s{number}")
            assert len(seen.token_ids) == 8
            if number % 5 == 0:
                active.append(driver.engine(lambda _: mx.get_active_memory()) - weights)
                on_disk.append(store_bytes(tmp_path / "store"))
    driver.engine(lambda engine: engine.scheduler.check())
    assert max(active) <= 12 * MIB
    assert max(on_disk) <= 20 * MIB
    rounds = [active[i : i + len(active) // 3] for i in range(0, len(active), len(active) // 3)]
    assert max(rounds[2]) <= 1.05 * max(rounds[0]), "memory does not grow from round to round"
    stats = driver.memory.stats()
    assert stats.memory.evicted > SESSIONS
    assert stats.store.bytes <= 20 * MIB
    assert stats.unsaved_turns == 0


def test_what_was_evicted_is_recomputed_and_told(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama, memory_budget_mb=8, disk_budget_mb=1)
    question = [{"role": "user", "content": "70" * 200}]
    first = driver.turn(question, "first")
    for number in range(12):
        driver.turn([{"role": "user", "content": f"{number}" * 400}], f"s{number}")
    driver.evict()
    report = driver.memory.chat(question, session="first", max_tokens=8).report
    assert (report.usage.cache_read < 8, report.miss_reason) == (True, "evicted")
    assert report.usage.prompt_tokens == first.prompt_tokens


def test_a_full_store_of_pinned_sessions_refuses_before_any_work(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama, disk_budget_mb=1)
    refused: StoreFull | None = None
    number = 0
    while refused is None and number < 40:
        try:
            driver.turn([{"role": "user", "content": f"{number:02d}" * 150}], f"s{number}")
            driver.memory.pin(f"s{number}")
            number += 1
        except StoreFull as error:
            refused = error
    assert refused is not None
    assert "disk" in str(refused)
    assert driver.memory.stats().turns == number, "the refused turn did no work"
    driver.memory.pin("s0", pinned=False)
    assert driver.turn([{"role": "user", "content": "99" * 150}], "after").token_ids
