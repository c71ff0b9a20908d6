"""The page that compares: what it says of sizes, steps and commands is what the scripts do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from support.benchmark_scripts import load_benchmark

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")


rivals: Any = load_benchmark("rivals")
geometries: Any = load_benchmark("geometries")


def test_each_step_is_explained_with_its_sizes() -> None:
    explained = dict(re.findall(r"^\| (\w+) \| (.+) \|$", PAGE, re.MULTILINE))
    assert tuple(name for name in explained if name in rivals.TIMES) == rivals.TIMES
    sizes = rivals.Sizes()
    for name, tokens in (
        ("cold", sizes.prompt),
        ("hot", sizes.new),
        ("known", sizes.system),
        ("loaded", sizes.long),
    ):
        assert f"{tokens:,} tokens" in explained[name]
    assert f"{sizes.answer} greedy tokens" in PAGE.replace("\n", " ")


def test_commands_are_targets_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make ([\w-]+)$", PAGE, re.MULTILINE)
    assert commands == ["bench-rivals", "bench-geometries"]
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)


def test_the_figures_of_the_paper_are_those_that_are_set_beside_ours() -> None:
    for name, geometry in geometries.GEOMETRIES.items():
        row = " | ".join(f"{milliseconds:,}" for milliseconds in geometry.paper[4096])
        assert f"| {name} | {row} |" in PAGE


def test_the_memory_that_is_named_is_what_is_asked_for() -> None:
    needed = [(shape.weights + geometries.ROOM) // geometries.GIB for shape in geometries.GEOMETRIES.values()]
    assert f"{min(needed)} to {max(needed)} GiB" in PAGE.replace("\n", " ")


def test_what_was_not_run_is_said_so_until_there_is_a_result() -> None:
    measured = (ROOT / "benchmarks" / "results" / "geometries.json").exists()
    assert ("This was not run yet" in PAGE) is not measured
