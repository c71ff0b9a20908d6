"""Every failure a caller can cause is a named error, before any work, and nothing is lost by it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support import engine_driver, tiny_models

from agent_memory_core import (
    AgentMemory,
    AgentMemoryError,
    ChatRequest,
    EngineStopped,
    InvalidRequest,
    InvalidSetting,
    Message,
    ModelError,
    ModelNotFound,
    PromptTooLong,
    SamplingParams,
    SessionKey,
    SessionNotFound,
    StoreUnreadable,
)

Open = Callable[..., engine_driver.Driver]
HELLO: list[dict[str, str]] = [{"role": "user", "content": "Hello."}]


@pytest.mark.parametrize(
    "model", ["no-such-model", "./no/such/folder", "/nowhere/at/all", "nobody/nothing-at-all"]
)
def test_an_unknown_model_is_named(model: str) -> None:
    with (
        AgentMemory(model=model, cache_dir=None) as memory,
        pytest.raises(ModelNotFound, match=model.split("/")[-1]),
    ):
        memory.chat(HELLO)


def test_folders_that_are_no_models_are_named(tmp_path: Path, llama: str) -> None:
    with (
        AgentMemory(model=str(tmp_path), cache_dir=None) as memory,
        pytest.raises(ModelNotFound, match=r"config\.json"),
    ):
        memory.chat(HELLO)
    broken = tmp_path / "broken"
    tiny_models.write(broken, tiny_models.LLAMA)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "no_such_architecture"}))
    with (
        AgentMemory(model=str(broken), cache_dir=None) as memory,
        pytest.raises(ModelError, match="no_such_architecture"),
    ):
        memory.chat(HELLO)
    memory = AgentMemory(model=llama, adapter_path="/no/adapter", cache_dir=None)
    with pytest.raises(ModelNotFound, match="adapter"):
        memory.chat(HELLO)


def test_prompts_that_can_never_fit_are_refused_and_the_session_stays(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama, context_length=300, memory_budget_mb=1, kv_bits=None)
    hello = [{"role": "user", "content": "Hello. " * 30}]
    first = driver.turn(hello, "s")
    with pytest.raises(PromptTooLong, match="300"):
        driver.turn([{"role": "user", "content": "7" * 400}], "s")
    small = open_driver(llama, memory_budget_mb=1)
    with pytest.raises(PromptTooLong, match="memory_budget_mb"):
        small.turn([{"role": "user", "content": "7" * 2000}], "s")
    again = driver.turn(hello, "s")
    assert (again.token_ids, again.cache_read >= 64) == (first.token_ids, True)
    cut = driver.memory.chat([{"role": "user", "content": "7" * 280}], session="s", max_tokens=500)
    assert cut.report.usage.total_tokens == 300, "an answer ends where the context does"


@pytest.mark.parametrize("session", ["", "a\nb", "x" * 513, "null\0"])
def test_bad_session_ids_are_refused_before_the_model_is_loaded(session: str) -> None:
    memory = AgentMemory(model="no-such-model", cache_dir=None)
    with pytest.raises(InvalidRequest, match="session"):
        memory.chat(HELLO, session=session)


@pytest.mark.parametrize("session", ["user:1", "../../etc/passwd", "ünï çødé 你好", "a" * 512])
def test_any_other_id_is_only_a_name(session: str, llama: str, open_driver: Open) -> None:
    driver = open_driver(llama)
    driver.turn(HELLO, session)
    assert [info.session_id for info in driver.memory.sessions()] == [session]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -1), ("min_p", 2), ("max_tokens", 0),
     ("repetition_penalty", 0), ("seed", -1), ("stop", ("",)), ("temperature", float("nan"))],
)  # fmt: skip
def test_invalid_sampling_values_are_refused_by_name(name: str, value: Any) -> None:
    memory = AgentMemory(model="no-such-model", cache_dir=None)
    with pytest.raises(InvalidRequest, match=name):
        memory.chat(HELLO, **{name: value})


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "x", "colour": "red"}],
    ],
)
def test_messages_that_are_none_are_refused(messages: Any) -> None:
    memory = AgentMemory(model="no-such-model", cache_dir=None)
    with pytest.raises(InvalidRequest):
        memory.chat(messages)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(InvalidSetting, match="kv_bit"):
        AgentMemory(kv_bit=4)
    with pytest.raises(InvalidSetting, match="kv_bits"):
        AgentMemory(kv_bits=3)
    with pytest.raises(InvalidRequest, match="temprature"):
        AgentMemory(model="no-such-model").chat(ChatRequest((Message("user", "x"),)), temprature=1)


def test_a_store_that_cannot_be_used_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    taken = tmp_path / "a-file"
    taken.write_text("not a directory")
    memory = AgentMemory(model="no-such-model", cache_dir=taken)
    with pytest.raises(StoreUnreadable, match="a-file"):
        memory.chat(HELLO, session="s")
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o777)
    open_to_all.chmod(0o777)
    memory = AgentMemory(model="no-such-model", cache_dir=open_to_all)
    with pytest.raises(StoreUnreadable, match="chmod"):
        memory.chat(HELLO, session="s")


def test_sessions_that_are_not_there_are_named(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama)
    driver.turn(HELLO, "s")
    with pytest.raises(SessionNotFound, match="ghost"):
        driver.memory.pin("ghost")
    with pytest.raises(SessionNotFound, match="ghost"):
        driver.memory.fork("ghost", "new")
    assert not driver.memory.forget("ghost")


def test_a_closed_memory_says_so_and_turns_in_flight_are_told(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama)
    stream = driver.memory.chat(HELLO, session="s", stream=True, max_tokens=2000)
    next(stream)
    driver.memory.close()
    with pytest.raises(EngineStopped):
        list(stream)
    memory = driver.memory
    for call in (
        lambda: memory.chat(HELLO),
        memory.sessions,
        memory.stats,
        memory.check,
        lambda: memory.branches("s"),
        lambda: memory.fork("s", "t"),
        lambda: memory.pin("s"),
        lambda: memory.forget("s"),
        lambda: memory.count_tokens(HELLO),
    ):
        with pytest.raises(EngineStopped, match="closed"):
            call()


def test_leaving_a_stream_early_cancels_its_turn(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama)
    with driver.memory.chat(HELLO, session="s", stream=True, max_tokens=4000) as stream:
        next(stream)
    driver.turn(HELLO, "t")
    stats = driver.memory.stats()
    assert (stats.cancelled, stats.running, stats.memory.reserved_bytes) == (1, 0, 0)
    assert [info.session_id for info in driver.memory.sessions()] == ["t"]


async def test_cancelling_a_task_cancels_its_turn(llama: str, open_driver: Open) -> None:
    driver = open_driver(llama)
    task = asyncio.create_task(driver.memory.achat(HELLO, session="s", max_tokens=4000))
    while not driver.memory.stats().running:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await driver.memory.achat(HELLO, session="t", max_tokens=2)).token_ids
    assert driver.memory.stats().cancelled == 1


def test_damage_on_disk_costs_time_and_is_told(llama: str, open_driver: Open, tmp_path: Path) -> None:
    driver = open_driver(llama)
    question = [{"role": "user", "content": "7" * 300}]
    first = driver.turn(question, "s")
    path = sorted((tmp_path / "store").rglob("blocks/*/*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    driver.evict()
    result = driver.memory.chat(question, session="s", max_tokens=8)
    assert result.report.miss_reason == "damaged"
    assert result.report.usage.cache_read < first.prompt_tokens - 64
    assert driver.memory.stats().store.quarantined == 1


def test_an_exhausted_row_of_the_tree_is_one_tree() -> None:
    assert issubclass(PromptTooLong, InvalidRequest)
    assert issubclass(InvalidRequest, ValueError)
    assert issubclass(SessionNotFound, AgentMemoryError)
    assert SamplingParams(stop=("x",)).stop == ("x",)
    assert SessionKey("a").namespace == "default"


def _without_mlx(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where MLX is installed without the library of its backend."""
    fake = folder / "mlx"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environ = {**os.environ, "PYTHONPATH": path, "AGENT_MEMORY_CACHE_DIR": str(folder / "store")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_an_mlx_backend_one_sentence_names_the_extra(tmp_path: Path) -> None:
    code = "from agent_memory_core import AgentMemory; AgentMemory(cache_dir=None).load()"
    done = _without_mlx(tmp_path, "-c", code)
    assert done.returncode == 1
    assert "BackendMissing" in done.stderr
    assert "[cpu]" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["bench", "chat", "demo", "doctor"])
def test_without_an_mlx_backend_a_command_ends_without_a_traceback(command: str, tmp_path: Path) -> None:
    done = _without_mlx(tmp_path, "-m", "agent_memory_core.cli", command)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in said
    assert "[cpu]" in said


def test_without_a_compiler_the_engine_runs_uncompiled_and_says_so_once(tmp_path: Path) -> None:
    code = (
        "import logging; logging.basicConfig()\n"
        "from agent_memory_core import AgentMemory\n"
        "q = [{'role': 'user', 'content': 'My name is Ada.'}]\n"
        "for _ in range(2):\n"
        "    with AgentMemory(cache_dir=None) as memory:\n"
        "        print(len(memory.chat(q, max_tokens=3, temperature=1.0, top_p=0.9).token_ids))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["3", "3"], done.stderr
    # A GPU's kernels need no C++ compiler.
    is_cpu = mx.default_device().type == mx.DeviceType.cpu
    expected = 1 if sys.platform == "linux" and is_cpu else 0
    assert done.stderr.count("uncompiled") == expected
