"""The page about Macs: every command that it names is there, and what it says of settings and tests is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from support import devices

from agent_memory_core import EngineConfig
from agent_memory_core.backend import WANTED_FILES
from agent_memory_core.cli.main import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "on-a-mac.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) + re.findall(r"`([^`\n]+)`", PAGE))


def test_it_says_that_it_was_not_run_on_a_mac() -> None:
    assert "No part of this was run on a Mac yet." in PAGE


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_it_is_linked(page: str) -> None:
    assert "(docs/on-a-mac.md)" in (ROOT / page).read_text(encoding="utf-8")


def test_every_make_target_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z][a-z-]*)", CODE))
    assert {"demo", "test", "first-day", "wheels"} <= targets
    for target in targets:
        assert re.search(rf"^(\w[\w -]* )?{target}( [\w -]+)?:", makefile, re.MULTILINE), target


def test_every_command_of_ours_is_there() -> None:
    named = re.findall(r"\bagent-memory ([a-z]+)(?: ([a-z]+))?", CODE)
    assert named
    for words in named:
        command: Any = typer.main.get_command(app)
        for word in filter(None, words):
            assert word in command.commands
            command = command.commands[word]


def test_settings_have_the_names_and_defaults_of_the_engine() -> None:
    table = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE)
    assert len(table) == 4
    for name, default in table:
        assert name in EngineConfig.model_fields
        if quoted := re.findall(r'`"(\w+)"`', default):
            assert quoted == [EngineConfig.model_fields[name].default]


def test_devices_and_limits_are_those_of_the_code() -> None:
    assert set(re.findall(r"AGENT_MEMORY_TEST_DEVICE=(\S+)", CODE)) == set(devices.DEVICES)
    assert f"raises a lower limit to {WANTED_FILES}" in PAGE
