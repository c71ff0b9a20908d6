"""The command line on a real store; `chat` and `demo` as real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from support import engine_driver
from typer.testing import CliRunner

from agent_memory_core.cli import main as cli
from agent_memory_core.demos import restart as demo

Open = Callable[..., engine_driver.Driver]


@pytest.fixture
def store(llama: str, open_driver: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    driver = open_driver(llama)
    for name in ("ada", "bob"):
        driver.turn([{"role": "user", "content": "A shared beginning. " * 20 + name}], name)
    driver.memory.close()
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "store"


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli.app, list(arguments))
    assert done.exit_code == code, done.output
    return done.output


def program(*arguments: str, typed: str = "", store: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "AGENT_MEMORY_CACHE_DIR": str(store), "AGENT_MEMORY_MIN_FREE_MB": "0"}
    return subprocess.run(
        [sys.executable, "-m", "agent_memory_core.cli.main", *arguments],
        env=environment, input=typed, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_sessions_are_listed_shown_pinned_and_forgotten(store: Path) -> None:
    listed = run("sessions", "list")
    assert "ada" in listed
    assert "bob" in listed
    assert "branch 1" in run("sessions", "show", "ada")
    run("sessions", "pin", "ada")
    assert "pinned=True" in run("sessions", "show", "ada")
    run("sessions", "pin", "ada", "--off")
    assert "pinned=False" in run("sessions", "show", "ada")
    files = len(list(store.rglob("*.safetensors")))
    assert "was forgotten" in run("sessions", "forget", "ada")
    assert "ada" not in run("sessions", "list")
    assert 0 < len(list(store.rglob("*.safetensors"))) < files
    assert "no session" in run("sessions", "forget", "ada")


def test_check_finds_a_flipped_byte_and_mends_it(store: Path) -> None:
    run("check")
    path = next(store.rglob("blocks/*/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[5000] ^= 255
    path.write_bytes(data)
    assert path.name in run("check", code=1).replace("\n", "")
    run("check", "--fix")
    run("check")


def test_stats_are_json(store: Path) -> None:
    assert json.loads(run("stats"))["files"] == len(list(store.rglob("*.safetensors")))


def test_a_chat_goes_on_in_another_process(tmp_path: Path) -> None:
    first = program(
        "chat", "--session", "s", typed="My favourite colour is teal.\n\n", store=tmp_path / "store"
    )
    assert first.returncode == 0, first.stderr
    second = program(
        "chat", "--session", "s", typed="What is my favourite colour?\n\n", store=tmp_path / "store"
    )
    assert "teal" in second.stdout
    assert "going on with 2 messages" in second.stderr
    assert "(warm)" in second.stderr
    listed = program("sessions", "list", store=tmp_path / "store")
    assert "s" in listed.stdout


def test_an_error_is_one_sentence(tmp_path: Path) -> None:
    done = program("chat", "--model", "./no-such-folder", typed="hi\n", store=tmp_path / "store")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demonstration_shows_the_point(tmp_path: Path) -> None:
    console = Console(record=True, width=100)
    outcome = demo.run(console, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert len(outcome.lines) == 3
    for line in outcome.lines:
        assert line.reused >= 0.95 * line.prompt_tokens
        assert line.expected in line.answer, line
    assert outcome.bytes_unshared > 2 * outcome.bytes_shared
    assert "SIGKILL" in console.export_text()
