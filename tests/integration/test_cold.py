"""An agent goes on by its name on a machine that has never seen it, token for token and logit for logit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import command_line, engine_driver, families
from support.keys import KEY, give

from agent_memory_core import InvalidSetting, StoreError

Open = Callable[..., engine_driver.Driver]
TALK: engine_driver.History = [{"role": "user", "content": "A first question, and not a short one. " * 12}]


def asked_again(answer: engine_driver.Seen) -> engine_driver.History:
    return [*TALK, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "And now?"}]


@pytest.mark.parametrize(
    ("family", "encryption"), [("llama", "off"), ("llama", "env"), ("gemma3", "off"), ("qwen3_next", "off")]
)
def test_an_agent_moves_to_another_machine_by_its_name(
    open_driver: Open, tmp_path: Path, family: str, encryption: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, KEY)
    model = families.write(tmp_path / family, family)
    settings: dict[str, Any] = {
        "cold_url": (tmp_path / "bucket").as_uri(),
        "cold_ack": "remote",
        "encryption": encryption,
    }
    here = open_driver(model, cache_dir=tmp_path / "here", **settings)
    answer = here.turn(TALK, "ada")
    assert here.memory.cold.status().waiting == 0
    there = open_driver(model, cache_dir=tmp_path / "there", **settings)
    moved = there.turn(asked_again(answer), "ada")
    here.memory.close()
    stayed = open_driver(model, cache_dir=tmp_path / "here", encryption=encryption).turn(
        asked_again(answer), "ada"
    )
    assert moved == stayed
    assert moved.cache_read > 0
    assert there.memory.check().clean
    assert there.memory.cold.status().pulled == 1


async def test_it_moves_for_coroutines_too(open_driver: Open, llama: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cold_url": "memory://coroutines", "cold_ack": "remote"}
    here = open_driver(llama, cache_dir=tmp_path / "here", **settings).memory
    there = open_driver(llama, cache_dir=tmp_path / "there", **settings).memory
    first = await here.achat(TALK, "ada", max_tokens=2)
    assert first.report.persisted
    second = await there.achat(TALK, "ada", max_tokens=2)
    assert second.report.usage.cache_read > 0
    assert second.token_ids == first.token_ids


def test_a_fork_is_there_too(open_driver: Open, llama: str, tmp_path: Path) -> None:
    """It has had no turn of its own yet, and a machine that has neither session forks the one that it knows by name."""
    settings: dict[str, Any] = {"cold_url": "memory://forks", "cold_ack": "remote"}
    here = open_driver(llama, cache_dir=tmp_path / "here", **settings).memory
    first = here.chat(TALK, "ada", max_tokens=2)
    here.fork("ada", "bea")
    assert here.cold.flush(20.0)
    there = open_driver(llama, cache_dir=tmp_path / "there", **settings).memory
    there.fork("bea", "eve")
    found = there.chat(TALK, "eve", max_tokens=2)
    assert found.report.usage.cache_read > 0
    assert found.token_ids == first.token_ids


def test_a_bucket_that_is_gone_costs_no_answer(open_driver: Open, llama: str, tmp_path: Path) -> None:
    """The turn is on this machine's disk; whoever wants it elsewhere is told that it is not."""
    settings: dict[str, Any] = {"cold_url": "s3://bucket", "cold_timeout_seconds": 0.3}
    for ack in ("local", "remote"):
        memory = open_driver(llama, cache_dir=tmp_path / ack, cold_ack=ack, **settings).memory
        report = memory.chat(TALK, "ada", max_tokens=2).report
        assert report.persisted == (ack == "local")
        assert bool(report.save_error) == (ack == "remote")
        assert memory.chat(TALK, "ada", max_tokens=2).report.usage.cache_read > 0
        assert memory.sessions()[0].session_id == "ada"


def test_the_commands_push_pull_and_sweep(
    open_driver: Open, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = open_driver(llama, cache_dir=tmp_path / "here")
    answer = here.turn(TALK, "ada")
    here.memory.close()
    monkeypatch.setenv("AGENT_MEMORY_COLD_URL", (tmp_path / "bucket").as_uri())

    def run(*arguments: str, machine: str = "here") -> str:
        done = command_line.command("cold", *arguments, "--cache-dir", str(tmp_path / machine))
        return done.stdout

    assert "1 session in the object store" in run("push")
    assert json.loads(run("status", "--json"))["waiting"] == 0
    assert "waiting to be uploaded: 0 sessions" in run("status")
    assert "1 of 2 sessions had news" in run("pull", "ada", "nobody", machine="there")
    assert "could be deleted: 0 of the sessions and 0 of the records" in run("sweep", "--dry-run")
    swept = json.loads(run("sweep", "--json"))
    assert (swept["sessions"], swept["deleted"]) == (1, 0)
    there = open_driver(llama, cache_dir=tmp_path / "there")
    assert there.turn(asked_again(answer), "ada").cache_read > 0


def test_what_is_missing_is_named(open_driver: Open, llama: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="set cold_url"):
        _ = open_driver(llama).memory.cold
    with pytest.raises(InvalidSetting, match="cold_url='nowhere://x' cannot be used"):
        open_driver(llama, cache_dir=tmp_path / "other", cold_url="nowhere://x").turn(TALK, "ada")
