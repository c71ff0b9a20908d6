"""What has to hold of any adapter's model.

`CASES` and `ASYNC_CASES` are properties of a model on the real engine. Each framework's test file runs them all with an
`Adapter` of its own, which says how that framework asks and how it shows an answer.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from pydantic import ValidationError

from agent_memory_core import (
    DeadlineExceeded,
    InvalidRequest,
    InvalidSetting,
    ModelNotFound,
    PromptTooLong,
    environment,
)
from agent_memory_core.config import ModelName
from agent_memory_core.models import profile

# Adapters

History = Sequence[tuple[str, str]]
"""A conversation as pairs of role and text."""

RULES = "You are a careful assistant who remembers what people say. " * 12
QUESTION: History = (("system", RULES), ("user", "My name is Ada. What is my name?"))


@dataclass(frozen=True)
class Answer:
    """An answer as a framework shows it."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cache_read: int
    metadata: dict[str, Any]
    """Where `MEASURED` and the like are found."""


class Adapter(Protocol):
    """How one framework makes a model and asks it. Options are those of its calls."""

    model: Callable[..., Any]

    def ask(self, llm: Any, history: History, **options: Any) -> Answer: ...
    async def aask(self, llm: Any, history: History, **options: Any) -> Answer: ...
    def stream(self, llm: Any, history: History, **options: Any) -> Iterator[str]: ...
    def astream(self, llm: Any, history: History, **options: Any) -> AsyncIterator[str]: ...
    def count(self, llm: Any, history: History) -> int: ...


@dataclass(frozen=True)
class Bench:
    """What a case works on."""

    adapter: Adapter
    llm: Any
    """A model on one engine for all cases, greedy, with answers of at most 24 tokens."""
    folder: Path
    """An empty folder of this case."""
    patch: pytest.MonkeyPatch


def _idle(llm: Any) -> bool:
    numbers = llm.memory.stats()
    return not (numbers.waiting or numbers.running)


def wait_until(done: Callable[[], bool]) -> None:
    """Return when ``done``, and fail where that takes longer than any machine needs."""
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Construction


def constructing_loads_and_touches_nothing(bench: Bench) -> None:
    model = bench.adapter.model(model="no/such/model", cache_dir=bench.folder / "caches")
    assert not list(bench.folder.iterdir())
    with pytest.raises(ModelNotFound, match="no/such/model"):
        bench.adapter.ask(model, [("user", "hi")])


def a_slip_of_a_fields_name_is_refused_with_the_name(bench: Bench) -> None:
    slips = {
        "modle": "model",
        "temprature": "temperature",
        "max_token": "max_tokens",
        "cache_directory": "cache_dir",
        "num_predicts": "num_predict",
        "kv_bit": "kv_bits",
    }
    for slip, name in slips.items():
        with pytest.raises(ValidationError, match=f"{slip}.*did you mean {name}"):
            bench.adapter.model(**{slip: 1})


def names_of_other_packages_are_understood(bench: Bench) -> None:
    others: dict[str, Any] = {
        "model_path": Path("/no/such/model"),
        "num_predict": 5,
        "num_ctx": 512,
        "repeat_penalty": 1.5,
        "request_timeout": 20,
        "stop_sequences": "x",
        "prompt_cache_key": "ada",
        "max_retries": 3,
        "streaming": True,
        "n": 1,
    }
    model = bench.adapter.model(**others)
    told = (model.model, model.max_tokens, model.context_length, model.repetition_penalty, model.timeout)
    assert told == ("/no/such/model", 5, 512, 1.5, 20)
    assert (model.stop, model.session_id) == (["x"], "ada")
    with pytest.raises(ValidationError, match="num_predict=5 and max_tokens=6 disagree"):
        bench.adapter.model(num_predict=5, max_tokens=6)
    with pytest.raises(ValidationError, match="n=2 is not valid"):
        bench.adapter.model(n=2)
    short = bench.adapter.ask(
        bench.llm, QUESTION, max_new_tokens=2, presence_penalty=0, user="u", max_retries=2
    )
    assert short.completion_tokens == 2
    with pytest.raises(InvalidRequest, match="frequency_penalty=1 is not valid"):
        bench.adapter.ask(bench.llm, QUESTION, frequency_penalty=1)
    with pytest.raises(InvalidRequest, match="'context_length' is a setting of the model"):
        bench.adapter.ask(bench.llm, QUESTION, num_ctx=128)


