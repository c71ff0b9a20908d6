"""A long prompt whose turn never ends is kept: a retry goes on where it was, also in another process."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import families

from agent_memory_core import AgentMemory
from agent_memory_core.engine import committing

TEXT = "Ada has 12 boxes, and Tom has 7 of them. " * 120
KINDS = {"append": "llama", "window": "gemma3", "state": "mamba2"}

KILLED = """
import os, signal, sys
from agent_memory_core import AgentMemory
from agent_memory_core.engine import committing
from agent_memory_core.engine.events import TurnProgress
committing.KEEP_EVERY = committing.KEEP_STATE_EVERY = 256
memory = AgentMemory(model=sys.argv[1], cache_dir=sys.argv[2], min_free_mb=0, block_tokens=64, kv_bits=None,
                     prefill_chunk=128)

def watch(event):
    if isinstance(event, TurnProgress) and event.stop >= 800:
        memory._thread._engine.disk.flush()
        os.kill(os.getpid(), signal.SIGKILL)

memory.observe(watch)
memory.chat(sys.argv[3], "ada", max_tokens=4, temperature=0)
"""


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return families.write(tmp_path / "model", KINDS[request.param])


def memory_of(model: str, store: Path | None) -> AgentMemory:
    return AgentMemory(
        model=model, cache_dir=store, min_free_mb=0, block_tokens=64, kv_bits=None, prefill_chunk=128
    )


def killed(model: str, store: Path) -> None:
    command = [sys.executable, "-c", KILLED, model, str(store), TEXT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def answer(model: str) -> tuple[int, ...]:
    with memory_of(model, None) as memory:
        return memory.chat(TEXT, max_tokens=4, temperature=0).token_ids


def test_after_a_kill_in_the_middle_of_a_prompt_its_retry_goes_on(model: str, tmp_path: Path) -> None:
    killed(model, tmp_path / "store")
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    _forgotten(model, tmp_path / "copy")
    with memory_of(model, tmp_path / "store") as memory:
        assert memory.sessions() == []
        assert memory.check().clean
        result = memory.chat(TEXT, "ada", max_tokens=4, temperature=0)
        assert result.report.usage.cache_read >= 512
        assert result.report.miss_reason == "new"
        assert result.report.persisted
        assert memory.check().clean
    assert result.token_ids == answer(model)


def _forgotten(model: str, store: Path) -> None:
    assert list(store.glob("ns/*/*/*/*"))
    with memory_of(model, store) as memory:
        assert memory.forget("ada")
        assert not list(store.glob("ns/*/*/*/*"))
        assert memory.chat(TEXT, "ada", max_tokens=1).report.usage.cache_read == 0


def test_a_withdrawn_turn_goes_on_after_a_restart(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    with memory_of(model, store) as memory:
        stream = memory.chat(TEXT, "ada", stream=True, max_tokens=2000)
        next(stream)
        stream.close()
        memory._thread.call(lambda engine: None).result()
    with memory_of(model, store) as memory:
        result = memory.chat(TEXT, "ada", max_tokens=4, temperature=0)
        assert result.report.usage.cache_read >= 512
    assert result.token_ids == answer(model)


def test_what_belongs_to_nobody_is_not_kept(model: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with memory_of(model, store) as memory:
        with memory.chat(TEXT, stream=True, max_tokens=2000) as stream:
            next(stream)
        memory._thread.call(lambda engine: None).result()
    assert not list(store.glob("ns/*/*/*/*"))


def test_a_turn_that_ends_writes_each_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "KEEP_EVERY", 256)
    model, sizes = families.write(tmp_path / "model", "llama"), []
    for every in (256, 10**9):
        monkeypatch.setattr(committing, "KEEP_EVERY", every)
        with AgentMemory(
            model=model, cache_dir=tmp_path / str(every), min_free_mb=0, block_tokens=64, prefill_chunk=128
        ) as memory:
            assert memory.chat(TEXT, "ada", max_tokens=2).report.persisted
            assert memory.check().clean
            sizes.append((memory.stats().store.files, memory.stats().store.bytes))
    assert sizes[0] == sizes[1]
