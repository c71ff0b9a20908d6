"""An encrypted store gives the same tokens and logits, and keeps nothing that can be read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.engine_driver import Driver, Seen
from support.keys import KEY, OTHER_KEY, give, where

from agent_memory_core import AgentMemory, SessionKey
from agent_memory_core.blocks.block import pack_tokens
from agent_memory_core.errors import InvalidSetting, StoreUnreadable

CANARY = "The canary is called Marigold and sings at noon. "
Open = Callable[..., Driver]


@pytest.fixture(autouse=True)
def master(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, KEY)


def conversation(driver: Driver, folder: Path, reopen: Callable[[], Driver]) -> tuple[list[Seen], Driver]:
    """Three turns: cold, from memory, and after a restart."""
    history = [{"role": "user", "content": CANARY * 9}]
    seen: list[Seen] = []
    for question in ("Who sings?", "When?", ""):
        seen.append(driver.turn(history, SessionKey("s", lane="lane of Marigold")))
        history += [
            {"role": "assistant", "content": seen[-1].text},
            {"role": "user", "content": question},
        ]
        if question == "When?":
            driver.memory.close()
            driver = reopen()
    return seen, driver


@pytest.mark.parametrize("kv_bits", [None, "6/4"])
def test_tokens_and_logits_are_the_same_and_only_the_plain_store_can_be_read(
    llama: str, open_driver: Open, tmp_path: Path, kv_bits: Any
) -> None:
    found: dict[str, list[Seen]] = {}
    folders = {setting: tmp_path / setting for setting in ("off", "env")}
    for setting, folder in folders.items():

        def opened(setting: str = setting, folder: Path = folder) -> Driver:
            return open_driver(llama, cache_dir=folder, encryption=setting, kv_bits=kv_bits)

        found[setting], driver = conversation(opened(), folder, opened)
        history = driver.memory.history("s")
        assert history is not None
        history.write([{"role": "user", "content": CANARY}])
        driver.memory._thread.flush()
        # The log of the database is scanned too: the memory is open.
        assert (folder / "catalog.db-wal").stat().st_size
        tokens = driver.prompts[-1]
        for canary in (pack_tokens(tokens[8:40]), b"Marigold", b"lane of"):
            assert bool(where(folder, canary)) == (setting == "off"), canary
        assert driver.memory.check().clean
    assert found["off"] == found["env"]
    assert [seen.tier for seen in found["env"]] == ["none", "hot", "warm"]


def test_a_namespace_that_is_forgotten_is_computed_again_and_the_other_is_warm(
    open_driver: Open, llama: str, tmp_path: Path
) -> None:
    history = [{"role": "user", "content": CANARY * 9}]
    found: list[list[Seen]] = []
    for setting in ("off", "env"):
        settings: dict[str, Any] = {"cache_dir": tmp_path / setting, "encryption": setting}
        driver = open_driver(llama, **settings)
        keys = [SessionKey("s", namespace=name) for name in ("ada", "bob")]
        seen = [driver.turn(history, key) for key in keys]
        assert driver.memory.forget_namespace("ada") == 1
        driver.evict()
        seen += [driver.turn(history, key) for key in keys]
        driver.memory.close()
        restarted = open_driver(llama, **settings)
        found.append([*seen, *(restarted.turn(history, key) for key in keys)])
    assert found[0] == found[1]
    assert [seen.tier for seen in found[1]] == ["none", "none", "none", "warm", "warm", "warm"]


def test_a_namespace_whose_key_was_deleted_is_computed_again(
    open_driver: Open, llama: str, tmp_path: Path
) -> None:
    history = [{"role": "user", "content": CANARY * 9}]

    def turn() -> Seen:
        driver = open_driver(llama, encryption="env")
        seen = driver.turn(history, SessionKey("s", namespace="ada"))
        driver.memory.close()
        return seen

    first, warm = turn(), turn()
    for key in (tmp_path / "store" / "keys").glob("[0-9a-f]*.json"):
        key.unlink()
    assert (first.tier, warm.tier) == ("none", "warm")
    assert [turn(), turn()] == [first, warm]


@pytest.mark.parametrize(
    ("key", "error", "says"),
    [(OTHER_KEY, StoreUnreadable, "is not the key"), (None, InvalidSetting, "there is no key in")],
)
def test_without_the_right_key_no_work_is_begun(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    key: str | None,
    error: type[Exception],
    says: str,
) -> None:
    settings: dict[str, Any] = {"cache_dir": tmp_path / "store", "min_free_mb": 0, "encryption": "env"}
    with AgentMemory(**settings) as memory:
        assert memory.sessions() == []
    give(monkeypatch, key)
    # A model that cannot be loaded: the key is asked for before it.
    with AgentMemory(model=str(tmp_path / "no model"), **settings) as memory:
        for ask in (memory.sessions, lambda: memory.chat("Hello", "s")):
            with pytest.raises(error, match=rf"AGENT_MEMORY_KEY.*|{says}") as raised:
                ask()
            assert says in str(raised.value)
            assert "AGENT_MEMORY_KEY" in str(raised.value)


def test_the_command_line_says_in_one_sentence_that_a_key_is_wrong(tmp_path: Path) -> None:
    environ = {"AGENT_MEMORY_CACHE_DIR": str(tmp_path / "store"), "AGENT_MEMORY_ENCRYPTION": "env"}

    def run(key: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agent_memory_core.cli", "check"],
            env={**os.environ, **environ, "AGENT_MEMORY_KEY": key},
            capture_output=True,
            text=True,
            check=False,
        )

    assert run(KEY).returncode == 0
    wrong = run(OTHER_KEY)
    assert wrong.returncode == 1
    assert "AGENT_MEMORY_KEY is not the key" in " ".join(wrong.stderr.split())
    assert "Traceback" not in wrong.stderr
    assert OTHER_KEY not in wrong.stderr + wrong.stdout
