"""Where LlamaIndex's callback handlers hear of the model's calls, and that they count its tokens exactly.

A query engine gives its own callback manager to the model that it is built with. That is LlamaIndex's way with every
model, so each way of handing over handlers is tried with LlamaIndex's own `MockLLM` too: ours must behave as it does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from pydantic import BaseModel, Field

from llama_index_agent_memory import MLXPersistentLLM

pytestmark = [
    # LlamaIndex walks over the deprecated names of its own classes, which are pydantic models.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
    # LlamaIndex's structured model still calls pydantic's json.
    pytest.mark.filterwarnings("ignore:The `json` method is deprecated"),
]

NOTES = [TextNode(text="Ada lives in Rome.", id_="ada"), TextNode(text="Mia lives in Paris.", id_="mia")]
QUESTION = "Where does Ada live?"
WEATHER = "What is the weather in Paris?"


def ours(**more: Any) -> MLXPersistentLLM:
    return MLXPersistentLLM(model="tiny-chat", cache_dir=None, max_tokens=80, **more)


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    ours().memory.close()


def engine(llm: LLM, **more: Any) -> RetrieverQueryEngine:
    bm25 = pytest.importorskip(
        "llama_index.retrievers.bm25", reason="its PyStemmer has no wheel for Python 3.14 on a Mac"
    )
    retriever = bm25.BM25Retriever.from_defaults(nodes=NOTES, similarity_top_k=2)
    return RetrieverQueryEngine.from_args(retriever, llm=llm, **more)


# Where handlers hear of the model


def by_the_model(make: Callable[..., LLM], manager: CallbackManager) -> RetrieverQueryEngine:
    return engine(make(callback_manager=manager))


def by_the_engine(make: Callable[..., LLM], manager: CallbackManager) -> RetrieverQueryEngine:
    return engine(make(), callback_manager=manager)


def by_the_settings(make: Callable[..., LLM], manager: CallbackManager) -> RetrieverQueryEngine:
    Settings.callback_manager = manager
    return engine(make())


def by_model_and_settings(make: Callable[..., LLM], manager: CallbackManager) -> RetrieverQueryEngine:
    Settings.callback_manager = manager
    return engine(make(callback_manager=manager))


def by_the_synthesizer(make: Callable[..., LLM], manager: CallbackManager) -> RetrieverQueryEngine:
    answers = get_response_synthesizer(llm=make(), callback_manager=manager)
    return engine(make(), response_synthesizer=answers)


def by_the_model_afterwards(make: Callable[..., LLM], manager: CallbackManager) -> RetrieverQueryEngine:
    llm = make()
    built = engine(llm)
    llm.callback_manager = manager
    return built


WAYS = {
    by_the_model: 0,
    by_the_engine: 0,
    by_the_settings: 1,
    by_model_and_settings: 1,
    by_the_synthesizer: 1,
    by_the_model_afterwards: 1,
}


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that one test sets is there in the next."""
    monkeypatch.setattr(Settings, "_callback_manager", None)


