"""Settings from a file ``.env`` in the working directory."""

from __future__ import annotations

import os
from pathlib import Path

from dotenv import dotenv_values

PREFIXES = ("AGENT_MEMORY_", "SEMANTIC_")


class EnvFile:
    """The file's variables that begin like this package's own; those that the process was started with win."""

    def __init__(self, path: Path = Path(".env")) -> None:
        self._path = path
        self._outer = frozenset(os.environ)
        self._set: set[str] = set()

    def load(self) -> None:
        """Put them into the environment, and take out those that an earlier call has put there."""
        for name in self._set:
            os.environ.pop(name, None)
        values = dotenv_values(self._path) if self._path.is_file() else {}
        ours = {
            name: value for name, value in values.items() if name.startswith(PREFIXES) and value is not None
        }
        new = {name: value for name, value in ours.items() if name not in self._outer}
        os.environ.update(new)
        self._set = set(new)
