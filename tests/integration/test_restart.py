"""Restart is invisible: same process, evicted, and killed plus restarted give the same bits."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load, stream_generate
from support import devices, engine_driver, families, tiny_models

from agent_memory_core import EngineConfig

TESTS = Path(__file__).parent.parent
BLOCK = 64
CODECS: list[Any] = [None, 8, "8/4", "6/4", 4]
# Where each turn's branch ends, relative to a block boundary.
ENDS = [0, -1, 1, 0, 1, -1]
NEW = 8
SETTINGS = ("model", "kv_bits", "block_tokens", "min_free_mb", "memory_budget_mb")
"""What a killed process is told, besides its folder."""


restarts = pytest.mark.skipif(
    devices.is_imitated(), reason="a process that a test starts does not imitate a GPU, so it has other bits"
)


def config(model: str, store: Path, bits: Any) -> EngineConfig:
    return EngineConfig(
        model=model, cache_dir=store, kv_bits=bits, block_tokens=BLOCK, min_free_mb=0, memory_budget_mb=64
    )


def padded(driver: engine_driver.Driver, history: engine_driver.History, end: int) -> engine_driver.History:
    """Add a user message so long that prompt and answer end ``end`` tokens off a block boundary."""

    def asked(filler: int) -> engine_driver.History:
        return [*history, {"role": "user", "content": "Tell me " + "1" * filler}]

    def beyond(filler: int) -> int:
        return (driver.memory.count_tokens(asked(filler)) + NEW - end) % BLOCK

    filler = 20 + BLOCK - beyond(20)
    assert beyond(filler) == 0, "one digit is one token"
    return asked(filler)


ANSWER = """
from agent_memory_core.backend import require_mlx
require_mlx()
from support import engine_driver
engine_driver.main()
"""
"""As the product does: MLX is imported after the library that multiplies its matrices."""


def killed_turn(jobs: list[dict[str, Any]]) -> list[engine_driver.Seen]:
    """One turn of every job in a new process that is killed with SIGKILL after its answers."""
    coded = base64.b64encode(json.dumps(jobs).encode()).decode()
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, coded],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return [engine_driver.Seen(**answer) for answer in json.loads(done.stdout)]


@pytest.fixture(scope="module", params=["llama", "deepseek_v2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {"llama": tiny_models.LLAMA, "deepseek_v2": tiny_models.DEEPSEEK_V2}[request.param]
    return tiny_models.write(tmp_path_factory.mktemp("models") / request.param, shape)


FAMILIES = ("llama", "deepseek_v2", "gpt_oss", "qwen3_5", "baichuan_m1")
"""Two with full attention, and one with windows, one with states, and one with both."""
SOME = [("llama", None), *((family, "6/4") for family in FAMILIES)]
ALL = [(family, bits) for family in FAMILIES for bits in CODECS]


@restarts
@pytest.mark.parametrize("cases", [SOME, pytest.param(ALL, marks=pytest.mark.heavy)], ids=["some", "all"])
def test_six_turns_are_the_same_bits_hot_evicted_and_after_kill_9(
    tmp_path: Path, cases: list[tuple[str, Any]]
) -> None:
    """In every turn one process answers for all models and codecs, and is killed."""
    models = {name: families.write(tmp_path / name, name) for name in dict(cases)}
    _six_turns(tmp_path, [(models[name], bits) for name, bits in cases])


def _six_turns(tmp_path: Path, cases: list[tuple[str, Any]]) -> None:
    hot, evicted, killed = (
        [config(model, tmp_path / f"{place}-{i}", bits) for i, (model, bits) in enumerate(cases)]
        for place in ("hot", "evicted", "killed")
    )
    drivers = [(engine_driver.Driver(a), engine_driver.Driver(b)) for a, b in zip(hot, evicted, strict=True)]
    histories: list[engine_driver.History] = [[] for _ in cases]
    for turn, end in enumerate(ENDS):
        jobs, seen = [], []
        for i, (first, second) in enumerate(drivers):
            asked = padded(first, histories[i], end)
            second.evict()
            seen.append((first.turn(asked, "s"), second.turn(asked, "s")))
            histories[i] = [*asked, {"role": "assistant", "content": seen[i][0].text}]
            settings = {name: getattr(killed[i], name) for name in SETTINGS} | {
                "cache_dir": str(killed[i].cache_dir)
            }
            jobs.append({"config": settings, "history": asked, "session": "s"})
        for case, pair, third in zip(cases, seen, killed_turn(jobs), strict=True):
            same = [(s.logits, s.token_ids, s.cache_read) for s in (*pair, third)]
            assert same[0] == same[1] == same[2], (turn, case)
            if turn:
                assert [s.tier for s in (*pair, third)] == ["hot", "warm", "warm"], (turn, case)
    for pair_of_drivers in drivers:
        for driver in pair_of_drivers:
            driver.memory.close()


def test_with_the_raw_codec_answers_equal_plain_mlx_lm(model: str, tmp_path: Path) -> None:
    network, tokenizer = load(model)
    driver = engine_driver.Driver(config(model, tmp_path / "raw", None))
    history: engine_driver.History = []
    for end in ENDS:
        history = padded(driver, history, end)
        seen = driver.turn(history, "s")
        prompt = driver.prompts[-1]
        plain = [out.token for out in stream_generate(network, tokenizer, prompt, max_tokens=NEW)]
        assert seen.token_ids == plain[: len(seen.token_ids)]
        assert len(seen.token_ids) == NEW
        rendered = tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(prompt) == rendered
        history = [*history, {"role": "assistant", "content": seen.text}]
    driver.memory.close()
    mx.clear_cache()


@pytest.mark.parametrize("bits", ["6/4", None])
def test_a_backend_whose_arrays_cannot_be_written_into_loads_the_same_bits(
    tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch, bits: Any
) -> None:
    history: engine_driver.History = [{"role": "user", "content": "7" * 200}]
    seen = []
    for writable in (True, False):
        monkeypatch.setattr(
            "agent_memory_core.engine.block_reader.memory_is_writable", lambda writable=writable: writable
        )
        driver = engine_driver.Driver(config(llama, tmp_path / str(writable), bits))
        driver.turn(history, "s")
        driver.evict()
        seen.append(driver.turn([*history, {"role": "user", "content": "And now?"}], "s"))
        driver.memory.close()
    assert seen[0].tier == "warm"
    assert seen[0] == seen[1]
