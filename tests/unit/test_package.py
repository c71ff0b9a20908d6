"""What holds for the packages as wholes: public names, the tree of errors, and who may be imported."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

from agent_memory_core import errors
from agent_memory_core.fast_blas import PACKAGE as OPENBLAS

SRC = Path(errors.__file__).parents[1]
PACKAGES = ("agent_memory_core", "langchain_agent_memory", "llama_index_agent_memory")
CORE = sorted(
    ".".join(path.relative_to(SRC).with_suffix("").parts)
    for path in SRC.glob("agent_memory_core/**/[!_]*.py")
)
FRAMEWORKS = ("langchain", "langchain_core", "langgraph", "llama_index", *PACKAGES[1:])


def run(program: str, *arguments: str, packages: Path = SRC) -> str:
    """Run ``program`` in a new interpreter that sees this checkout, or other packages; give what it printed."""
    environ = {**os.environ, "PYTHONPATH": str(packages)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_and_there(package: str) -> None:
    module = importlib.import_module(package)
    names = list(getattr(module, "__all__", ()))
    assert names == sorted(set(names))
    assert [name for name in names if not hasattr(module, name)] == []


def test_names_that_are_imported_late_are_listed_and_typos_are_not_forgiven() -> None:
    program = (
        "import agent_memory_core as core\n"
        "assert set(core.__all__) <= set(dir(core))\n"
        "from agent_memory_core import *\n"
        "assert AgentMemory.__module__ == 'agent_memory_core.memory'\n"
        "assert core.AgentMemory is AgentMemory\n"
        "print(hasattr(core, 'AgentMemry'))\n"
    )
    assert run(program) == "False"


HEAVY = ("huggingface_hub", "mlx", "mlx_lm", "numpy", "torch", "transformers")
"""Packages that only a loaded model needs. MLX, mlx-lm and transformers take two seconds to import."""


@pytest.mark.parametrize(
    "package", ["agent_memory_core", "langchain_agent_memory", "llama_index_agent_memory"]
)
def test_importing_a_package_imports_nothing_that_only_a_model_needs(package: str) -> None:
    pytest.importorskip(package)
    program = f"import sys, {package}; print(*sorted(set(sys.modules) & set(sys.argv[1].split(','))))"
    # LlamaIndex itself imports numpy.
    heavy = [name for name in HEAVY if name != "numpy" or package != "llama_index_agent_memory"]
    assert run(program, ",".join(heavy)) == ""


def test_no_help_imports_what_only_a_model_needs() -> None:
    program = (
        "import contextlib, io, sys\n"
        "import typer\n"
        "from agent_memory_core.cli.main import app, main\n"
        "def paths(group, path):\n"
        "    yield path\n"
        "    for name, command in getattr(group, 'commands', {}).items(): yield from paths(command, [*path, name])\n"
        "heavy, helped = sys.argv[1].split(','), []\n"
        "for path in paths(typer.main.get_command(app), []):\n"
        "    sys.argv = ['agent-memory', *path, '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit): main()\n"
        "    assert 'Usage' in shown.getvalue(), path\n"
        "    helped.append(path)\n"
        "print(len(helped), *sorted(set(sys.modules) & set(heavy)))\n"
    )
    count, *imported = run(program, ",".join(HEAVY)).split()
    assert int(count) > 10
    assert imported == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_are_typed(package: str) -> None:
    assert (SRC / package / "py.typed").is_file()


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    files = [file for folder in (SRC, SRC.parent / "tests") for file in folder.rglob("*.py")]
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(files) > 500
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_the_core_imports_no_framework() -> None:
    # Ray is too heavy for the tools of developers; a module that needs it is looked at where it is installed.
    program = (
        "import importlib, sys\n"
        "known, modules = sys.argv[1].split(','), sys.argv[2].split(',')\n"
        "for module in modules:\n"
        "    try: importlib.import_module(module)\n"
        "    except ModuleNotFoundError as missing: assert missing.name == 'ray', missing\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & set(known)))\n"
    )
    assert run(program, ",".join(FRAMEWORKS), ",".join(CORE)) == ""


def test_no_package_imports_mlx_before_a_models_first_call() -> None:
    program = (
        "import sys\n"
        "def loaded(): return sorted({'mlx', 'mlx_lm', 'transformers', 'huggingface_hub'} & set(sys.modules))\n"
        "import agent_memory_core\n"
        "print(loaded())\n"
        "from langchain_agent_memory import ChatMLXPersistent\n"
        "print(loaded())\n"
        "from llama_index_agent_memory import MLXPersistentLLM\n"
        "print(loaded())\n"
        "for adapter in (ChatMLXPersistent, MLXPersistentLLM):\n"
        "    assert adapter(model='tiny-chat', cache_dir=None).memory.stated_context_length\n"
        "print(loaded())\n"
    )
    assert run(program).splitlines() == ["[]"] * 4


def imported() -> dict[str, Path]:
    """Every package outside the standard library that ``src`` imports, anywhere in a file, and one file that does."""
    found: dict[str, Path] = {}
    for path in SRC.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "required",
                "importlib.import_module",
            ):
                names = [
                    a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)
                ]
            found |= {name.split(".")[0]: path for name in names}
    return {n: path for n, path in found.items() if n not in sys.stdlib_module_names and n not in PACKAGES}


def declared() -> set[str]:
    """The distributions that a user may be told to install: the dependencies, and all extras but the project's own."""
    project = tomllib.loads((SRC.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (
        lines
        for extra, lines in project["optional-dependencies"].items()
        if extra not in ("dev", "docs") and not extra.endswith("-tests")
    )
    lines = [*project["dependencies"], *chain.from_iterable(extras)]
    names = {re.split(r"[\[<>=;~! ]", line)[0].lower().replace("_", "-") for line in lines}
    return names - {project["name"]}


# MemOS cannot be in one environment with us, and LangChain's own class of endpoints is its users' to install.
ELSEWHERE = {"memos", "langchain_openai"}

DISTRIBUTIONS = {"llama_cpp": {"llama-cpp-python"}}
"""Names of distributions that are other than those of their packages, and may not be installed."""


# It reads the files of every installed distribution.
all_distributions = cache(packages_distributions)


def distributions_of(package: str) -> set[str]:
    if package in DISTRIBUTIONS:
        return DISTRIBUTIONS[package]
    return {name.lower().replace("_", "-") for name in all_distributions().get(package, [package])}


def test_every_package_that_is_imported_is_declared() -> None:
    known = declared()
    found = {n: path for n, path in imported().items() if n not in ELSEWHERE}
    missing = {n: str(path) for n, path in found.items() if not distributions_of(n) & known}
    assert missing == {}


def test_every_dependency_is_imported() -> None:
    used = set().union(*map(distributions_of, imported()))
    # The library of the one is loaded by name, and uvicorn takes the others where they are there.
    assert declared() - used == {OPENBLAS, "httptools", "uvloop"}


def test_the_wheel_holds_every_profile_and_finds_them(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(SRC.parent))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "installed")
    program = (
        "from agent_memory_core.models.profile import find_profile, shipped_directory\n"
        "names = sorted(path.stem for path in shipped_directory().glob('*.toml'))\n"
        "print(shipped_directory(), *[find_profile(name, {}).name for name in names], sep='\\n')\n"
    )
    folder, *names = run(program, packages=tmp_path / "installed").splitlines()
    assert Path(folder) == tmp_path / "installed" / "agent_memory_core" / "model_configs"
    assert names == sorted(path.stem for path in (SRC.parent / "model_configs").glob("*.toml"))
    assert (tmp_path / "installed" / "agent_memory_core" / "tiny_chat" / "model.safetensors").is_file()
    assert (tmp_path / "installed" / "agent_memory_core" / "storage" / "schema.sql").is_file()


def tree(cls: type, depth: int = 0) -> list[str]:
    """Class names of ``cls`` and its descendants in ``errors``, indented by depth, in the order of the file."""
    lines = ["  " * depth + cls.__name__]
    children = [c for c in vars(errors).values() if inspect.isclass(c) and c.__bases__[0] is cls]
    for child in children:
        lines += tree(child, depth + 1)
    return lines


def drawn() -> list[tuple[str, str]]:
    """The docstring's tree: each line's name with its indentation, and the words beside it."""
    assert errors.__doc__ is not None
    lines = []
    for line in errors.__doc__.splitlines():
        art = line.strip()
        name = art.lstrip("│├└─ ")
        if name and (art != name or name == "AgentMemoryError"):
            depth = (len(art) - len(name)) // 4
            words = name.split(maxsplit=1)
            lines.append(("  " * depth + words[0], words[1] if len(words) > 1 else ""))
    return lines


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    assert [name for name, _ in drawn()] == tree(errors.AgentMemoryError)


def test_what_the_tree_calls_also_a_builtin_is_one() -> None:
    said = {name.strip(): re.search(r"\(also an? (\w+)\)", words) for name, words in drawn()}
    found = {name: match.group(1) for name, match in said.items() if match}
    assert set(found.values()) >= {"ValueError", "KeyError"}
    for name, builtin in found.items():
        assert issubclass(getattr(errors, name), getattr(builtins, builtin)), name


@pytest.mark.parametrize("name", [name.strip() for name, _ in drawn()])
def test_every_error_can_be_caught_as_one_and_says_what_it_was_told(name: str) -> None:
    words = "the model 'x' was not found: check the name."
    error = getattr(errors, name)(words)
    assert isinstance(error, errors.AgentMemoryError)
    assert str(error) == words
