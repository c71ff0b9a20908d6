"""The page about the server: its examples run against one, and its tables are complete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import http_server
from support.docs_page import Page, printed

from agent_memory_core import AgentMemory
from agent_memory_core.server import ServerSettings
from agent_memory_core.server.gate import OPEN_PATHS
from agent_memory_core.server.sessions import CLIENT_HEADERS, METADATA_NAMES

PAGE = Page("server.md")
EXAMPLES = list(PAGE.examples())

# The examples leave closing their clients to the end of the interpreter.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("store")
    memory = AgentMemory(cache_dir=folder, memory_budget_mb=128, min_free_mb=0, max_batch_size=1)
    with memory, http_server.serve(memory) as running:
        yield running.url


@pytest.mark.parametrize(
    ("code", "output"), [example[1:] for example in EXAMPLES], ids=[title for title, *_ in EXAMPLES]
)
def test_an_example_runs_and_prints_what_the_page_shows(code: str, output: str | None, url: str) -> None:
    found = printed(code.replace("http://127.0.0.1:8000", url))
    assert output is None or found == output


def test_the_table_has_every_setting_with_its_description() -> None:
    for name, field in ServerSettings.model_fields.items():
        line = next(line for line in PAGE.text.splitlines() if line.startswith(f"| `{name}` |"))
        assert line.endswith(f"| {field.description} |"), name


def test_the_names_of_sessions_and_the_open_paths_are_those_of_the_server() -> None:
    for name in (*CLIENT_HEADERS, *METADATA_NAMES, *OPEN_PATHS):
        assert f"`{name}`" in PAGE.text, name
