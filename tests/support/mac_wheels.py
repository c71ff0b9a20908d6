"""Whether pip finds a wheel of every package for a Mac with Apple silicon; `make wheels` prints a line for each Python.

Nothing is installed. pip evaluates the markers of packages below ours with the system that it runs on. So what they
ask for on a Mac only (mlx, and its Metal backend) is named here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
MACOS = "macosx_14_0_arm64"
RUNTIME_PYTHONS = ("3.11", "3.12", "3.13", "3.14")
DEV_PYTHONS = ("3.11", "3.12", "3.13")
"""The Pythons that `make test` promises to run on."""

ONLY_ON_A_MAC = ("mlx-metal",)


def requirements(python: str, extra: str) -> list[str]:
    """What ``agent-memory-mlx[extra]`` asks for on a Mac with this Python, extras of ours resolved."""
    project: dict[str, Any] = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    environment = {
        "sys_platform": "darwin",
        "platform_system": "Darwin",
        "platform_machine": "arm64",
        "os_name": "posix",
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    found: set[str] = set(ONLY_ON_A_MAC)
    lines = [*project["dependencies"], *project["optional-dependencies"][extra]]
    while lines:
        wanted = Requirement(lines.pop())
        if wanted.marker is not None and not wanted.marker.evaluate(environment):
            continue
        if wanted.name == project["name"]:
            for name in wanted.extras:
                lines += project["optional-dependencies"][name]
            continue
        wanted.marker = None
        found.add(str(wanted))
    return sorted(found)


def resolve(python: str, extra: str) -> tuple[int, str]:
    """How many packages pip would install, and 0 with its last words where it finds none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--dry-run", "--ignore-installed", "--only-binary=:all:", "--platform", MACOS,
            "--implementation", "cp", "--python-version", python,
            "--target", folder, "--report", str(report), *requirements(python, extra),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return 0, "\n".join(done.stderr.splitlines()[-3:])
        return len(json.loads(report.read_text(encoding="utf-8"))["install"]), ""


def main() -> None:
    """Print the table; exit with 1 where a package that is promised has no wheel."""
    failed = False
    for extra, pythons in (("all", RUNTIME_PYTHONS), ("dev", DEV_PYTHONS)):
        for python in pythons:
            count, why = resolve(python, extra)
            print(f"Python {python}, {extra}: {f'{count} wheels' if count else why}", flush=True)
            failed = failed or count == 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
