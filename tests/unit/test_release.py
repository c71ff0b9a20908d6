"""What a release needs: workflows whose targets are there, forms that can be read, links that lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
URL = "https://example.org/somebody/agent-memory"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(path: Path) -> list[dict[str, Any]]:
    return list(read(path)["jobs"].values())


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_that_are_there(path: Path) -> None:
    assert len(WORKFLOWS) == 3
    for job in jobs(path):
        assert 0 < job["timeout-minutes"] <= 120
        called = [step["run"] for step in job["steps"] if "run" in step]
        for target in re.findall(r"\bmake ([a-z-]+)", "\n".join(called)):
            assert target in targets(), target
        for used in (step["uses"] for step in job["steps"] if "uses" in step):
            assert re.fullmatch(r"[\w./-]+@(v\d+|release/v\d+)", used), used


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_but_where_it_publishes(path: Path) -> None:
    assert read(path)["permissions"] == {"contents": "read"}
    may = [job["permissions"] for job in jobs(path) if "permissions" in job]
    assert may == ([{"id-token": "write"}] if path.name == "release.yml" else [])


def test_every_python_that_is_claimed_is_tested() -> None:
    claimed = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    tested = read(ROOT / ".github/workflows/test.yml")["jobs"]["linux"]["strategy"]["matrix"]["python"]
    assert set(tested) == claimed


def test_every_distribution_that_is_built_is_published() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    folders = re.search(r"^DISTRIBUTIONS := (.*)$", makefile, re.MULTILINE)[1].split()  # type: ignore[index]
    projects = [tomllib.loads((ROOT / f / "pyproject.toml").read_text(encoding="utf-8")) for f in folders]
    names = [project["project"]["name"] for project in projects]
    published = read(ROOT / ".github/workflows/release.yml")["jobs"]["publish"]["strategy"]["matrix"]
    assert published["distribution"] == [name.replace("-", "_") for name in names]


@pytest.mark.parametrize("name", ["bug", "wish"])
def test_a_form_has_what_a_form_needs(name: str) -> None:
    form = read(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) > 0
    assert all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]


def metadata(folder: Path) -> Any:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (wheel,) = builder.build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(files.read(name).decode())


def test_a_release_has_links_that_hold_on_the_package_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPOSITORY_URL", URL + "/")
    said = metadata(tmp_path)
    addresses = dict(line.split(", ") for line in said.get_all("Project-URL"))
    assert addresses["Repository"] == URL
    links = re.findall(r"\]\(([^)]+)\)", said.get_payload())
    assert len(links) > 10
    for link in links:
        assert link.startswith(URL), link
        kind, path = re.fullmatch(rf"{URL}/(raw|blob)/main/(.+)", link).groups()  # type: ignore[union-attr]
        assert (ROOT / path.partition("#")[0]).is_file(), link
        assert (kind == "raw") == path.endswith(".png")


def test_a_build_that_does_not_know_the_repository_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REPOSITORY_URL", raising=False)
    said = metadata(tmp_path)
    assert said.get_all("Project-URL") is None
    assert said["Description-Content-Type"].startswith("text/markdown")
    assert said.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_links_elsewhere_and_within_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("release_metadata", ROOT / "release_metadata.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    text = "[a](https://a.org) [b](#b) [c](docs/c.md) ![d](docs/d.png)"
    assert module.absolute(text, URL) == (
        f"[a](https://a.org) [b](#b) [c]({URL}/blob/main/docs/c.md) ![d]({URL}/raw/main/docs/d.png)"
    )
