"""The page about LangChain: every example runs as it stands, and prints what the page shows."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from pydantic import BaseModel
from support.docs_page import Page, printed

from langchain_agent_memory import ChatMLXPersistent

PAGE = Page("langchain.md")
SMALL = {"context_length": 256}
"""Settings of an engine in which a long prompt does not fit."""


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store of its own for each example, as for a reader who tries that one alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENT_MEMORY_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setenv("AGENT_MEMORY_MIN_FREE_MB", "0")
    yield
    ChatMLXPersistent().memory.close()
    ChatMLXPersistent(**SMALL).memory.close()


@pytest.mark.parametrize(("code", "output"), PAGE.parameters(heavy=["Long tool results"]))
def test_an_example_runs_and_prints_what_the_page_shows(code: str, output: str | None) -> None:
    found = printed(code)
    assert output is None or found == output


def test_the_second_run_after_a_restart_is_warm() -> None:
    code, shown = PAGE.restart()
    printed(code)
    ChatMLXPersistent().memory.close()
    assert printed(code) == shown


def test_the_examples_of_the_class_run_one_after_another() -> None:
    code = re.findall(r"```python\n(.*?)```", inspect.getdoc(ChatMLXPersistent) or "", re.DOTALL)
    assert len(code) == 8
    found = printed(
        "".join(map(textwrap.dedent, code))
        + "print(answer.content, answer.response_metadata['session_id'], answer.response_metadata['miss_reason'])"
    )
    assert found.endswith("Your name is Ada. ada \n")


class Order(BaseModel):
    """An order."""

    items: list[str]


def llm(**settings: Any) -> ChatMLXPersistent:
    return ChatMLXPersistent(temperature=0, **settings)


def ask_a_closed_engine() -> None:
    memory = llm().memory
    memory.close()
    memory.stats()


LIST = {"title": "marks", "type": "array", "items": {"enum": ["a", "b"]}}
IMAGE = HumanMessage([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])
PROVOKED: list[Callable[[], object]] = [
    lambda: llm(modle="tiny-chat"),
    lambda: llm(base_url="https://example.org"),
    lambda: llm().invoke("Hi", num_beams=2),
    lambda: llm().invoke([IMAGE]),
    lambda: llm().invoke("Hi", session_id="\n"),
    lambda: llm().with_structured_output(LIST, method="function_calling"),
    lambda: llm().bind_tools([], tool_choice="any"),
    lambda: llm(model="no-such-model").invoke("Hi"),
    lambda: llm(**SMALL).invoke("Hello! " * 300),
    lambda: llm(max_tokens=8).with_structured_output(Order).invoke("Order tea."),
    lambda: llm(timeout=0.001).invoke("Hello! " * 300),
    ask_a_closed_engine,
]
"""How to come by each error of the page's table, in its order."""


@pytest.mark.parametrize("number", range(len(PROVOKED)))
def test_an_error_says_what_the_page_says(number: int) -> None:
    PAGE.check_errors(PROVOKED, number)
