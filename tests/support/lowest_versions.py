"""Prints what an extra of this distribution depends on at the lowest version that it allows, for pip to install.

    python tests/support/lowest_versions.py langgraph llama-index

Of two bounds on one package the higher counts, as it does for whoever installs the extra.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extra: str) -> Iterator[tuple[str, str]]:
    """The packages of an extra with their lower bounds, those of the extras that it names first."""
    for line in PROJECT["optional-dependencies"][extra]:
        if line.startswith(f"{PROJECT['name']}["):
            for other in line.partition("[")[2].rstrip("]").split(","):
                yield from requirements(other)
            continue
        bounded = re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)", line)
        if bounded is None:
            raise SystemExit(f"{extra}: {line!r} has no lower bound of the form name>=version.")
        yield bounded[1], bounded[2]


def lowest(*extras: str) -> dict[str, str]:
    """The lowest versions that all of these extras allow together, by package."""
    versions: dict[str, str] = {}
    for extra in extras:
        for name, version in requirements(extra):
            versions[name] = max(versions.get(name, "0"), version, key=_number)
    return versions


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


if __name__ == "__main__":
    print(*(f"{name}=={version}" for name, version in lowest(*sys.argv[1:]).items()))