def what_is_assigned_is_checked(bench: Bench) -> None:
    model = bench.adapter.model(max_tokens=9)
    with pytest.raises(ValidationError, match="temperature=-1"):
        model.temperature = -1
    with pytest.raises(ValidationError):
        model.max_tokens = "many"
    assert (model.temperature, model.max_tokens) == (None, 9)
    model.temperature, model.max_tokens = "0.5", 3
    assert model._given(model.SAMPLING_FIELDS) == {"temperature": 0.5, "max_tokens": 3}


def what_was_not_given_is_not_shown_as_a_fact(bench: Bench) -> None:
    shown = repr(bench.adapter.model(max_tokens=9))
    assert "max_tokens=9" in shown
    assert not [name for name in ("cache_dir", "kv_bits", "temperature", "model=") if name in shown]


def thinking_is_told_to_the_chat_template(bench: Bench) -> None:
    fields: dict[str, Any] = {"reasoning_effort": "low", "chat_template_kwargs": {"a": 1, "b": 2}}
    model = bench.adapter.model(**fields)
    assert model._template_kwargs() == {"enable_thinking": True, "reasoning_effort": "low", "a": 1, "b": 2}
    for said in (False, "none", {"effort": "none"}, {"type": "disabled"}):
        assert bench.adapter.model(thinking=said)._template_kwargs() == {"enable_thinking": False}
    seen: list[Any] = []
    real = bench.llm.memory._request

    def noted(request: Any, sampling: Any) -> Any:
        seen.append(dict(request.template_kwargs))
        return real(request, sampling)

    bench.patch.setattr(bench.llm.memory, "_request", noted)
    for option in ({"thinking": True}, {"reasoning": {"effort": "high"}}, {"chat_template_kwargs": {"x": 1}}):
        bench.adapter.ask(bench.llm, QUESTION, max_tokens=1, **option)
    assert seen == [
        {"enable_thinking": True},
        {"enable_thinking": True, "reasoning_effort": "high"},
        {"x": 1},
    ]
    with pytest.raises(InvalidRequest, match="reasoning_effort='lots'"):
        bench.adapter.ask(bench.llm, QUESTION, reasoning_effort="lots")


IMPOSSIBLE: Sequence[tuple[dict[str, Any], type[Exception]]] = (
    ({"max_tokens": 0}, InvalidRequest),
    ({"top_p": 1.5}, InvalidRequest),
    ({"stop": [""]}, InvalidRequest),
    ({"max_batch_size": 0}, InvalidSetting),
    ({"block_tokens": 100}, InvalidSetting),
    ({"model": ""}, InvalidSetting),
    ({"timeout": 0}, InvalidRequest),
    ({"timeout": float("nan")}, InvalidRequest),
    ({"reasoning_effort": "lots"}, InvalidRequest),
)


def an_impossible_value_is_refused_by_name(bench: Bench) -> None:
    for values, error in IMPOSSIBLE:
        (name,) = values
        with pytest.raises(ValidationError, match=f"{name}=.* is not valid") as refused:
            bench.adapter.model(**values)
        assert isinstance(refused.value.errors()[0]["ctx"]["error"], error)


def every_spelling_of_a_folder_is_one_engine(bench: Bench) -> None:
    bench.patch.chdir(bench.folder)
    (bench.folder / "d").mkdir()
    (bench.folder / "link").symlink_to("d")
    spellings = ["d", "d/", "./d", "link", bench.folder / "d", Path("d")]
    models = [
        bench.adapter.model(model=model, cache_dir=cache, adapter_path=cache)
        for model, cache in zip(spellings, reversed(spellings), strict=True)
    ]
    assert [model.model for model in models] == [str(spelling) for spelling in spellings]
    bench.patch.chdir("/")
    assert len({model.memory for model in models}) == 1
    assert models[0].memory.config.cache_dir == bench.folder / "d"
    models[0].memory.close()


