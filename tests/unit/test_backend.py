"""Importing mlx-lm leaves the limits of the process as the user set them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from agent_memory_core import backend

SRC = Path(backend.__file__).parents[1]
UNLIMITED = resource.RLIM_INFINITY

USES = {
    "import": "agent_memory_core.describe_model",
    "first turn": "agent_memory_core.AgentMemory(cache_dir=None).load()",
    "random models": "from agent_memory_core.testing import *; random_model(FAMILIES['llama'])",
}
"""What makes a process import mlx-lm."""


def limits_after(use: str, soft: int, hard: int) -> tuple[int, int]:
    """The limits of open files of a process that began with others and then imported mlx-lm."""
    program = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        f"import agent_memory_core\n{use}\n"
        "assert 'mlx_lm.utils' in sys.modules\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    after = done.stdout.split()
    return int(after[0]), int(after[1])


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        # A small limit is raised as far as it may be. mlx-lm alone fails here.
        ((256, 1024), (1024, 1024)),
        ((256, 20000), (2048, 20000)),
        ((20000, 20000), (20000, 20000)),
    ],
)
def test_a_process_keeps_its_limits(use: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard not in (UNLIMITED, -1) and hard < before[1]:
        pytest.skip(f"this system allows {hard} open files")
    assert limits_after(use, *before) == after


limits = st.integers(0, 10**6) | st.just(UNLIMITED)


@given(limits, limits)
def test_the_soft_limit_is_never_lowered_and_never_above_the_hard_one(soft: int, hard: int) -> None:
    order = float("inf")
    wide = [order if limit == UNLIMITED else limit for limit in (soft, hard)]
    if wide[0] > wide[1]:
        return
    raised = backend.raised_soft_limit(soft, hard)
    got = order if raised == UNLIMITED else raised
    assert wide[0] <= got <= wide[1]
    assert got >= min(backend.WANTED_FILES, wide[1])


def test_only_the_importing_thread_and_only_the_limit_of_files_are_affected() -> None:
    real = resource.setrlimit
    core = resource.getrlimit(resource.RLIMIT_CORE)
    with backend._open_files_kept():
        assert resource.setrlimit is not real
        resource.setrlimit(resource.RLIMIT_CORE, core)
    assert resource.setrlimit is real
