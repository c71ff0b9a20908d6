"""The device of the tests: it is chosen before mlx_lm is imported, and "like-gpu" rounds as a GPU does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from support import devices

import agent_memory_core

TESTS = Path(__file__).parents[1]
SRC = Path(agent_memory_core.__file__).parents[1]

DECODE_AGAINST_PREFILL = """
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from support import tiny_models
model = tiny_models.build(tiny_models.LLAMA)
ids = mx.random.randint(0, 500, (1, 40), key=mx.random.key(0))
whole = model(ids)[0, -1]
cache = make_prompt_cache(model)
model(ids[:, :-1], cache=cache)
alone = model(ids[:, -1:], cache=cache)[0, -1]
print((mx.abs(whole - alone).max() / mx.std(whole)).item())
"""


def run(program: str, **variables: str) -> str:
    """Run ``program`` as a test would run: after the conftest of all tests."""
    environ = {**os.environ, "PYTHONPATH": f"{SRC}{os.pathsep}{TESTS}", "TESTS_RUN_ON": "", **variables}
    done = subprocess.run(
        [sys.executable, "-c", f"import conftest\n{program}"],
        cwd=TESTS, env=environ, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.model
def test_like_a_gpu_one_row_differs_in_the_last_bits_and_with_tf32_in_many() -> None:
    """What TF32 would do to tests that allow 1e-4, and why they are run without it."""
    gap = {
        (device, tf32): float(
            run(DECODE_AGAINST_PREFILL, AGENT_MEMORY_TEST_DEVICE=device, MLX_ENABLE_TF32=tf32)
        )
        for device in ("cpu", "like-gpu")
        for tf32 in ("0", "1")
    }
    assert gap["cpu", "0"] == gap["cpu", "1"] <= gap["like-gpu", "0"]
    assert 0 < gap["like-gpu", "0"] < 1e-5
    assert gap["like-gpu", "1"] > 1e-4


def test_the_device_is_set_before_mlx_lm_is_imported_and_the_product_does_not_see_the_variable() -> None:
    program = (
        "import os, sys\n"
        "assert 'mlx_lm' not in sys.modules\n"
        "import mlx.core as mx\n"
        "from agent_memory_core.environment import from_environment\n"
        "print(mx.default_device(), os.environ['MLX_ENABLE_TF32'], from_environment())\n"
    )
    chosen = {"AGENT_MEMORY_TEST_DEVICE": "cpu", "AGENT_MEMORY_KV_BITS": "8"}
    environ = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environ)
        assert run(program, **chosen) == "Device(cpu, 0) 0 {}"


def test_workers_run_on_the_device_of_the_run() -> None:
    """xdist starts them with the environment that is left when the settings of the user were removed."""
    assert run("import os; print(os.environ['TESTS_RUN_ON'])", AGENT_MEMORY_TEST_DEVICE="cpu") == "cpu"
    program = "from support import devices; print(devices.is_exact())"
    assert run(program, TESTS_RUN_ON="like-gpu") == "False"
    assert run(program, TESTS_RUN_ON="cpu") == "True"


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of cpu, gpu, like-gpu"):
        devices.select("tpu")
    if not mx.is_available(mx.Device(mx.gpu)):
        with pytest.raises(ValueError, match="finds no GPU"):
            devices.select("gpu")


def test_ten_bits_of_the_mantissa_are_left() -> None:
    x = mx.array([1.0, 1.0 + 2**-10, 1.0 + 2**-12, -3.14159265], mx.float32)
    assert devices.to_tf32(x).tolist() == [1.0, 1.0 + 2**-10, 1.0, -3.140625]


@pytest.mark.exact_on_cpu(reason="the fixture is tried", tolerance=0.5)
def test_a_tolerance_counts_only_where_bits_may_differ(tolerance: float) -> None:
    assert tolerance == (0.0 if devices.is_exact() else 0.5)
