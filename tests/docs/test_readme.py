"""The README: its example prints what it shows, and a second process is warmer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_the_example_prints_what_is_shown_and_a_second_process_is_warmer(tmp_path: Path) -> None:
    ((code, shown),) = re.findall(r"```python\n(.*?)```\s*```text\n(.*?)```", TEXT, re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    assert run(code, tmp_path / "store") == shown
    again = run(code, tmp_path / "store")
    first_read, read = (int(re.findall(r"'cache_read': (\d+)", text)[0]) for text in (shown, again))
    assert read >= first_read


def test_it_has_one_table_and_can_be_read_in_a_minute() -> None:
    assert len(re.findall(r"^\| -", TEXT, re.MULTILINE)) == 1
    assert len(TEXT.splitlines()) <= 100


def test_the_extras_that_it_names_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    named = re.search(r"The extras are (.*?)\. From", TEXT, re.DOTALL)
    assert named is not None
    assert set(re.findall(r"`([\w-]+)`", named[1])) <= extras
    for listed in re.findall(r"agent-memory-mlx\[([\w,-]+)\]", TEXT):
        assert set(listed.split(",")) <= extras