# Memory


def the_next_turn_pays_for_new_tokens_only(bench: Bench) -> None:
    first = bench.adapter.ask(bench.llm, QUESTION, session_id="turns")
    history = [*QUESTION, ("assistant", first.text), ("user", "Thank you.")]
    again = bench.adapter.ask(bench.llm, history, session_id="turns")
    # All of the first turn but its last token, whose key and value were never needed.
    assert again.cache_read >= first.prompt_tokens + first.completion_tokens - 2
    wanted = {"hit_tier": "hot", "miss_reason": "", "session_id": "turns", "persisted": True}
    assert {name: again.metadata[name] for name in wanted} == wanted
    assert again.metadata["ttft_ms"] > 0
    # Programs keep the metadata with their messages: it has to be of plain types.
    assert not any(isinstance(value, ModelName) for value in again.metadata.values())


def a_session_survives_a_restart(bench: Bench) -> None:
    def answer(history: History, cache_dir: Path | None, *before: History) -> Answer:
        model = bench.adapter.model(cache_dir=cache_dir, temperature=0, max_tokens=24)
        try:
            for earlier in before:
                bench.adapter.ask(model, earlier, session_id="ada")
            return bench.adapter.ask(model, history, session_id="ada")
        finally:
            model.memory.close()

    first = answer(QUESTION, bench.folder)
    history = [*QUESTION, ("assistant", first.text), ("user", "Say my name again.")]
    restarted = answer(history, bench.folder)
    assert restarted.metadata["hit_tier"] == "warm"
    assert restarted.cache_read > 0
    assert answer(history, None, QUESTION).text == restarted.text


def sessions_and_namespaces_are_the_callers(bench: Bench) -> None:
    for session_id, namespace in (("mine", "a"), ("yours", "b"), (None, "c")):
        bench.adapter.ask(bench.llm, [("user", "hi")], session_id=session_id, namespace=namespace)
    found = {space: [s.session_id for s in bench.llm.memory.sessions(space)] for space in ("a", "b", "c")}
    assert found == {"a": ["mine"], "b": ["yours"], "c": []}


# Options of a call


def an_answer_ends_before_a_stop_string(bench: Bench) -> None:
    text = bench.adapter.ask(bench.llm, QUESTION).text
    word = text.split()[-1]
    cut = text[: text.index(word)]
    assert bench.adapter.ask(bench.llm, QUESTION, stop=[word]).text == cut
    stopped = bench.llm.model_copy(update={"stop": [word]})
    assert bench.adapter.ask(stopped, QUESTION).text == cut
    assert bench.adapter.ask(stopped, QUESTION, stop=[]).text == text


def sampling_of_a_call_goes_before_that_of_the_model(bench: Bench) -> None:
    short = bench.adapter.ask(bench.llm, QUESTION, max_completion_tokens=2)
    assert short.completion_tokens == 2
    assert short.metadata["finish_reason"] == "length"
    hot = [bench.adapter.ask(bench.llm, QUESTION, temperature=5.0, seed=seed).text for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def an_answer_is_continued_where_it_is_asked_for(bench: Bench) -> None:
    whole = bench.adapter.ask(bench.llm, QUESTION).text
    begun = whole[: whole.index(" ")]
    options = {"continue_final_message": True, "session_id": "continued"}
    rest = bench.adapter.ask(bench.llm, [*QUESTION, ("assistant", begun)], **options)
    assert begun + rest.text == whole
    closed = bench.adapter.ask(bench.llm, [*QUESTION, ("assistant", begun)], session_id="closed")
    assert begun + closed.text != whole
    history = [*QUESTION, ("assistant", whole), ("user", "Thank you.")]
    again = bench.adapter.ask(bench.llm, history, session_id="continued")
    assert again.cache_read >= rest.prompt_tokens + rest.completion_tokens - 2
    with pytest.raises(InvalidRequest, match="continue_final_message=True is not valid"):
        bench.adapter.ask(bench.llm, QUESTION, continue_final_message=True)


def an_unknown_option_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match=r"'tempreature': did you mean temperature\?"):
        bench.adapter.ask(bench.llm, QUESTION, tempreature=1)
    with pytest.raises(InvalidRequest, match="temperature=-1"):
        bench.adapter.ask(bench.llm, QUESTION, temperature=-1)


