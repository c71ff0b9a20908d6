"""What docs/settings.md says of each option is what both frameworks' models do with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from support.docs_page import Page

from agent_memory_core import AdapterSettings, ChatRequest, InvalidRequest
from langchain_agent_memory import ChatMLXPersistent
from llama_index_agent_memory import MLXPersistentLLM

ROWS = re.findall(r"^\| `(\w+)` \| (.+) \|$", Page("settings.md").section("Options of a call"), re.MULTILINE)
VALUES: dict[str, Any] = {
    "model": "tiny-chat",
    "max_tokens": 3,
    "stop": ["x"],
    "repetition_penalty": 1.5,
    "context_length": 512,
    "timeout": 50,
    "thinking": False,
    "parallel_tool_calls": False,
    "cache_control": {"type": "ephemeral"},
    "metadata": {"for": "a provider"},
    "stream_options": {"include_usage": True},
}
"""A value for each option that is not like any other; True for the rest."""
BASE = {"temperature": 0.0, "max_tokens": 2, "cache_dir": None}


class Asked:
    """A framework's model, and what reached its engine of each call."""

    def __init__(self, model: type[AdapterSettings]) -> None:
        self.make = model
        self.llm: Any = model(**BASE)
        self.seen: list[ChatRequest] = []

    def with_option(self, **option: Any) -> ChatRequest:
        """The request that a call with this option became."""
        ask = self.llm.invoke if isinstance(self.llm, ChatMLXPersistent) else self.llm.complete
        ask("Hi", **option)
        return self.seen.pop()


@pytest.fixture(scope="module", params=[ChatMLXPersistent, MLXPersistentLLM])
def asked(request: pytest.FixtureRequest) -> Iterator[Asked]:
    found = Asked(request.param)
    memory = found.llm.memory
    real = memory._request

    def noted(request: ChatRequest, sampling: Any) -> Any:
        found.seen.append(request)
        return real(request, sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_request", noted)
        yield found
    memory.close()


def rows(pattern: str) -> list[tuple[str, str]]:
    """The options of which the page says something like ``pattern``, with the part of it that is in brackets."""
    found = ((name, re.fullmatch(pattern, says)) for name, says in ROWS)
    return [(name, match[1]) for name, match in found if match]


UNDERSTOOD = rows(r"(?:LlamaIndex: )?understood as `(\w+)`")
OF_THE_MODEL = rows(r"understood as `(\w+)` where the model is made; refused by a call")
NEUTRAL = rows(r"only `(.+)`, `None`, which change nothing; anything else is refused")
IGNORED = rows(r"(?:LlamaIndex: )?(ignored).*")
OWN = rows("(understood): .+")


def knows(asked: Asked, name: str) -> bool:
    return asked.make is MLXPersistentLLM or (name, "LlamaIndex") not in [(n, s[:10]) for n, s in ROWS]


def test_every_line_of_the_page_is_tried() -> None:
    tried = [*UNDERSTOOD, *OF_THE_MODEL, *NEUTRAL, *IGNORED, *OWN]
    assert sorted(name for name, _ in tried) == sorted(name for name, _ in ROWS)
    assert all((UNDERSTOOD, OF_THE_MODEL, NEUTRAL, IGNORED, OWN))


@pytest.mark.parametrize(("name", "own"), UNDERSTOOD)
def test_another_name_is_the_option_itself(asked: Asked, name: str, own: str) -> None:
    if not knows(asked, name):
        with pytest.raises(InvalidRequest, match=f"unknown option '{name}'"):
            asked.with_option(**{name: VALUES[own]})
        return
    plain, same = asked.with_option(), asked.with_option(**{own: VALUES[own]})
    assert asked.with_option(**{name: VALUES[own]}) == same
    assert own == "model" or plain != same, "the value is one that changes something"
    if own in asked.make.model_fields:
        assert getattr(asked.make(**{name: VALUES[own]}), own) == VALUES[own]


@pytest.mark.parametrize(("name", "own"), OF_THE_MODEL)
def test_a_setting_of_the_model_is_refused_by_a_call(asked: Asked, name: str, own: str) -> None:
    assert getattr(asked.make(**{name: VALUES[own]}), own) == VALUES[own]
    with pytest.raises(InvalidRequest, match=f"'{own}' is a setting of the model"):
        asked.with_option(**{name: VALUES[own]})


@pytest.mark.parametrize(("name", "neutral"), NEUTRAL)
def test_only_what_changes_nothing_is_taken(asked: Asked, name: str, neutral: str) -> None:
    values = {"1": 1, "0": 0, "{}": {}}
    plain = asked.with_option()
    for value in (values[neutral], None):
        assert asked.with_option(**{name: value}) == plain
        asked.make(**BASE, **{name: value})
    for other in (2, {"7": 1}):
        with pytest.raises(InvalidRequest, match=f"{name}=.* is not valid"):
            asked.with_option(**{name: other})
        with pytest.raises(ValueError, match=f"{name}=.* is not valid"):
            asked.make(**BASE, **{name: other})


@pytest.mark.parametrize(("name", "_"), IGNORED)
def test_what_is_ignored_changes_nothing(asked: Asked, name: str, _: str) -> None:
    value = VALUES.get(name, True)
    if not knows(asked, name):
        with pytest.raises(InvalidRequest, match=f"unknown option '{name}'"):
            asked.with_option(**{name: value})
        return
    assert asked.with_option(**{name: value}) == asked.with_option()
    asked.make(**BASE, **{name: value})  # a warning would be an error


@pytest.mark.parametrize(("name", "_"), OWN)
def test_a_mistyped_option_is_refused_with_its_name(asked: Asked, name: str, _: str) -> None:
    with pytest.raises(InvalidRequest, match=f"unknown option '{name}z': did you mean {name}"):
        asked.with_option(**{f"{name}z": 1})
