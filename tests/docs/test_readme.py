"""The README's code runs, in the order it stands, each block in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run(code: str, store: Path) -> str:
    environment = {**os.environ, "AGENT_MEMORY_CACHE_DIR": str(store), "AGENT_MEMORY_MIN_FREE_MB": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_every_further_block_of_code_runs(number: int, tmp_path: Path) -> None:
    run(BLOCKS[number], tmp_path / "store")


def test_the_first_block_remembers_and_a_second_process_is_warmer(tmp_path: Path) -> None:
    assert len(BLOCKS) == 2
    assert len(BLOCKS[0].strip().splitlines()) <= 10
    first = run(BLOCKS[0], tmp_path / "store")
    assert "teal" in first
    again = run(BLOCKS[0], tmp_path / "store")
    assert int(re.findall(r"'cache_read': (\d+)", again)[0]) >= int(
        re.findall(r"'cache_read': (\d+)", first)[0]
    )


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
