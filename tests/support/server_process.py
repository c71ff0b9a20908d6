"""The server as a process of its own, started from the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from support.http_server import wait_until

SRC = Path(__file__).parents[2] / "src"


def command(*options: str, **variables: str) -> list[Any]:
    """The arguments and the environment of a server on a free port."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")]),
        **variables,
    }
    return [[sys.executable, "-m", "agent_memory_core", "serve", "--port", "0", *options], environ]


@contextmanager
def running(folder: Path, *options: str, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server process that is ready, and its address. Its store is in ``folder``, as is its log."""
    args, environ = command("--cache-dir", str(folder / "store"), *options, **variables)
    log = folder / "log"
    with log.open("w") as stderr, subprocess.Popen(args, env=environ, stderr=stderr, cwd=folder) as process:
        try:
            wait_until(lambda: "running on" in log.read_text())
            (url,) = re.findall(r"running on (\S+)", log.read_text())
            wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
            yield process, url
        finally:
            process.kill()
