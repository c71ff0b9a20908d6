"""Runs the pages of `demos.ui` with Streamlit, for this machine only."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from agent_memory_core import AgentMemoryError

APP = Path(__file__).parent / "ui" / "_app.py"


def command(port: int) -> list[str]:
    """How Streamlit is started: bound to this machine, and telling nobody."""
    options = {
        "server.address": "127.0.0.1",
        "server.port": str(port),
        "browser.gatherUsageStats": "false",
        "server.fileWatcherType": "none",
        # Its menu offers to publish the pages, which are for this machine.
        "client.toolbarMode": "minimal",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "streamlit", "run", str(APP), *flags]


def run(port: int) -> None:
    """Show the pages until they are stopped.

    Raises:
        AgentMemoryError: Streamlit is not installed, or ended with an error.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise AgentMemoryError(
            "the pages need Streamlit: install the extra ui, pip install 'agent-memory-mlx[ui]'."
        )
    done = subprocess.run(command(port), check=False)
    if done.returncode > 0:
        raise AgentMemoryError(
            f"the pages ended with exit code {done.returncode}: see what Streamlit wrote above."
        )
