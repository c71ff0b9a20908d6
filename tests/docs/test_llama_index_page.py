"""The page about LlamaIndex: every example runs as it stands, and prints what the page shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, ImageBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel
from support.docs_page import Page, printed

from llama_index_agent_memory import MLXPersistentLLM

PAGE = Page("llama-index.md")
SMALL = {"context_length": 256}
"""Settings of an engine in which a long prompt does not fit."""

pytestmark = [
    # A context says so whenever it is saved, and the page tells what to do.
    pytest.mark.filterwarnings("ignore::workflows.context.state_store.UnserializableKeyWarning"),
    # LlamaIndex looks through its own agents in a way that pydantic warns of.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store of its own for each example, as for a reader who tries that one alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")
    yield
    MLXPersistentLLM().memory.close()
    MLXPersistentLLM(**SMALL).memory.close()


# The one about a restart needs two processes, see below.
EXAMPLES = [example for example in PAGE.examples() if example[0] != "After a restart"]


def in_a_process(code: str) -> str:
    """What an example prints in a process of its own.

    LlamaIndex opens a database for each Memory and leaves closing it to the end of the interpreter.
    """
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("code", "output"),
    [(code, output) for _, code, output in EXAMPLES],
    ids=[title for title, *_ in EXAMPLES],
)
def test_an_example_runs_and_prints_what_the_page_shows(code: str, output: str | None) -> None:
    opens_database = "Memory.from_defaults" in code or "ChatEngine" in code
    found = in_a_process(code) if opens_database else printed(code)
    assert output is None or found == output


def test_the_second_run_after_a_restart_is_warm() -> None:
    code, shown = PAGE.restart()
    assert in_a_process(code).startswith("none")
    assert in_a_process(code) == shown


class Order(BaseModel):
    """An order."""

    items: list[str]


def llm(**settings: Any) -> MLXPersistentLLM:
    return MLXPersistentLLM(temperature=0, **settings)


def note(text: str) -> str:
    """Write a note."""
    return text


def ask_a_closed_engine() -> None:
    memory = llm().memory
    memory.close()
    memory.stats()


IMAGE = ChatMessage(role="user", blocks=[ImageBlock(url="https://example.org/a.png")])
PROVOKED: list[Callable[[], object]] = [
    lambda: llm(modle="tiny-chat"),
    lambda: llm(base_url="https://example.org"),
    lambda: llm().complete("Hi", num_beams=2),
    lambda: llm().chat([IMAGE]),
    lambda: llm().complete("Hi", session_id="\n"),
    lambda: llm().chat([ChatMessage("Hi", role="user")], tool_choice="any"),
    lambda: llm(model="no-such-model").complete("Hi"),
    lambda: llm(**SMALL).complete("Hello! " * 300),
    lambda: llm(max_tokens=8).structured_predict(Order, PromptTemplate("Order tea.")),
    lambda: llm(timeout=0.001).complete("Hello! " * 300),
    ask_a_closed_engine,
]
"""How to come by each error of the page's table, in its order."""


@pytest.mark.parametrize("number", range(len(PROVOKED)))
def test_an_error_says_what_the_page_says(number: int) -> None:
    PAGE.check_errors(PROVOKED, number)


def test_a_call_without_tools_is_text() -> None:
    answer = llm().chat_with_tools([FunctionTool.from_defaults(note)], "My name is Ada.", max_tokens=8)
    assert answer.message.content
