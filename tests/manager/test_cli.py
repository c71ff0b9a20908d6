"""`agent-memory manager`: what a configuration says, and that a model's memory comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import command_line


@pytest.fixture
def config(models: dict[str, str], tmp_path: Path) -> str:
    parameters = {"cache_dir": None, "memory_budget_mb": 9, "max_tokens": 4}
    found: list[dict[str, Any]] = [
        {"name": n, "type": "mlx", "path": models[n], "parameters": parameters} for n in "ab"
    ]
    file = tmp_path / "config.json"
    found[1]["preload"] = True
    large = {"name": "large", "type": "mlx", "path": models["c"], "memory_mb": 99, "pinned": True}
    file.write_text(json.dumps({"max_memory_mb": 30, "models": [*found, large]}))
    return str(file)


def test_check_says_what_fits_together(config: str) -> None:
    said = command_line.command("manager", "check", config).stdout
    lines = {line.split()[0]: line for line in said.splitlines() if "mlx" in line}
    assert " b " in lines["a"]
    assert "too large" in lines["large"]
    assert "pinned" in lines["large"]


def test_check_refuses_what_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"modles": []}')
    assert "did you mean 'models'" in command_line.command("manager", "check", str(file), code=1).stderr


def test_load_shows_what_a_model_takes_and_chat_answers(config: str) -> None:
    said = command_line.command("manager", "load", "a", "--config", config).stdout
    assert "loaded in" in said
    assert "by the books" in said
    usage = json.loads(command_line.command("manager", "load", "a", "--config", config, "--json").stdout)
    # What is to be loaded ahead is not: it would be measured, too.
    assert usage["before"]["total_mb"] == usage["unloaded"]["total_mb"] == 0
    assert usage["loaded"]["loaded_models"] == ["a"]
    said = command_line.command("manager", "chat", "a", "--config", config, typed="Hello.\n\n").stdout
    assert said.strip()
