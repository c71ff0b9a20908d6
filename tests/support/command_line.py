"""The command `agent-memory` in tests: in this process, which is quick, or in one of its own, which proves more."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from agent_memory_core.cli import options
from agent_memory_core.cli.main import main

WIDTH = "200"
"""Columns of the terminal, so that no cell is folded."""


def command(
    *arguments: str, code: int = 0, typed: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in this process with these variables set, and check its exit code."""
    stdout, stderr = io.StringIO(), io.StringIO()
    # A console keeps the width that it finds when it is made, which was before this call.
    options.out.width = options.err.width = int(WIDTH)
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.dict(os.environ, {"COLUMNS": WIDTH, **variables}),
        mock.patch.object(sys, "argv", ["agent-memory", *arguments]),
        mock.patch.object(sys, "stdin", io.StringIO(typed)),
    ):
        ended = 0
        try:
            main()
        except SystemExit as exit_:
            ended = int(exit_.code or 0)
    done = subprocess.CompletedProcess(arguments, ended, stdout.getvalue(), stderr.getvalue())
    assert ended == code, done.stdout + done.stderr
    return done


def process(
    *arguments: str, typed: str = "", store: Path | str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own on the folder ``store``."""
    environ = {"COLUMNS": WIDTH, "AGENT_MEMORY_CACHE_DIR": str(store), "AGENT_MEMORY_MIN_FREE_MB": "0"}
    return subprocess.run(
        [sys.executable, "-m", "agent_memory_core.cli", *arguments],
        env={**os.environ, **environ, **variables}, cwd=cwd, input=typed,
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
