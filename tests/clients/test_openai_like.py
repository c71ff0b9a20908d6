"""LlamaIndex's `OpenAILike`, which lives in an environment of its own: `make test-sdks`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.http_server import Running

CHECK = Path(__file__).parents[1] / "support" / "openai_like_check.py"
PYTHON = os.environ.get("OPENAI_LIKE_PYTHON")


@pytest.mark.skipif(PYTHON is None, reason="make test-sdks installs it")
def test_llama_index_reads_chats_streams_calls_and_forms(server: Running) -> None:
    arguments = [str(PYTHON), str(CHECK), server.url]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
