"""Budgets hold: many more sessions than fit mean slower turns, never a refusal, a leak or a cap passed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from support import engine_driver, tiny_models
from support.engine_driver import History
from support.fixed_volume import FixedVolume

from agent_memory_core import ChatResult
from agent_memory_core.storage.record_files import RecordFiles

Open = Callable[..., engine_driver.Driver]
MIB = 2**20
SESSIONS = 15


def store_bytes(store: Path) -> int:
    return sum(
        path.stat().st_size for path in store.rglob("*") if path.is_file() and "catalog" not in path.name
    )


@pytest.mark.slow
def test_many_sessions_under_a_budget_that_holds_5(open_driver: Open, tmp_path: Path) -> None:
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


def fill(driver: engine_driver.Driver, name: str) -> bool:
    """One turn of a session of its own; whether it was saved."""
    return saved_in(driver.memory.chat([{"role": "user", "content": name * 150}], session=name, max_tokens=8))


def saved_in(result: ChatResult) -> bool:
    """Whether a turn, which has its answer, was saved."""
    assert result.token_ids
    return result.report.persisted


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of turns that were not saved."""
    return [text for text in caplog.messages if "turns are" in text or "could not be saved" in text]


def test_a_full_store_of_pinned_sessions_answers_without_saving(
    llama: str, open_driver: Open, caplog: pytest.LogCaptureFixture
) -> None:
    driver = open_driver(llama, disk_budget_mb=1)
    number = 0
    while fill(driver, f"{number:02d}"):
        driver.memory.pin(f"{number:02d}")
        number += 1
        assert number < 40
    assert [fill(driver, f"x{number}") for number in range(3)] == [False] * 3
    (warning,) = told(caplog)
    assert "unpin" in warning
    assert driver.memory.stats().unsaved_turns == 4
    driver.memory.pin("00", pinned=False)
    assert fill(driver, "y0")
    assert "saved again" in told(caplog)[1]


def test_a_volume_that_gives_nothing_back_never_costs_an_answer(
    llama: str, open_driver: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on APFS while snapshots hold what was deleted: the free space does not change."""
    volume = FixedVolume()
    volume.install(monkeypatch)
    driver = open_driver(llama, min_free_mb=64)
    assert all(fill(driver, f"a{number}") for number in range(6))
    volume.free = 62 * MIB
    talk: History = [{"role": "user", "content": "What is known?"}]
    saved = []
    for number in range(4):
        saved.append(fill(driver, f"b{number}"))
        result = driver.memory.chat(talk, session="talk", max_tokens=8)
        saved.append(saved_in(result))
        talk += [{"role": "assistant", "content": result.text}, {"role": "user", "content": f"And {number}?"}]
    assert saved == [True] + [False] * 7
    assert len(driver.memory.sessions()) >= 4, "the store did not empty itself"
    assert len(told(caplog)) == 1
    volume.free = 70 * MIB
    assert saved_in(driver.memory.chat(talk, session="talk", max_tokens=8))
    driver.evict()
    again = driver.memory.chat(talk, session="talk", max_tokens=8).report
    assert again.hit_tier == "warm", "the first turn that is saved saves what came before it, too"
    assert again.usage.cache_creation < 64


def test_a_volume_that_takes_no_file_at_all_still_lets_a_new_store_answer(
    llama: str, open_driver: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not even the note can be written that says of which model the blocks are."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    driver = open_driver(llama)
    with monkeypatch.context() as patch:
        patch.setattr(RecordFiles, "_write_tmp", refuse)
        assert not fill(driver, "a")
    assert fill(driver, "b")
    assert driver.memory.check().clean
    assert list((tmp_path / "store").glob("ns/*/identity.json"))
