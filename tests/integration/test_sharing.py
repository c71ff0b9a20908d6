"""Shared once, and walls where there must be walls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import engine_driver, tiny_models

from agent_memory_core import SessionKey
from agent_memory_core.blocks import block as blocks

Open = Callable[..., engine_driver.Driver]


def files(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in store.rglob("*.safetensors")}


def system_prompt(driver: engine_driver.Driver, tokens: int) -> dict[str, str]:
    """A system message that renders to ``tokens`` tokens: a digit is a token."""
    bare = driver.memory.count_tokens([{"role": "system", "content": ""}, {"role": "user", "content": "x"}])
    return {"role": "system", "content": "7" * (tokens - bare + 8)}


def test_a_new_session_with_a_known_system_prompt_computes_and_stores_only_its_own(
    llama: str, open_driver: Open, tmp_path: Path
) -> None:
    driver = open_driver(llama)
    system = system_prompt(driver, 1024)
    own = driver.memory.count_tokens([{"role": "user", "content": "I am agent number 1."}])
    driver.turn([system, {"role": "user", "content": "I am agent number 1."}], "one")
    before = files(tmp_path / "store")
    second = driver.turn([system, {"role": "user", "content": "I am agent number 2."}], "two")
    assert second.cache_read > 1000
    assert second.prompt_tokens - second.cache_read <= own
    new = {path: size for path, size in files(tmp_path / "store").items() if path not in before}
    assert not [path for path in new if "/blocks/" in str(path)], "no full block is written twice"
    assert sum(new.values()) < sum(before.values()) / 4
    shared = sum(files(tmp_path / "store").values())
    assert shared < sum(info.nbytes for info in driver.memory.sessions())


def test_the_cost_of_a_turn_does_not_grow_with_the_context(
    llama: str, open_driver: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = open_driver(llama)
    hashed = 0
    real = blocks.block_hash

    def counting(parent: bytes, tokens: Any) -> bytes:
        nonlocal hashed
        hashed += 1
        return real(parent, tokens)

    monkeypatch.setattr(blocks, "block_hash", counting)
    monkeypatch.setattr("agent_memory_core.blocks.chain.block_hash", counting)
    costs = {}
    for context in (512, 8192):
        session = f"s{context}"
        history: engine_driver.History = [
            system_prompt(driver, context),
            {"role": "user", "content": "Begin."},
        ]
        history.append({"role": "assistant", "content": driver.turn(history, session).text})
        spent = []
        for turn in range(4):
            known, before = hashed, files(tmp_path / "store")
            history.append({"role": "user", "content": str(turn) * 24})
            seen = driver.turn(history, session)
            history.append({"role": "assistant", "content": seen.text})
            assert seen.prompt_tokens - seen.cache_read < 40
            after = files(tmp_path / "store")
            written = sum(size for path, size in after.items() if path not in before)
            spent.append((written, hashed - known))
        costs[context] = [sum(column) for column in zip(*spent, strict=True)]
    for small, large in zip(costs[512], costs[8192], strict=True):
        assert large <= 1.2 * small + 1, costs


def test_models_of_equal_geometry_and_namespaces_never_share(
    llama: str, open_driver: Open, tmp_path: Path
) -> None:
    other = tiny_models.write(tmp_path / "other", tiny_models.LLAMA, seed=1)
    one, two = open_driver(llama), open_driver(other)
    history: engine_driver.History = [
        {"role": "user", "content": "The same long question for everybody. " * 8}
    ]
    first = one.turn(history, "s")
    second = two.turn(history, "s")
    assert (first.cache_read, second.cache_read) == (0, 0)
    assert first.token_ids != second.token_ids
    walled = one.turn(history, SessionKey("s", namespace="elsewhere"))
    assert walled.cache_read == 0
    assert walled.token_ids == first.token_ids
    report = two.memory.chat(history, session="s", max_tokens=2).report
    assert report.usage.cache_read > 0
    assert [i.session_id for i in one.memory.sessions("elsewhere")] == ["s"]
    assert one.memory.forget("s", "elsewhere")
    assert {i.namespace for i in one.memory.sessions()} == {"default"}


def test_another_model_under_the_same_session_is_told_as_such(
    llama: str, open_driver: Open, tmp_path: Path
) -> None:
    other = tiny_models.write(tmp_path / "other", tiny_models.LLAMA, seed=1)
    question = [{"role": "user", "content": "Who are you?"}]
    open_driver(llama).turn(question, "s")
    report = open_driver(other).memory.chat(question, session="s", max_tokens=2).report
    assert (report.usage.cache_read, report.miss_reason) == (0, "model_changed")


def test_anonymous_turns_share_in_memory_and_never_reach_the_disk(
    llama: str, open_driver: Open, tmp_path: Path
) -> None:
    driver = open_driver(llama)
    history: engine_driver.History = [{"role": "user", "content": "A long anonymous question. " * 10}]
    assert driver.turn(history, None).cache_read == 0
    assert driver.turn(history, None).cache_read == driver.memory.count_tokens(history) - 1
    assert not files(tmp_path / "store")
    owned = driver.turn(history, "now with an owner")
    assert owned.cache_read == owned.prompt_tokens - 1
    driver.evict()
    assert driver.turn(history, "now with an owner").tier == "warm", (
        "what an owner reused is now its own on disk"
    )


def test_an_ephemeral_turn_reads_and_owns_nothing(llama: str, open_driver: Open, tmp_path: Path) -> None:
    driver = open_driver(llama)
    history: engine_driver.History = [{"role": "user", "content": "A long question of a session. " * 10}]
    driver.turn(history, "s")
    before = files(tmp_path / "store")
    aside = [*history, {"role": "user", "content": "Summarise."}]
    report = driver.memory.chat(aside, session=SessionKey("s", ephemeral=True), max_tokens=4).report
    assert report.usage.cache_read > 64
    assert files(tmp_path / "store") == before
    assert driver.memory.sessions()[0].branches == 1
