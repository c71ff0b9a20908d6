"""The documentation as a whole: the site builds without a warning, no link is dead, every example is run by a test."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import command_line_page
from support.docs_page import Page, printed

from agent_memory_core import UnknownSetting

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in (*PAGES, *ROOT.glob("*.md"))}
NEW = [Page(name) for name in ("quick-start.md", "concepts.md")]


@pytest.mark.parametrize(
    ("code", "output"),
    [example[1:] for page in NEW for example in page.examples()],
    ids=[f"{page.name}: {title}" for page in NEW for title, *_ in page.examples()],
)
def test_an_example_prints_what_the_page_shows(
    code: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")
    assert printed(code) == output


def test_every_page_with_an_example_has_a_test_that_runs_it() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    unrun = [path.name for path in PAGES if "```python" in TEXTS[path] and f'"{path.name}"' not in tests]
    assert unrun == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_a_page_has_no_dead_link(path: Path) -> None:
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", TEXTS[path], flags=re.DOTALL)
    ):
        file, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        to = (path.parent / file).resolve() if file else path
        # Pages that the site makes of files of the repository's root.
        assert to.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(to.read_text(encoding="utf-8")), f"{path.name}: {target}"


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


COMMANDS = dict(command_line_page.commands())


def test_the_commands_that_pages_show_are_there_with_their_options() -> None:
    shown = [
        (path.name, line.partition("#")[0])
        for path, text in TEXTS.items()
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("agent-memory ") and not set(line) & set("|<>$")
    ]
    assert len(shown) > 10
    for page, line in shown:
        words = shlex.split(line)[1:]
        names = tuple(word for word in words[:2] if not word.startswith("-"))
        found = COMMANDS.get(names) or COMMANDS.get(names[:1])
        assert found is not None, f"{page}: {line}"
        known = {option for param in found.params for option in (*param.opts, *param.secondary_opts)}
        if not found.context_settings.get("ignore_unknown_options"):
            assert {word for word in words if word.startswith("--")} <= known | {"--help"}, f"{page}: {line}"


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    written = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert written == command_line_page.page(), (
        "python tests/support/command_line_page.py > docs/command-line.md"
    )


def test_every_command_and_option_has_help() -> None:
    for path, command in COMMANDS.items():
        assert command.help, path
        assert [param.name for param in command.params if not param.help] == [], path


def errors() -> set[str]:
    """Every error of the core, in whatever module it is declared, by what it inherits from."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in (ROOT / "src" / "agent_memory_core").rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    found = {"AgentMemoryError"}
    while more := {name for name, of in bases.items() if of & found and name not in found}:
        found |= more
    return {name for name in found - {"AgentMemoryError"} if not name.startswith("_")}


def test_what_lists_or_shows_prints_json_too() -> None:
    verbs = {"list", "show", "check", "stats", "doctor", "bench", "prune", "verify"}
    shown = {path: command for path, command in COMMANDS.items() if path[-1] in verbs}
    assert len(shown) >= 10
    for path, command in shown.items():
        assert any("--json" in param.opts for param in command.params), path


def test_troubleshooting_has_every_error_and_no_other() -> None:
    assert {"AgentsBusy", "ModelTooLarge", "StoreFull"} <= errors()
    page = TEXTS[ROOT / "docs" / "troubleshooting.md"]
    told = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    assert sorted(told) == sorted({*errors(), UnknownSetting.__name__})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environ = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_page(site: Path) -> None:
    for path in PAGES:
        name = "index.html" if path.stem == "index" else f"{path.stem}/index.html"
        assert (site / name).is_file(), path.name
    for path in NOTEBOOKS:
        assert (site / "notebooks" / path.stem / "index.html").is_file(), path.name
    assert "time_to_first_token" in (site / "api" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="(https?:[^"]+)"', text)
        loaded += re.findall(
            r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="(https?:[^"]+)"', text
        )
        assert loaded == [], path
