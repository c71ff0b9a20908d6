"""The true geometries: what they need is said before any work is done, and every step runs on small models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.benchmark_scripts import BENCHMARKS, load_benchmark
from support.published_configs import CONFIGS

SCRIPT = str(BENCHMARKS / "geometries.py")


geometries: Any = load_benchmark("geometries")
PUBLISHED = {
    "Gemma 3 12B": CONFIGS["gemma-3-12b-it-4bit"]["text_config"],
    "Llama 3.1 8B": CONFIGS["llama-3.1-8b"],
    "DeepSeek-Coder-V2-Lite": CONFIGS["deepseek-coder-v2-lite-4bit"],
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_geometry_is_the_published_one(name: str) -> None:
    ours = geometries.GEOMETRIES[name].config
    assert {key: ours[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_a_cpu_and_too_little_memory_are_refused_with_what_would_go(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(geometries.GEOMETRIES)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.cpu))
    assert "on a CPU one prompt would take hours" in geometries.refusal(names)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 10 * 2**30})
    assert geometries.refusal(names) == (
        "Gemma 3 12B needs 11 GiB of GPU memory, and here are 10.0: --only 'Llama 3.1 8B' would fit."
    )
    assert geometries.refusal(["Llama 3.1 8B"]) is None
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 2**30})
    assert geometries.refusal(["Llama 3.1 8B"]).endswith("--small runs anywhere.")


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.DeviceType.cpu), reason="it would run on a GPU")
def test_on_a_cpu_the_command_ends_before_any_work(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", str(tmp_path / "out.json")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("These models need Metal or CUDA")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.heavy
@pytest.mark.model
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_step_runs_on_a_small_model_of_each_geometry(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--small", "--samples", "1", "--only", name, "--out", str(out)]
    subprocess.run(command, check=True, timeout=280)
    found = json.loads(out.read_text())["results"][name]["320"]
    assert [found["samples"][part][0]["tier"] for part in ("hot", "resumed")] == ["hot", "warm"]
    assert found["medians"]["cold"] > 0
    assert found["paper_ms"] is None