def a_prompt_that_cannot_fit_is_refused(bench: Bench) -> None:
    with pytest.raises(PromptTooLong):
        bench.adapter.ask(bench.llm, [("user", "word " * 20_000)])


def ten_calls_read_no_file_and_no_variable_again(bench: Bench) -> None:
    bench.adapter.ask(bench.llm, QUESTION)
    # An opened store looks at all its files once, in a thread of its own that no call waits for.
    wait_until(lambda: not any(thread.name == "agent-memory-reconcile" for thread in threading.enumerate()))
    reads: list[str] = []

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            return real(*args, **kwargs)

        bench.patch.setattr(owner, name, counting)

    counted(Path, "glob")
    counted(os, "scandir")
    counted(tomllib, "loads")
    counted(environment, "_value")
    counted(profile, "_profile")
    environment._read_variables.cache_clear()
    bench.patch.setenv("AGENT_MEMORY_TOP_K", "3")
    for _ in range(10):
        bench.adapter.ask(bench.llm, QUESTION, max_tokens=1)
    assert reads == ["_value"], "the new variable, once"


# Side by side and withdrawn


async def many_at_once_answer_as_one_by_one(bench: Bench) -> None:
    questions = [[("user", f"My name is {name}. What is my name?")] for name in ("Ada", "Mia", "Tom", "Eva")]
    one_by_one = [await bench.adapter.aask(bench.llm, question) for question in questions]
    at_once = await asyncio.gather(
        *(bench.adapter.aask(bench.llm, q, session_id=f"at once {i}") for i, q in enumerate(questions))
    )
    assert [answer.text for answer in at_once] == [answer.text for answer in one_by_one]


LONG: dict[str, Any] = {"max_tokens": 4000, "temperature": 5.0, "seed": 7}
"""Options of an answer that does not end soon."""


async def every_route_gives_the_same_answer(bench: Bench) -> None:
    expected = bench.adapter.ask(bench.llm, QUESTION).text
    pieces = list(bench.adapter.stream(bench.llm, QUESTION))
    assert expected
    assert len(pieces) > 1
    assert "".join(pieces) == expected
    assert (await bench.adapter.aask(bench.llm, QUESTION)).text == expected
    assert "".join([piece async for piece in bench.adapter.astream(bench.llm, QUESTION)]) == expected


def leaving_a_stream_frees_its_place(bench: Bench) -> None:
    stream = bench.adapter.stream(bench.llm, QUESTION, **LONG)
    next(stream)
    assert not _idle(bench.llm)
    del stream
    wait_until(lambda: _idle(bench.llm))


async def leaving_an_async_stream_frees_its_place(bench: Bench) -> None:
    async for _ in bench.adapter.astream(bench.llm, QUESTION, **LONG):
        break
    await asyncio.to_thread(wait_until, lambda: _idle(bench.llm))


