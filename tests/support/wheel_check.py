"""What a user does first, in an environment that has only the wheels: `make test-wheel` runs it there.

It needs nothing of the repository, and leaves nothing behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TALK = """
from langchain_mlx_persistent import ChatMLXPersistent
from llama_index.llms.mlx_persistent import MLXPersistentLLM

llm = ChatMLXPersistent(model="tiny-chat", session_id="ada", temperature=0)
history = [("user", "My favourite colour is teal.")]
history += [llm.invoke(history), ("user", "What is my favourite colour?")]
answer = llm.invoke(history)
assert "teal" in answer.content, answer.content
print(answer.usage_metadata["input_token_details"]["cache_read"])
assert "Ada" in MLXPersistentLLM(model="tiny-chat", temperature=0).complete("My name is Ada. What is my name?").text
"""


def main() -> None:
    """Run each command, and fail with its output if it does."""
    with tempfile.TemporaryDirectory() as folder:
        command = Path(sys.executable).with_name("agent-memory")
        run(folder, str(command), "--version")
        run(folder, str(command), "doctor")
        first, again = (int(run(folder, sys.executable, "-W", "ignore", "-c", TALK)) for _ in range(2))
        assert again >= first > 0, (first, again)
        assert "ada" in run(folder, str(command), "sessions", "list")
        assert "all is well" in run(folder, str(command), "check")
    print("the wheels work")


def run(folder: str, *arguments: str) -> str:
    """What a command prints; its store is in the folder."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"AGENT_MEMORY_CACHE_DIR": f"{folder}/store", "AGENT_MEMORY_MIN_FREE_MB": "0"}
    done = subprocess.run(arguments, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
