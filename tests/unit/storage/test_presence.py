"""Who has a store open: told by a lock, whatever process ids say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent_memory_core.storage.presence import Presence

HOLD = """
import sys
from pathlib import Path
from agent_memory_core.storage.presence import Presence
presence = Presence(Path(sys.argv[1]))
presence.show()
print(presence.name, flush=True)
input()
"""


def shown(folder: Path) -> Presence:
    presence = Presence(folder)
    presence.show()
    return presence


@pytest.fixture
def presence(tmp_path: Path) -> Presence:
    return shown(tmp_path / "processes")


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_another_process_is_alive_until_it_ends(presence: Presence, end: str) -> None:
    command = [sys.executable, "-c", HOLD, str(presence.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        assert presence.is_alive(name)
        presence.remove_the_dead()
        assert presence.is_alive(name)
        other.send_signal(signal.SIGKILL) if end == "killed" else other.communicate("\n")
        other.wait()
    assert not presence.is_alive(name)
    presence.remove_the_dead()
    assert [path.name for path in presence.folder.iterdir()] == [presence.name]


def test_two_openings_in_one_process_are_told_apart(presence: Presence) -> None:
    other = shown(presence.folder)
    assert presence.is_alive(other.name)
    assert other.is_alive(presence.name)
    other.close()
    assert not presence.is_alive(other.name)
    assert presence.is_alive(presence.name)


@pytest.mark.parametrize("name", ["", ".", "..", "1", "a/b", "x" * 300, "nul\0", "../store"])
def test_a_name_that_nobody_has_is_dead(presence: Presence, name: str) -> None:
    assert not presence.is_alive(name)


def test_a_forked_child_does_not_keep_its_parent_alive(tmp_path: Path) -> None:
    script = f"""
import os, time
from pathlib import Path
from agent_memory_core.storage.presence import Presence
presence = Presence(Path({str(tmp_path / "processes")!r}))
presence.show()
child = os.fork()
if child == 0:
    os.write(1, f"{{presence.name}} {{os.getpid()}}\\n".encode())
    time.sleep(100)
os._exit(0)
"""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        name, child = parent.stdout.readline().split()
        parent.stdout.close()
        parent.wait()
    try:
        os.kill(int(child), 0)
        assert not Presence(tmp_path / "processes").is_alive(name)
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_file_that_was_deleted_is_made_again(presence: Presence) -> None:
    other = shown(presence.folder)
    (presence.folder / presence.name).unlink()
    assert not other.is_alive(presence.name)
    presence.show()
    assert other.is_alive(presence.name)
    presence.show()
    assert len(list(presence.folder.iterdir())) == 2
