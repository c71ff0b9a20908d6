"""The Makefile: what it installs for whom, the Macs that it refuses, and that GNU make 3.81 can read it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

PYTHON = """#!/bin/sh
case "$*" in
  *platform.machine*) exit {wrong_machine} ;;
  *"-m venv"*)
    for folder; do :; done
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    printf '#!/bin/sh\\necho the demo runs\\n' > "$folder/bin/agent-memory"
    chmod +x "$folder/bin/agent-memory" ;;
  *"-m pip"*) for last; do :; done; echo "pip: $last" ;;
esac
"""
"""A Python that installs nothing: it says what pip was asked for."""


class Clone:
    """A clone whose machine is another: ``uname``, ``sysctl`` and the Pythons are ours."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "clone", folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        # The real Pythons of this machine stay out of sight.
        for tool in ("sh", "make", "test", "cp", "mkdir", "chmod", "touch", "echo", "printf", "rm", "find"):
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.machine("Linux", "x86_64")

    def machine(self, system: str, machine: str, *, arm64: bool = False) -> None:
        """Pretend to be another machine; ``arm64`` is what its processor says, whatever translates."""
        self._tool("uname", f'case "$1" in -m) echo {machine} ;; *) echo {system} ;; esac')
        self._tool("sysctl", "echo 1" if arm64 else "echo 'unknown oid' >&2; exit 1")

    def python(self, name: str, *, arm64: bool = True) -> None:
        """Install a Python."""
        self._tool(name, PYTHON.format(wrong_machine=int(not arm64)))

    def _tool(self, name: str, program: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(program if program.startswith("#!") else f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run make in it."""
        return subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env={"PATH": str(self.bin), "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_the_demo_installs_what_it_needs_and_the_tests_what_they_need(clone: Clone) -> None:
    clone.python("python3.14")
    clone.machine("Darwin", "arm64", arm64=True)
    demo = clone.make("demo")
    assert demo.returncode == 0, demo.stderr
    assert "making .venv with python3.14" in demo.stdout
    assert re.findall("pip: (.*)", demo.stdout) == [".[all]"]
    assert "the demo runs" in demo.stdout
    unit = clone.make("unit")
    assert unit.returncode == 0, unit.stderr
    assert re.findall("pip: (.*)", unit.stdout) == [".[all,dev]"]
    assert "pip:" not in clone.make("demo").stdout
    assert "pip:" not in clone.make("unit").stdout


def test_elsewhere_the_backend_is_installed_too(clone: Clone) -> None:
    clone.python("python3.12")
    assert "pip: .[cpu,all]\n" in clone.make("demo").stdout
    assert "pip: .[cuda12,all,dev]\n" in clone.make("unit", "BACKEND=cuda12").stdout


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        (("python3", "python3.14", "python3.13", "python3.11"), "python3.13"),
        (("python3", "python3.14", "python3.11"), "python3.11"),
        (("python3", "python3.14"), "python3.14"),
        (("python3",), "python3"),
    ],
)
def test_a_python_with_every_wheel_is_preferred(clone: Clone, pythons: tuple[str, ...], chosen: str) -> None:
    for name in pythons:
        clone.python(name)
    assert f"making .venv with {chosen}\n" in clone.make("demo").stdout


def refused(clone: Clone, *arguments: str) -> str:
    """The one sentence with which make refuses, before anything is made or installed."""
    done = clone.make("demo", *arguments)
    assert done.returncode != 0
    assert "pip:" not in done.stdout
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1, done.stderr
    return said[0]


def test_an_intel_mac_is_refused_in_one_sentence(clone: Clone) -> None:
    clone.python("python3.12", arm64=False)
    clone.machine("Darwin", "x86_64")
    assert "Apple silicon" in refused(clone)
    assert not (clone.folder / ".venv").exists()


@pytest.mark.parametrize("shell", ["arm64", "x86_64"])
def test_a_translated_python_is_refused_in_one_sentence(clone: Clone, shell: str) -> None:
    """Whether or not the terminal is translated, too."""
    clone.python("python3.12", arm64=False)
    clone.machine("Darwin", shell, arm64=True)
    said = refused(clone)
    assert said.startswith("python3.12 is a Python for Intel")
    assert "Rosetta" in said
    assert not (clone.folder / ".venv").exists()
    # An arm64 Python is all that is needed.
    clone.python("python3.11")
    assert clone.make("demo", "PYTHON=python3.11").returncode == 0


def test_a_venv_of_a_translated_python_is_refused(clone: Clone) -> None:
    clone.python("python3.12", arm64=False)
    assert clone.make("demo").returncode == 0
    (clone.folder / ".venv" / "runtime-cpu").unlink()
    clone.machine("Darwin", "arm64", arm64=True)
    assert refused(clone).startswith(".venv/bin/python is a Python for Intel")


def test_without_a_python_that_is_new_enough_make_says_so(clone: Clone) -> None:
    assert "needs Python 3.11 or newer" in refused(clone)


NEWER_THAN_3_81 = {
    "a shell assignment (4.0)": r"^\s*[\w.]+\s*!=",
    "a POSIX assignment (4.0)": r"::=",
    "undefine (3.82)": r"^\s*undefine\b",
    "private (3.82)": r"^\s*private\b",
    "define with an operator (3.82)": r"^\s*define\s+\S+\s*[:+?!]?=",
    "$(file) (4.0)": r"\$\(file\b",
    "$(guile) (4.0)": r"\$\(guile\b",
    "$(let) (4.4)": r"\$\(let\b",
    "$(intcmp) (4.4)": r"\$\(intcmp\b",
    "a special target": r"^\.(ONESHELL|SHELLFLAGS|LOADED|NOTINTERMEDIATE|WAIT)\b",
    "$(shell) status (4.2)": r"\.SHELLSTATUS",
    "load (4.0)": r"^-?load\b",
    "a grouped target (4.3)": r"^[^\t#=]*&:",
    "--output-sync (4.0)": r"--output-sync|MAKEFLAGS.*-O",
    "export of a target's variable without a value (3.82)": r"^[\w. -]+:\s*export\s+[\w]+\s*$",
}
GNU_ONLY = (
    r"\bsed -i(?!\.)|\bfind [^|]*-(printf|delete)\b|\bxargs -r|\breadlink -f|\bcp -[a-z]*t\b|\bdate -d\b"
    r"|\bstat -c|\bnproc\b|\bgrep -P|\bmktemp --|\bsort -V|\btimeout \d"
)


@pytest.mark.parametrize("what", NEWER_THAN_3_81)
def test_the_makefile_uses_nothing_newer_than_make_3_81(what: str) -> None:
    assert re.findall(NEWER_THAN_3_81[what], MAKEFILE, re.MULTILINE) == []


def test_its_recipes_use_the_options_of_bsd_tools_only() -> None:
    assert re.findall(GNU_ONLY, MAKEFILE) == []
    assert re.search(GNU_ONLY, "sed -i s/a/b/ file") is not None


def test_scripts_use_nothing_newer_than_bash_3_2() -> None:
    newer = r"declare -[An]|mapfile|readarray|\$\{\w+(,,|\^\^|@)|&>>|\bcoproc\b|\|&|wait -n"
    for script in (ROOT / ".ci").iterdir():
        assert re.findall(newer, script.read_text(encoding="utf-8")) == []


def test_every_target_is_explained() -> None:
    named = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())  # type: ignore[index]
    explained = set(re.findall(r"echo 'make ([\w-]+) ", MAKEFILE))
    assert named - explained == {"help"}
    assert explained <= named