def an_answer_is_given_up_in_time(bench: Bench) -> None:
    for options in ({"timeout": 0.001}, {"request_timeout": 0.001}):
        with pytest.raises(DeadlineExceeded, match=r"timeout=0\.001 seconds"):
            bench.adapter.ask(bench.llm, QUESTION, **LONG, **options)
        with pytest.raises(TimeoutError):
            list(bench.adapter.stream(bench.llm, QUESTION, **LONG, **options))
    wait_until(lambda: _idle(bench.llm))
    hasty = bench.llm.model_copy(update={"timeout": 0.001})
    with pytest.raises(DeadlineExceeded):
        bench.adapter.ask(hasty, QUESTION, **LONG)
    assert bench.adapter.ask(hasty, QUESTION, timeout=60, max_tokens=2).completion_tokens == 2
    with pytest.raises(InvalidRequest, match="timeout='soon'"):
        bench.adapter.ask(bench.llm, QUESTION, timeout="soon")


async def an_async_answer_is_given_up_in_time(bench: Bench) -> None:
    with pytest.raises(DeadlineExceeded):
        await bench.adapter.aask(bench.llm, QUESTION, **LONG, timeout=0.001)
    with pytest.raises(DeadlineExceeded):
        async for _ in bench.adapter.astream(bench.llm, QUESTION, **LONG, timeout=0.001):
            pass
    await asyncio.to_thread(wait_until, lambda: _idle(bench.llm))


def a_prompt_cache_key_is_the_session_where_nothing_else_names_one(bench: Bench) -> None:
    keyed = bench.adapter.ask(bench.llm, QUESTION, max_tokens=1, prompt_cache_key="by key")
    assert keyed.metadata["session_id"] == "by key"
    named = bench.adapter.ask(
        bench.llm, QUESTION, max_tokens=1, prompt_cache_key="by key", session_id="by name"
    )
    assert named.metadata["session_id"] == "by name"


async def _cancelled(bench: Bench, asked: Awaitable[Any]) -> None:
    task = asyncio.ensure_future(asked)
    await asyncio.to_thread(wait_until, lambda: not _idle(bench.llm))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(wait_until, lambda: _idle(bench.llm))


async def a_cancelled_task_frees_its_place(bench: Bench) -> None:
    await _cancelled(bench, bench.adapter.aask(bench.llm, QUESTION, **LONG))


async def a_cancelled_stream_frees_its_place(bench: Bench) -> None:
    async def drain() -> None:
        async for _ in bench.adapter.astream(bench.llm, QUESTION, **LONG):
            pass

    await _cancelled(bench, drain())


# Tokens


def counted_tokens_are_those_of_the_prompt(bench: Bench) -> None:
    answer = bench.adapter.ask(bench.llm, QUESTION)
    assert bench.adapter.count(bench.llm, QUESTION) == answer.prompt_tokens
    assert bench.adapter.count(bench.llm, []) == 0


CASES: Sequence[Callable[[Bench], None]] = (
    constructing_loads_and_touches_nothing,
    an_impossible_value_is_refused_by_name,
    a_slip_of_a_fields_name_is_refused_with_the_name,
    names_of_other_packages_are_understood,
    what_is_assigned_is_checked,
    what_was_not_given_is_not_shown_as_a_fact,
    thinking_is_told_to_the_chat_template,
    every_spelling_of_a_folder_is_one_engine,
    the_next_turn_pays_for_new_tokens_only,
    a_session_survives_a_restart,
    sessions_and_namespaces_are_the_callers,
    an_answer_ends_before_a_stop_string,
    sampling_of_a_call_goes_before_that_of_the_model,
    an_answer_is_continued_where_it_is_asked_for,
    an_unknown_option_is_refused,
    a_prompt_that_cannot_fit_is_refused,
    ten_calls_read_no_file_and_no_variable_again,
    leaving_a_stream_frees_its_place,
    an_answer_is_given_up_in_time,
    a_prompt_cache_key_is_the_session_where_nothing_else_names_one,
    counted_tokens_are_those_of_the_prompt,
)
ASYNC_CASES: Sequence[Callable[[Bench], Awaitable[None]]] = (
    many_at_once_answer_as_one_by_one,
    every_route_gives_the_same_answer,
    leaving_an_async_stream_frees_its_place,
    an_async_answer_is_given_up_in_time,
    a_cancelled_task_frees_its_place,
    a_cancelled_stream_frees_its_place,
)
