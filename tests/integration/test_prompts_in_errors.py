"""What a user wrote stands in no error, none of its causes and no line of the log, whatever goes wrong."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from agent_memory_core import (
    AgentMemory,
    AgentMemoryError,
    ChatRequest,
    InvalidSetting,
    Message,
    SamplingParams,
)
from agent_memory_core.environment import resolve_settings

CANARY = "kumquat-7391"
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": CANARY, "parameters": {"type": "object"}},
}
QUOTING = "{%- for m in messages %}{{ raise_exception('cannot take: ' + m.content) }}{%- endfor %}"
"""A template that refuses all messages, in their own words."""
REFUSING = "{%- for m in messages %}{{ raise_exception('only one speaker is allowed') }}{%- endfor %}"


def texts_of(error: BaseException) -> str:
    """All that a traceback, a log or a report could show of an error."""
    chain: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and one not in chain:
            chain.append(one)
            todo += [one.__cause__, None if one.__suppress_context__ else one.__context__]
    shown = traceback.TracebackException.from_exception(error, capture_locals=False).format()
    # Lines of source are those of the test, which names the canary.
    lines = [line for line in "".join(shown).splitlines() if "test_prompts_in_errors" not in line]
    return " ".join(map(repr, chain)) + " ".join(map(str, chain)) + "".join(lines[-1:])


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentMemory]:
    model = tiny_models.write(tmp_path_factory.mktemp("models") / "llama", tiny_models.LLAMA)
    store = tmp_path_factory.mktemp("store")
    with AgentMemory(
        model=model, cache_dir=store, min_free_mb=0, memory_budget_mb=16, context_length=256
    ) as opened:
        yield opened


def asked(*messages: Message, **more: Any) -> ChatRequest:
    return ChatRequest(messages, sampling=SamplingParams(max_tokens=4, temperature=0), **more)


USER = Message("user", CANARY)
WRONG: dict[str, Callable[[AgentMemory], object]] = {
    "too long": lambda memory: memory.chat(CANARY * 500),
    "a lone surrogate": lambda memory: memory.chat(CANARY + "\ud800"),
    "another lone surrogate": lambda memory: memory.chat(CANARY + "\udcff"),
    "a role that is none": lambda memory: memory.chat(
        [{"role": "user", "content": CANARY}, {"content": CANARY}]
    ),
    "content of a wrong type": lambda memory: memory.chat([{"role": "user", "content": [CANARY]}]),
    "no mapping": lambda memory: memory.chat([[CANARY]]),  # type: ignore[list-item]
    "a tool that is not there": lambda memory: memory.chat(asked(USER, tools=(TOOL,), tool_choice="walk")),
    "two forms": lambda memory: memory.chat(
        asked(USER, tools=(TOOL,), tool_choice="look", response_schema={"type": "object"})
    ),
    "a schema that cannot be held": lambda memory: memory.chat(
        asked(USER, response_schema={"type": "array", "uniqueItems": True})
    ),
    "an answer to be continued": lambda memory: memory.chat(asked(USER, continue_final_message=True)),
    "a deadline": lambda memory: memory.chat(asked(USER, timeout=0.0001)),
    "a template argument": lambda memory: memory.chat(asked(USER, template_kwargs={"tokenize": True})),
    "an unknown option": lambda memory: memory.chat(CANARY, max_token=3),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_no_error_quotes_the_prompt(memory: AgentMemory, caplog: pytest.LogCaptureFixture, what: str) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises((AgentMemoryError, TypeError)) as raised:
        WRONG[what](memory)
    assert CANARY not in texts_of(raised.value)
    assert CANARY not in caplog.text


def with_template(tmp_path: Path, template: str) -> str:
    model = tiny_models.write(tmp_path / "model", tiny_models.LLAMA)
    (Path(model) / "chat_template.jinja").write_text(template)
    return model


def test_a_template_that_quotes_messages_is_not_quoted_and_another_one_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for number, template in enumerate((QUOTING, REFUSING)):
        with AgentMemory(model=with_template(tmp_path / str(number), template), cache_dir=None) as memory:
            with pytest.raises(AgentMemoryError) as raised:
                memory.chat(CANARY)
            assert CANARY not in texts_of(raised.value)
            assert ("only one speaker is allowed" in str(raised.value)) == (template == REFUSING)
    assert CANARY not in caplog.text


def test_a_fault_inside_the_engine_names_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    model = tiny_models.write(tmp_path / "model", tiny_models.LLAMA)
    with AgentMemory(model=model, cache_dir=None) as memory:
        memory.chat(CANARY, max_tokens=1)

        def fails(*arguments: Any, **more: Any) -> None:
            raise RuntimeError("a part of the model broke")

        memory._thread.call(lambda engine: setattr(engine.runner, "prefill", fails)).result()
        with pytest.raises(AgentMemoryError) as raised:
            memory.chat(CANARY + " again", max_tokens=1)
    assert CANARY not in texts_of(raised.value)
    assert CANARY not in caplog.text


def test_a_key_in_the_place_of_a_word_is_not_repeated() -> None:
    key = "ab" * 32
    for given, environ in (({"encryption": key}, {}), ({}, {"AGENT_MEMORY_ENCRYPTION": key})):
        with pytest.raises(InvalidSetting, match="encryption") as raised:
            resolve_settings(given, environ, {})
        assert key not in texts_of(raised.value)
