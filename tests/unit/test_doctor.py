"""What is found on this machine, and on machines that lack something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent_memory_core import doctor

ROOT = Path(__file__).parents[2]


def verdicts(folder: Path | None) -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor.examine_machine({"cache_dir": folder})}


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    found = verdicts(tmp_path / "deep" / "store")
    assert found["store"].verdict == "ok"
    assert "made by the first turn" in found["store"].value
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_opened_is_a_fault_with_advice(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o755)
    store = verdicts(tmp_path / "store")["store"]
    assert store.verdict == "fault"
    assert "chmod 700" in store.advice


def test_without_a_folder_it_says_that_sessions_end_with_the_process() -> None:
    assert verdicts(None)["store"].verdict == "note"


def test_a_setting_that_is_wrong_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_MODLE", "tiny-chat")
    settings = verdicts(None)["settings"]
    assert settings.verdict == "fault"
    assert "AGENT_MEMORY_MODEL" in settings.value


def test_the_master_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_KEY", "a-very-secret-key")
    assert "secret" not in " ".join(f"{finding}" for finding in verdicts(None).values())


@pytest.mark.parametrize(("kind", "verdict"), [("nfs4", "fault"), ("tmpfs", "note"), ("apfs", None)])
def test_file_systems(
    kind: str, verdict: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda path: kind)
    found = verdicts(tmp_path / "store").get("file system")
    assert (found.verdict if found else None) == verdict


def test_every_fault_and_note_has_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "load_openblas", lambda: None)
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 2**60)
    monkeypatch.setattr(doctor, "WANTED_FILES", 2**60)
    monkeypatch.setattr(doctor, "GIB", 2**60)
    found = doctor.examine_machine({"cache_dir": tmp_path / "store"})
    wanting = [finding for finding in found if finding.verdict != "ok"]
    assert {"memory", "open files", "disk"} <= {finding.subject for finding in wanting}
    assert [finding.subject for finding in wanting if not finding.advice] == []


WITHOUT_MLX = """
import sys
sys.modules["mlx"] = sys.modules["mlx.core"] = None
from agent_memory_core.cli.main import main
main()
"""


def without_mlx(*arguments: str, store: Path) -> subprocess.CompletedProcess[str]:
    """The command in a fresh interpreter in which MLX cannot be imported."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "AGENT_MEMORY_CACHE_DIR": str(store)}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_MLX, *arguments],
        env=environ | {"COLUMNS": "80"}, input="hi\n", capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_without_mlx_the_doctor_says_what_to_install(tmp_path: Path) -> None:
    done = without_mlx("doctor", store=tmp_path / "store")
    assert done.returncode == 1
    assert re.search(r"FAULT +backend", done.stdout)
    assert "agent-memory-mlx[cpu]" in done.stdout.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_without_mlx_help_and_lists_work_and_a_chat_fails_in_one_sentence(tmp_path: Path) -> None:
    assert without_mlx("--help", store=tmp_path / "store").returncode == 0
    assert without_mlx("sessions", "list", store=tmp_path / "store").returncode == 0
    done = without_mlx("chat", store=tmp_path / "store")
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "agent-memory-mlx[cpu]" in said
    assert "Traceback" not in done.stderr
