"""What `connect` and `service` print is what the programs that read it can read."""

from __future__ import annotations

import json
import plistlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import command_line


def printed(*arguments: str) -> str:
    return command_line.command(*arguments).stdout


@pytest.mark.parametrize("client", ["claude-code", "openai"])
def test_a_shell_sets_what_is_printed_for_it(client: str) -> None:
    key = "it's a $key"
    text = printed("connect", client, "--key", key)
    names = [line.split("=")[0].removeprefix("export ") for line in text.splitlines()]
    shown = " ".join(f'"${name}"' for name in names)
    done = subprocess.run(
        ["sh", "-c", f"{text}\nprintf '%s\\n' {shown}"], capture_output=True, text=True, check=True
    )
    values = dict(zip(names, done.stdout.splitlines(), strict=True))
    assert key in values.values()
    assert any(value.startswith("http://127.0.0.1:8000") for value in values.values())


def test_clients_are_told_the_context_and_codex_reads_toml_and_opencode_json() -> None:
    codex = tomllib.loads(printed("connect", "codex", "--url", "http://host:1/", "--model", "tiny-chat"))
    provider = codex["model_providers"][codex["model_provider"]]
    assert (provider["base_url"], provider["wire_api"]) == ("http://host:1/v1", "responses")
    assert (codex["model"], codex["model_context_window"]) == ("tiny-chat", 8192)
    shell = printed("connect", "claude-code", "--model", "tiny-chat").splitlines()
    assert "export CLAUDE_CODE_AUTO_COMPACT_WINDOW='8192'" in shell
    opencode = json.loads(printed("connect", "opencode", "--model", "tiny-chat"))
    provider = opencode["provider"]["agent-memory"]
    assert provider["models"]["tiny-chat"]["limit"]["context"] == 8192


def test_a_service_runs_the_command_with_the_options_given() -> None:
    options = ["--model", "a b", "--port", "81"]
    job = plistlib.loads(printed("service", "install", "--print", "--manager", "launchd", *options).encode())
    command = [sys.executable, "-m", "agent_memory_core", "serve", *options]
    assert job["ProgramArguments"] == command
    unit = printed("service", "install", "--print", "--manager", "systemd", *options)
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert shlex.split(line.removeprefix("ExecStart=")) == command


def test_the_file_of_a_service_is_written_for_its_owner_only(tmp_path: Path) -> None:
    command_line.command("service", "install", "--manager", "systemd", HOME=str(tmp_path))
    (file,) = tmp_path.rglob("agent-memory.service")
    assert file.stat().st_mode & 0o777 == 0o600
    assert f"WorkingDirectory={tmp_path}" in file.read_text()


def test_the_version_is_printed() -> None:
    assert re.fullmatch(r"agent-memory \d+\.\d+.*", printed("--version").strip())
