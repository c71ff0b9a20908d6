"""What LangChain itself knows of this model: a provider's name, and an error for a prompt that is too long."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain.chat_models import base, init_chat_model
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda
from langgraph.runtime import Runtime

from agent_memory_core import PromptTooLong
from langchain_agent_memory import ChatMLXPersistent, register_provider
from langchain_agent_memory.errors import ContextOverflow


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_BUILTIN_PROVIDERS", dict(base._BUILTIN_PROVIDERS))
    base._get_chat_model_creator.cache_clear()
    register_provider()


@pytest.mark.usefixtures("registered")
def test_a_name_makes_the_model() -> None:
    register_provider()
    model = init_chat_model("mlx_persistent:tiny-chat", cache_dir=None, temperature=0, max_tokens=5)
    assert model == ChatMLXPersistent(model="tiny-chat", cache_dir=None, temperature=0, max_tokens=5)
    by_argument = init_chat_model("tiny-chat", model_provider="mlx_persistent", cache_dir=None)
    assert isinstance(by_argument, ChatMLXPersistent)
    folder = init_chat_model("mlx_persistent:/some/folder", cache_dir=None)
    assert isinstance(folder, ChatMLXPersistent)
    assert folder.model == "/some/folder"


@pytest.mark.usefixtures("registered")
def test_configurable_fields_share_one_engine(tmp_path: Path) -> None:
    model = init_chat_model(
        "mlx_persistent:tiny-chat",
        configurable_fields=("temperature", "max_tokens"),
        cache_dir=tmp_path,
        temperature=0,
        max_tokens=24,
    )
    plain = ChatMLXPersistent(cache_dir=tmp_path)
    plain.memory.load()
    before = plain.memory.stats().turns
    texts = [
        model.invoke("My name is Ada. What is my name?", {"configurable": {"thread_id": "T", **more}}).text
        for more in ({}, {"max_tokens": 2}, {"max_tokens": 24, "temperature": 0.0})
    ]
    assert texts[0] == texts[2] != texts[1]
    assert plain.memory.stats().turns == before + 3
    assert [info.session_id for info in plain.memory.sessions()] == ["T"]
    agent: Any = create_agent(cast(Any, model), [])
    assert agent.invoke({"messages": [HumanMessage("hi")]})["messages"][-1].text
    assert plain.memory.stats().turns == before + 4
    plain.memory.close()


def test_importing_registers_nothing() -> None:
    program = (
        "import langchain_agent_memory, sys; assert 'langchain' not in sys.modules;"
        "from langchain.chat_models import base; assert 'mlx_persistent' not in base._BUILTIN_PROVIDERS"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_release_without_the_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(base, "_BUILTIN_PROVIDERS")
    with pytest.raises(ImportError, match=r"langchain \d+\.\d+.*_BUILTIN_PROVIDERS"):
        register_provider()


@pytest.mark.usefixtures("registered")
def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'openai'.*langchain_openai"):
        register_provider("openai")


def test_without_langchain_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langchain.chat_models.base", None)
    with pytest.raises(ImportError, match=r"agent-memory-mlx\[agents\]"):
        register_provider()


# A prompt that is too long


@pytest.fixture(scope="module")
def llm() -> Iterator[ChatMLXPersistent]:
    model = ChatMLXPersistent(cache_dir=None, temperature=0, max_tokens=8)
    yield model
    model.memory.close()


LONG = "word " * 20_000


async def drain(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


ROUTES: dict[str, Callable[[ChatMLXPersistent], object]] = {
    "invoke": lambda m: m.invoke(LONG),
    "ainvoke": lambda m: asyncio.run(m.ainvoke(LONG)),
    "stream": lambda m: list(m.stream(LONG)),
    "astream": lambda m: asyncio.run(drain(m.astream(LONG))),
    "batch": lambda m: m.batch([LONG]),
}


@pytest.mark.parametrize("route", ROUTES)
def test_both_names_of_a_prompt_that_is_too_long_catch_it(llm: ChatMLXPersistent, route: str) -> None:
    with pytest.raises(ContextOverflowError, match="shorten") as caught:
        ROUTES[route](llm)
    assert isinstance(caught.value, PromptTooLong)
    assert isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (ContextOverflow, str(caught.value))


def test_a_fallback_for_it_takes_over(llm: ChatMLXPersistent) -> None:
    shorter: RunnableLambda[Any, AIMessage] = RunnableLambda(lambda _: AIMessage("shortened"))
    caught = llm.with_fallbacks([shorter], exceptions_to_handle=(ContextOverflowError,))
    assert caught.invoke(LONG).text == "shortened"


@pytest.mark.parametrize("coroutine", [False, True])
def test_a_summary_that_does_not_fit_is_tried_again_with_less(
    coroutine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_MEMORY_CONTEXT_LENGTH", "1000")
    llm = ChatMLXPersistent(cache_dir=None, temperature=0, max_tokens=8)
    middleware = SummarizationMiddleware(
        llm,
        trigger=("messages", 3),
        keep=("messages", 1),
        trim_tokens_to_summarize=None,
        summary_prompt="Summarize: {messages}",
    )
    long = HumanMessage("the " * 1200)
    messages: list[Any] = [long, AIMessage("I see."), HumanMessage("Go on.")]
    state: Any = {"messages": messages}
    hook = (
        middleware.abefore_model(state, Runtime()) if coroutine else middleware.before_model(state, Runtime())
    )
    update: Any = asyncio.run(hook) if coroutine else hook
    assert len(update["messages"]) == 3, "all but the last message are a summary"
    with pytest.raises(ContextOverflowError):
        llm.invoke(messages)
    llm.memory.close()
