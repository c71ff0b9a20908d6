"""The distributions in `compat/`: their wheels are built and installed, and do what their pages show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {
    "langchain": ("langchain_mlx_persistent", "langchain_agent_memory"),
    "llama-index": ("llama_index.llms.mlx_persistent", "llama_index_agent_memory"),
}


def installed(name: str, folder: Path) -> Path:
    """The folder of an installation of the wheel of a distribution, for ``PYTHONPATH``."""
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT / "compat" / name))
    (wheel,) = builder.build(directory=str(folder), versions=["standard"])
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target"]
    command = [sys.executable, "-m", "pip", "install", *options, str(folder / "site"), wheel]
    subprocess.run(command, check=True, timeout=120)
    return folder / "site"


def run(program: str, site: Path, store: Path) -> str:
    path = os.pathsep.join([str(site), str(ROOT / "src")])
    environ = {**os.environ, "PYTHONPATH": path, "AGENT_MEMORY_CACHE_DIR": str(store)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(
        command, env=environ | {"AGENT_MEMORY_MIN_FREE_MB": "0"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_an_installed_wheel_re_exports_and_its_page_runs(name: str, tmp_path: Path) -> None:
    module, ours = DISTRIBUTIONS[name]
    site = installed(name, tmp_path)
    same = (
        f"import {module} as theirs, {ours} as ours\n"
        "for name in theirs.__all__: assert getattr(theirs, name) is getattr(ours, name), name\n"
        "print(theirs.__file__)\n"
    )
    page = (ROOT / "compat" / name / "README.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    file, _, printed = run(same + code, site, tmp_path / "store").partition("\n")
    assert str(site) in file
    assert printed == "".join(re.findall(r"```text\n(.*?)```", page, re.DOTALL))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_it_asks_for_extras_that_are_there_at_a_version_that_is_ours(name: str) -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    theirs = tomllib.loads((ROOT / "compat" / name / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert theirs["version"] == ours["version"]
    wanted = [
        *theirs["dependencies"],
        *(one for of in theirs["optional-dependencies"].values() for one in of),
    ]
    for requirement in wanted:
        (extra,) = re.fullmatch(r"agent-memory-mlx\[([\w-]+)\]", requirement).groups()  # type: ignore[union-attr]
        assert extra in ours["optional-dependencies"]


def test_the_namespace_of_llama_index_is_left_to_all(tmp_path: Path) -> None:
    site = installed("llama-index", tmp_path)
    packages = {path.parent.relative_to(site).as_posix() for path in site.rglob("__init__.py")}
    assert packages == {"llama_index/llms/mlx_persistent"}
    (metadata,) = site.glob("*.dist-info/METADATA")
    assert (
        message_from_string(metadata.read_text(encoding="utf-8"))["Name"] == "llama-index-llms-mlx-persistent"
    )
