"""Master keys for tests, and a look at every byte of a store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent_memory_core.environment import KEY_VARIABLE

KEY = "0f" * 32
OTHER_KEY = "f0" * 32


def give(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    """Set the master key of this process, or none."""
    if key is None:
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(KEY_VARIABLE, key)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, whatever its name."""
    return {
        str(Path(path, name).relative_to(folder)): Path(path, name).read_bytes()
        for path, _, names in os.walk(folder)
        for name in names
    }


def where(folder: Path, canary: bytes) -> set[str]:
    """The files that have these bytes anywhere in them or in their names."""
    return {
        name for name, content in contents(folder).items() if canary in content or canary in name.encode()
    }
