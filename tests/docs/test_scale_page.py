"""The page about several machines: its examples and commands run as they stand, and the tests it names are there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from support import command_line
from support.docs_page import Page, printed

from agent_memory_core.server.sessions import OWN_HEADER

PAGE = Page("scale.md")
TESTS = Path(__file__).parents[1] / "unit" / "storage" / "cold"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.text, re.DOTALL)


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")


@pytest.mark.parametrize("number", range(2))
def test_the_examples_run_and_print_what_the_page_shows(number: int) -> None:
    found = list(PAGE.examples())
    assert len(found) == 2
    _, code, output = found[number]
    assert printed(code) == output


def test_the_commands_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGENT_MEMORY_COLD_URL", (tmp_path / "bucket").as_uri())
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("agent-memory")]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        # What would need a cluster is only printed.
        dry = ["--print"] if words[:2] == ["scale", "up"] and "--print" not in words else []
        done = command_line.command(*words, *dry).stdout
        if "scale" in words:
            assert json.loads(done)["applications"][0]["deployments"][0]["num_replicas"] == 3


def test_the_extras_are_there() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"agent-memory-mlx\[(\w+)\]", "".join(blocks("sh")))
    assert extras == ["cold", "scale"]
    assert all(f"\n{extra} = [" in project for extra in extras)


def test_both_proxies_hash_the_header_of_the_server() -> None:
    (nginx,) = blocks("nginx")
    assert f"hash $http_{OWN_HEADER.replace('-', '_')} consistent;" in nginx
    assert nginx.count("{") == nginx.count("}")
    envoy = yaml.safe_load(blocks("yaml")[0])
    (cluster,), (route,) = envoy["clusters"], envoy["routes"]
    assert cluster["lb_policy"] == "RING_HASH"
    assert cluster["name"] == cluster["load_assignment"]["cluster_name"] == route["route"]["cluster"]
    assert route["route"]["hash_policy"] == [{"header": {"header_name": OWN_HEADER}}]


def test_the_tests_that_are_named_are_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", PAGE.text)
    assert len(named) >= 14
    for file, name in named:
        path = TESTS / file if "/" not in file else Path(__file__).parents[2] / file
        assert f"def {name}(" in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize("page", ["README.md", "docs/server.md"])
def test_it_is_linked(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    assert "scale.md)" in text
