"""What a ``kill -9`` leaves: every agent with all that it was told, and no damage that costs more than time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from agents.conftest import PROMPT, OpenManager

from agent_memory_core.demos import persistent_agents as demo

BETWEEN = """
import os, signal, sys
from agent_memory_core import TurnSaved
from agent_memory_core.agents import PersistentAgentManager

manager = PersistentAgentManager(sys.argv[1], cache_dir=sys.argv[2], block_tokens=64, min_free_mb=0)
manager.create_agent("ada", "technical", sys.argv[3])
manager.generate("ada", "Hello.", 8)
manager.memory.observe(lambda event: isinstance(event, TurnSaved) and os.kill(os.getpid(), signal.SIGKILL))
manager.generate("ada", "Remember 4821.", 8)
"""


@pytest.mark.slow
def test_three_agents_go_on_after_a_kill(tmp_path: Path) -> None:
    told, resumed = demo.run(tmp_path, compare=False)
    assert list(told) == list(demo.FACTS)
    for line in resumed:
        assert line.history == told[line.agent_id]
        assert line.expected in line.answer
        # Only the question, the marks around it and the token that the answer begins with are computed.
        assert line.prompt_tokens - line.reused <= 40


def test_a_turn_that_is_on_disk_and_not_in_the_history_harms_nothing(
    open_manager: OpenManager, llama: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", BETWEEN, llama, str(tmp_path / "store"), PROMPT]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    manager = open_manager()
    agent = manager.load_agent("ada")
    assert len(agent.conversation_history) == 2
    manager.generate("ada", "Remember 4821.", 8)
    assert agent.last_report is not None
    # The prompt is the one of the turn that was killed, whose blocks are on disk.
    assert agent.last_report.usage.cache_creation < 64
    assert len(agent.conversation_history) == 4


def test_damaged_files_cost_time_and_no_answer(open_manager: OpenManager, tmp_path: Path) -> None:
    first = open_manager()
    first.create_agent("ada", "technical", PROMPT)
    first.generate("ada", "Hello.", 8)
    first.close()
    for path in tmp_path.rglob("*.safetensors"):
        if "token_tails" not in path.parts:
            content = bytearray(path.read_bytes())
            content[-1] ^= 0xFF
            path.write_bytes(content)
    second = open_manager()
    second.generate("ada", "And now?", 4)
    report = second.agents["ada"].last_report
    assert report is not None
    assert (report.miss_reason, report.usage.cache_read) == ("damaged", 0)
    assert len(second.agents["ada"].conversation_history) == 4


def test_two_managers_on_one_agent_lose_nothing(open_manager: OpenManager) -> None:
    ours, theirs = open_manager(), open_manager()
    ours.create_agent("ada", "technical", PROMPT)
    for number in range(3):
        ours.generate("ada", f"Ours {number}.", 4)
        theirs.generate("ada", f"Theirs {number}.", 4)
    ours.generate("ada", "Last.", 4)
    said = [message["content"] for message in ours.agents["ada"].conversation_history[::2]]
    assert said == [*(f"{who} {n}." for n in range(3) for who in ("Ours", "Theirs")), "Last."]
