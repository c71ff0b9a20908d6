"""A volume whose free space a test sets, as a system call would tell it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SIZE = 2**40
"""Bytes of the volume."""


@dataclass
class FixedVolume:
    """What `os.statvfs` says. Nothing that is written or deleted changes it, unless ``used`` counts it."""

    free: int = SIZE // 2
    """bytes that are free"""
    size: int = SIZE
    used: Callable[[], int] = field(default=lambda: 0)
    """bytes that are taken from ``free`` now"""

    def statvfs(self, _: Path | str | int) -> os.statvfs_result:
        free = max(0, self.free - self.used())
        return os.statvfs_result((1, 1, self.size, free, free, 2**20, 2**20, 2**20, 0, 255))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "statvfs", self.statvfs)