@pytest.mark.parametrize("make", [MockLLM, ours], ids=["MockLLM", "MLXPersistentLLM"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_handlers_hear_of_a_model_inside_a_query_engine(
    way: Callable[..., RetrieverQueryEngine], make: Callable[..., LLM]
) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    way(make, CallbackManager([debug])).query(QUESTION)
    assert len(debug.get_event_pairs(CBEventType.LLM)) == WAYS[way]


class OneUser(LlamaDebugHandler):
    """A handler that names the session of its user."""

    agent_memory_session_id = "ada"


def test_the_session_of_a_handler_reaches_a_query_engine_by_the_settings() -> None:
    Settings.callback_manager = CallbackManager([OneUser(print_trace_on_end=False)])
    with Reports() as used:
        engine(ours()).query(QUESTION)
        del Settings.callback_manager.handlers[:]
        engine(ours()).query(QUESTION)
    assert [report["session_id"] for report in used.reports] == ["ada", None]


# Exact counts


class Reports(BaseEventHandler):
    """What the model reported of every call."""

    reports: list[dict[str, Any]] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        if isinstance(event, (LLMChatEndEvent, LLMCompletionEndEvent)) and event.response is not None:
            # A structured model tells of its object in a call of its own, beside the call that it makes.
            self.reports += [event.response.raw] if isinstance(event.response.raw, dict) else []

    def total(self, kind: str) -> int:
        return sum(report["usage"][f"{kind}_tokens"] for report in self.reports)

    def __enter__(self) -> Reports:
        get_dispatcher().add_event_handler(self)
        return self

    def __exit__(self, *failure: object) -> None:
        get_dispatcher().event_handlers.remove(self)


async def drain(stream: Awaitable[AsyncIterator[Any]]) -> list[Any]:
    return [piece async for piece in await stream]


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "sunny"


TOOL = FunctionTool.from_defaults(get_weather)


class City(BaseModel):
    """A city. A small model may find no end of a text that has no bound."""

    name: str = Field(max_length=40)


CITY = PromptTemplate("I live in {name}.")


def ask(llm: LLM, **more: Any) -> Any:
    answer = engine(llm, **more).query(QUESTION)
    return str(answer)  # reads a stream to its end


async def aask(llm: LLM, **more: Any) -> str:
    return str(await engine(llm, **more).aquery(QUESTION))


async def run(llm: LLM, **more: Any) -> None:
    await FunctionAgent(llm=llm, tools=[TOOL], **more).run(WEATHER)


async def hand_off(llm: LLM) -> None:
    desk = FunctionAgent(name="desk", description="Welcomes.", llm=llm, initial_tool_choice="handoff")
    meteo = FunctionAgent(name="meteo", description="Knows the weather.", llm=llm, can_handoff_to=[])
    await AgentWorkflow(agents=[desk, meteo], root_agent="desk").run(
        "Hand off, to_agent meteo, reason weather."
    )


async def side_by_side(llm: LLM) -> None:
    await asyncio.gather(*(llm.achat([ChatMessage(f"My name is {name}.")]) for name in ("Ada", "Tom", "Mia")))


def structured(llm: LLM) -> Any:
    return llm.as_structured_llm(City)


IN_ROME = [ChatMessage("I live in Rome.")]
# How often the model is called at least, and what calls it.
QUERIES: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "at once": (1, ask),
    "in coroutines": (1, lambda m: asyncio.run(aask(m))),
    "streamed": (1, lambda m: ask(m, streaming=True)),
    "a note at a time": (2, lambda m: ask(m, response_mode=ResponseMode.REFINE)),
    "every note for itself": (2, lambda m: ask(m, response_mode=ResponseMode.ACCUMULATE)),
}
CALLS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "agent": (2, lambda m: asyncio.run(run(m))),
    "agent that does not stream": (2, lambda m: asyncio.run(run(m, streaming=False))),
    "handoff": (2, lambda m: asyncio.run(hand_off(m))),
    "side by side": (3, lambda m: asyncio.run(side_by_side(m))),
    "structure": (1, lambda m: m.structured_predict(City, CITY, name="Rome")),
    "streamed structure": (1, lambda m: list(m.stream_structured_predict(City, CITY, name="Rome"))),
    "structured chat": (1, lambda m: structured(m).chat(IN_ROME)),
    "structured stream": (1, lambda m: asyncio.run(drain(structured(m).astream_chat(IN_ROME)))),
    "tool called": (1, lambda m: m.predict_and_call([TOOL], WEATHER)),
}


@pytest.mark.parametrize("query", QUERIES)
def test_the_tokens_of_queries_are_counted_as_they_were(query: str) -> None:
    counter = TokenCountingHandler(tokenizer=ours().tokenizer)
    Settings.callback_manager = CallbackManager([counter])
    check_counts(counter, ours(), *QUERIES[query])


@pytest.mark.parametrize("call", CALLS)
def test_the_tokens_of_calls_are_counted_as_they_were(call: str) -> None:
    counter = TokenCountingHandler(tokenizer=ours().tokenizer)
    check_counts(counter, ours(callback_manager=CallbackManager([counter])), *CALLS[call])


def check_counts(
    counter: TokenCountingHandler, llm: MLXPersistentLLM, calls: int, work: Callable[[LLM], Any]
) -> None:
    with Reports() as used:
        work(llm)
    assert len(used.reports) == len(counter.llm_token_counts) >= calls
    assert counter.prompt_llm_token_count == used.total("prompt")
    assert counter.completion_llm_token_count == used.total("completion")


def test_a_budget_of_tokens_is_kept() -> None:
    counter = TokenCountingHandler(tokenizer=ours().tokenizer, token_budget=10)
    llm = ours(callback_manager=CallbackManager([counter]))
    with pytest.raises(ValueError, match="Token budget exceeded"):
        llm.complete("My name is Ada. What is my name?")


def test_counts_are_those_of_the_texts() -> None:
    counter = TokenCountingHandler(tokenizer=ours().tokenizer)
    llm = ours(callback_manager=CallbackManager([counter]))
    asked = [ChatMessage("My name is Ada. What is my name?")]
    answer = llm.chat(asked)
    assert counter.prompt_llm_token_count == llm.count_tokens(asked)
    assert (
        counter.completion_llm_token_count == len(llm.tokenizer(answer.message.content or "")) + 1
    )  # its end
