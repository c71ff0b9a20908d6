"""What LlamaIndex expects of a function calling model, on the model that ships with the package.

LlamaIndex has no suite of its own for this; the cases follow those that its integrations and its core share.
"""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, TextBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.callbacks.schema import EventPayload
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.instrumentation.events.exception import ExceptionEvent
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatInProgressEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionInProgressEvent,
    LLMCompletionStartEvent,
    LLMStructuredPredictEndEvent,
)
from llama_index.core.llms import LLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel, Field, ValidationError
from support.llama_index_events import watching

from agent_memory_core import InvalidRequest
from llama_index_agent_memory import MLXPersistentLLM

pytestmark = [
    # LlamaIndex walks over the deprecated names of its own agents, which are pydantic models.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]

QUESTION = "My name is Ada. What is my name?"
HISTORY = [ChatMessage("You are a helpful assistant.", role="system"), ChatMessage(QUESTION)]
WEATHER = "What is the weather in Paris?"
SUNNY = PromptTemplate("The weather in {city} is sunny.")


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "sunny"


def get_time(city: str) -> str:
    """Get the time in a city."""
    return "noon"


TOOLS = [FunctionTool.from_defaults(get_weather), FunctionTool.from_defaults(get_time)]


class Weather(BaseModel):
    """The weather of a city. A small model may find no end of a text that has no bound."""

    city: str = Field(max_length=40)
    degrees: int


@pytest.fixture(scope="module")
def llm() -> Iterator[MLXPersistentLLM]:
    model = MLXPersistentLLM(model="tiny-chat", cache_dir=None, max_tokens=80)
    yield model
    model.memory.close()


async def drain(stream: Awaitable[AsyncIterator[Any]]) -> list[Any]:
    return [piece async for piece in await stream]


# The class


def test_it_is_a_function_calling_model() -> None:
    assert issubclass(MLXPersistentLLM, (BaseLLM, LLM))
    assert issubclass(MLXPersistentLLM, FunctionCallingLLM)
    assert MLXPersistentLLM.class_name() == "MLXPersistentLLM"


def test_metadata(llm: MLXPersistentLLM) -> None:
    metadata = llm.metadata
    assert (metadata.is_chat_model, metadata.is_function_calling_model) == (True, True)
    assert (metadata.model_name, metadata.num_output) == ("tiny-chat", 80)
    assert metadata.context_window == llm.memory.context_length > 1000


def test_a_context_window_that_is_given_needs_no_model() -> None:
    assert MLXPersistentLLM(model="no/such/model", context_window=123).metadata.context_window == 123


def test_a_misspelled_argument_is_refused() -> None:
    with pytest.raises(ValidationError, match="temperatur"):
        MLXPersistentLLM(**{"temperatur": 1})


def test_it_can_be_written_down_and_read_back(llm: MLXPersistentLLM) -> None:
    copies = [
        MLXPersistentLLM.from_dict(llm.to_dict()),
        MLXPersistentLLM.from_json(llm.to_json()),
        pickle.loads(pickle.dumps(llm)),
        copy.deepcopy(llm),
    ]
    assert {model.class_name() for model in copies} == {"MLXPersistentLLM"}
    assert all(model.memory is llm.memory and model.max_tokens == 80 for model in copies)
    assert llm.to_dict()["class_name"] == "MLXPersistentLLM"


# Chat and completion, four ways each


CHAT: dict[str, Callable[[MLXPersistentLLM], Any]] = {
    "chat": lambda m: m.chat(HISTORY),
    "stream_chat": lambda m: list(m.stream_chat(HISTORY))[-1],
    "achat": lambda m: asyncio.run(m.achat(HISTORY)),
    "astream_chat": lambda m: asyncio.run(drain(m.astream_chat(HISTORY)))[-1],
}
COMPLETION: dict[str, Callable[[MLXPersistentLLM], Any]] = {
    "complete": lambda m: m.complete(QUESTION),
    "stream_complete": lambda m: list(m.stream_complete(QUESTION))[-1],
    "acomplete": lambda m: asyncio.run(m.acomplete(QUESTION)),
    "astream_complete": lambda m: asyncio.run(drain(m.astream_complete(QUESTION)))[-1],
}


@pytest.mark.parametrize("route", CHAT)
def test_chat(llm: MLXPersistentLLM, route: str) -> None:
    response = CHAT[route](llm)
    assert isinstance(response, ChatResponse)
    assert response.message.role == "assistant"
    assert response.message.blocks == [TextBlock(text="Your name is Ada.")]
    usage = response.raw["usage"]  # type: ignore[index]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == llm.count_tokens(HISTORY)


@pytest.mark.parametrize("route", COMPLETION)
def test_complete(llm: MLXPersistentLLM, route: str) -> None:
    response = COMPLETION[route](llm)
    assert response.text == "Your name is Ada."
    assert response.raw["usage"]["prompt_tokens"] == llm.count_tokens([ChatMessage(QUESTION)])


def check_pieces(texts: list[str], deltas: list[str]) -> None:
    assert len([delta for delta in deltas if delta]) > 2
    assert ["".join(deltas[: i + 1]) for i in range(len(deltas))] == texts


def test_pieces_add_up(llm: MLXPersistentLLM) -> None:
    chat = list(llm.stream_chat(HISTORY))
    check_pieces([r.message.content or "" for r in chat], [r.delta or "" for r in chat])
    complete = list(llm.stream_complete(QUESTION))
    check_pieces([r.text for r in complete], [r.delta or "" for r in complete])


async def test_pieces_of_coroutines_add_up(llm: MLXPersistentLLM) -> None:
    chat = await drain(llm.astream_chat(HISTORY))
    check_pieces([r.message.content or "" for r in chat], [r.delta for r in chat])
    complete = await drain(llm.astream_complete(QUESTION))
    check_pieces([r.text for r in complete], [r.delta for r in complete])


def test_predict_and_stream_with_a_system_prompt(llm: MLXPersistentLLM) -> None:
    told = llm.model_copy(update={"system_prompt": "You are a helpful assistant."})
    prompt = PromptTemplate("My name is {name}. What is my name?")
    assert told.predict(prompt, name="Ada") == "Your name is Ada."
    assert "".join(told.stream(prompt, name="Ada")) == "Your name is Ada."


async def test_coroutines_leave_the_loop_and_the_threads_alone(llm: MLXPersistentLLM) -> None:
    threads, ticks = set(threading.enumerate()), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticking = asyncio.create_task(tick())
    pieces = await drain(llm.astream_chat(HISTORY))
    ticking.cancel()
    # A loop that waits for an answer, or for each piece of it, would tick once a piece at most.
    assert ticks > 10 * len(pieces)
    assert set(threading.enumerate()) <= threads


# Tools


def called(response: ChatResponse) -> list[tuple[str, dict[str, Any] | str]]:
    return [(b.tool_name, b.tool_kwargs) for b in response.message.blocks if isinstance(b, ToolCallBlock)]


WITH_TOOLS: dict[str, Callable[..., ChatResponse]] = {
    "chat": lambda m, *a, **k: m.chat_with_tools(*a, **k),
    "stream": lambda m, *a, **k: list(m.stream_chat_with_tools(*a, **k))[-1],
    "achat": lambda m, *a, **k: asyncio.run(m.achat_with_tools(*a, **k)),
    "astream": lambda m, *a, **k: asyncio.run(drain(m.astream_chat_with_tools(*a, **k)))[-1],
}
each_way = pytest.mark.parametrize("way", WITH_TOOLS)


@each_way
def test_the_model_calls_a_tool(llm: MLXPersistentLLM, way: str) -> None:
    response = WITH_TOOLS[way](llm, TOOLS[:1], WEATHER)
    assert called(response) == [("get_weather", {"city": "Paris"})]
    (selection,) = llm.get_tool_calls_from_response(response)
    assert (selection.tool_name, selection.tool_kwargs) == ("get_weather", {"city": "Paris"})
    assert selection.tool_id
    assert response.raw["finish_reason"] == "tool_calls"  # type: ignore[index]


@each_way
def test_without_tools_the_model_answers(llm: MLXPersistentLLM, way: str) -> None:
    response = WITH_TOOLS[way](llm, [], QUESTION)
    assert response.message.content == "Your name is Ada."
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="at least one tool call"):
        llm.get_tool_calls_from_response(response)


@each_way
def test_a_required_tool_is_called(llm: MLXPersistentLLM, way: str) -> None:
    (call,) = called(WITH_TOOLS[way](llm, TOOLS, "Hello.", tool_required=True))
    assert call[0] in ("get_weather", "get_time")
    assert list(call[1]) == ["city"]


@each_way
def test_a_named_tool_is_called(llm: MLXPersistentLLM, way: str) -> None:
    response = WITH_TOOLS[way](llm, TOOLS, WEATHER, tool_choice="get_time", allow_parallel_tool_calls=True)
    assert [name for name, _ in called(response)] == ["get_time"]


@each_way
def test_several_tools_are_called_at_once_where_they_may_be(llm: MLXPersistentLLM, way: str) -> None:
    question = "What is the time in Rome? And the weather in Rome?"
    for several, count in ((True, 2), (False, 1)):
        response = WITH_TOOLS[way](
            llm, TOOLS, question, tool_required=True, allow_parallel_tool_calls=several
        )
        calls = llm.get_tool_calls_from_response(response)
        assert [call.tool_kwargs for call in calls] == [{"city": "Rome"}] * count
        assert len({call.tool_id for call in calls}) == count


def test_no_tool_is_called_where_none_may_be(llm: MLXPersistentLLM) -> None:
    assert called(llm.chat_with_tools(TOOLS, WEATHER, tool_choice="none")) == []


def test_an_impossible_choice_is_refused(llm: MLXPersistentLLM) -> None:
    with pytest.raises(InvalidRequest, match="get_weather, get_time"):
        llm.chat_with_tools(TOOLS, WEATHER, tool_choice="get_wether")
    with pytest.raises(InvalidRequest, match="no tool"):
        llm.chat_with_tools([], WEATHER, tool_required=True)


def test_the_history_of_the_caller_stays_as_it_is(llm: MLXPersistentLLM) -> None:
    history = [ChatMessage("You are a helpful assistant.", role="system")]
    asked = llm._prepare_chat_with_tools(TOOLS, ChatMessage(WEATHER), history)
    assert len(history) == 1
    assert [m.content for m in asked["messages"]] == ["You are a helpful assistant.", WEATHER]
    assert asked["parallel_tool_calls"] is False


def test_one_call_of_several_is_kept_where_only_one_is_allowed(llm: MLXPersistentLLM) -> None:
    blocks = [ToolCallBlock(tool_call_id=i, tool_name="get_time") for i in "ab"]
    response = ChatResponse(message=ChatMessage(role="assistant", blocks=[TextBlock(text="so"), *blocks]))
    both = llm._validate_chat_with_tools_response(response, TOOLS, allow_parallel_tool_calls=True)
    assert len(llm.get_tool_calls_from_response(both)) == 2
    one = llm._validate_chat_with_tools_response(response, TOOLS)
    assert [call.tool_id for call in llm.get_tool_calls_from_response(one)] == ["a"]
    assert one.message.content == "so"


def test_a_result_is_answered(llm: MLXPersistentLLM) -> None:
    history = [ChatMessage(WEATHER)]
    history.append(llm.chat_with_tools(TOOLS[:1], chat_history=history).message)
    (call,) = llm.get_tool_calls_from_response(ChatResponse(message=history[-1]))
    history.append(ChatMessage("sunny", role="tool", additional_kwargs={"tool_call_id": call.tool_id}))
    answer = llm.chat_with_tools(TOOLS[:1], chat_history=history)
    assert "sunny" in (answer.message.content or "")


async def test_predict_and_call(llm: MLXPersistentLLM) -> None:
    assert llm.predict_and_call(TOOLS[:1], WEATHER).response == "sunny"
    assert (await llm.apredict_and_call(TOOLS[:1], WEATHER)).response == "sunny"


# Structured answers


PREDICT: dict[str, Callable[[MLXPersistentLLM], Any]] = {
    "predict": lambda m: m.structured_predict(Weather, SUNNY, city="Paris"),
    "apredict": lambda m: asyncio.run(m.astructured_predict(Weather, SUNNY, city="Paris")),
    "stream": lambda m: list(m.stream_structured_predict(Weather, SUNNY, city="Paris"))[-1],
    "astream": lambda m: asyncio.run(drain(m.astream_structured_predict(Weather, SUNNY, city="Paris")))[-1],
    "program": lambda m: get_program_for_llm(Weather, SUNNY, m)(city="Paris"),
    "function mode": lambda m: list(
        m.model_copy(
            update={"pydantic_program_mode": PydanticProgramMode.FUNCTION}
        ).stream_structured_predict(Weather, SUNNY, city="Paris")
    )[-1],
}
STRUCTURED: dict[str, Callable[[Any], Any]] = {
    "chat": lambda m: m.chat([ChatMessage(WEATHER)]).raw,
    "achat": lambda m: asyncio.run(m.achat([ChatMessage(WEATHER)])).raw,
    "stream_chat": lambda m: list(m.stream_chat([ChatMessage(WEATHER)]))[-1].raw,
    "astream_chat": lambda m: asyncio.run(drain(m.astream_chat([ChatMessage(WEATHER)])))[-1].raw,
    "complete": lambda m: m.complete(WEATHER).raw,
    "acomplete": lambda m: asyncio.run(m.acomplete(WEATHER)).raw,
}


@pytest.mark.parametrize("route", PREDICT)
def test_structured_predict(llm: MLXPersistentLLM, route: str) -> None:
    assert isinstance(PREDICT[route](llm), Weather)


# LlamaIndex's structured model still calls pydantic's json.
@pytest.mark.filterwarnings("ignore:The `json` method is deprecated")
@pytest.mark.parametrize("route", STRUCTURED)
def test_as_structured_llm(llm: MLXPersistentLLM, route: str) -> None:
    assert isinstance(STRUCTURED[route](llm.as_structured_llm(Weather)), Weather)


def test_an_answer_fits_a_schema(llm: MLXPersistentLLM) -> None:
    for schema in (Weather, Weather.model_json_schema()):
        answer = llm.complete(WEATHER, response_schema=schema)
        assert isinstance(Weather.model_validate_json(answer.text), Weather)
    with pytest.raises(InvalidRequest, match="response_schema"):
        llm.chat(HISTORY, response_schema="Weather")


# Events


@pytest.mark.parametrize("route", [*CHAT, *COMPLETION])
def test_every_route_tells_its_events(llm: MLXPersistentLLM, route: str) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    watched = llm.model_copy(update={"callback_manager": CallbackManager([debug])})
    with watching() as watch:
        {**CHAT, **COMPLETION}[route](watched)
    start, middle, end = (
        (LLMChatStartEvent, LLMChatInProgressEvent, LLMChatEndEvent)
        if route in CHAT
        else (LLMCompletionStartEvent, LLMCompletionInProgressEvent, LLMCompletionEndEvent)
    )
    # One of each, and none of the other kind: a completion is not counted as a chat as well.
    starts = watch.of(LLMChatStartEvent, LLMCompletionStartEvent)
    ends = watch.of(LLMChatEndEvent, LLMCompletionEndEvent)
    assert [type(event) for event in (*starts, *ends)] == [start, end]
    assert bool(watch.of(middle)) == ("stream" in route)
    assert starts[0].model_dict["model"] == "tiny-chat"  # type: ignore[attr-defined]
    assert ends[0].response.raw["usage"]  # type: ignore[attr-defined]
    ((first, last),) = debug.get_event_pairs(CBEventType.LLM)
    assert first.payload is not None
    assert last.payload is not None
    assert first.payload[EventPayload.SERIALIZED]["model"] == "tiny-chat"


def test_a_failure_is_told(llm: MLXPersistentLLM) -> None:
    with watching() as watch, pytest.raises(InvalidRequest):
        list(llm.stream_chat([ChatMessage("word " * 20_000)]))
    assert len(watch.of(ExceptionEvent)) == 1


def test_a_structured_answer_is_told(llm: MLXPersistentLLM) -> None:
    with watching() as watch:
        list(llm.stream_structured_predict(Weather, SUNNY, city="Paris"))
    (event,) = watch.of(LLMStructuredPredictEndEvent)
    assert isinstance(event.output, Weather)  # type: ignore[attr-defined]


def test_what_is_told_of_the_model_has_no_secrets_and_loads_nothing() -> None:
    model = MLXPersistentLLM(
        model="no/such/model",
        adapter_path="/secret",
        cache_dir="/secret",
        session_id="secret",
        namespace="secret",
    )
    payload = model.to_payload()
    assert payload["class_name"] == "MLXPersistentLLM"
    assert (payload["model"], payload["temperature"]) == ("no/such/model", 0.0)
    assert "secret" not in str(payload)


@pytest.mark.parametrize("route", [*CHAT, *COMPLETION])
def test_tokens_are_counted_as_they_were(llm: MLXPersistentLLM, route: str) -> None:
    counter = TokenCountingHandler(tokenizer=llm.tokenizer)
    counted = llm.model_copy(update={"callback_manager": CallbackManager([counter])})
    usage = {**CHAT, **COMPLETION}[route](counted).raw["usage"]
    assert counter.prompt_llm_token_count == usage["prompt_tokens"]
    assert counter.completion_llm_token_count == usage["completion_tokens"]


def test_a_rate_limiter_is_asked(llm: MLXPersistentLLM) -> None:
    class Limiter:
        asked = 0

        def acquire(self) -> None:
            self.asked += 1

    limiter = Limiter()
    limited = llm.model_copy(update={"rate_limiter": limiter})
    limited.chat(HISTORY)
    list(limited.stream_complete(QUESTION))
    assert limiter.asked == 2


# Agents and engines


def engine(llm: MLXPersistentLLM) -> SimpleChatEngine:
    return SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults(llm=llm))


def test_a_chat_engine_remembers(llm: MLXPersistentLLM) -> None:
    talk = engine(llm)
    talk.chat("My name is Ada.")
    assert talk.chat("What is my name?").response == "Your name is Ada."
    talk.reset()
    talk.chat("My name is Tom.")
    assert "".join(talk.stream_chat("What is my name?").response_gen) == "Your name is Tom."


async def test_a_chat_engine_remembers_in_coroutines(llm: MLXPersistentLLM) -> None:
    talk = engine(llm)
    await talk.achat("My name is Ada.")
    pieces = (await talk.astream_chat("What is my name?")).async_response_gen()
    assert "".join([piece async for piece in pieces]) == "Your name is Ada."


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_function_agent_uses_its_tool(llm: MLXPersistentLLM, streaming: bool) -> None:
    agent = FunctionAgent(llm=llm, tools=TOOLS[:1], streaming=streaming)
    handler = agent.run(WEATHER)
    results = [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    output: Any = await handler
    assert [(r.tool_name, r.tool_kwargs, r.tool_output.content) for r in results] == [
        ("get_weather", {"city": "Paris"}, "sunny")
    ]
    assert "sunny" in str(output)
    assert output.raw["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


async def test_an_agent_answers_with_a_structure(llm: MLXPersistentLLM) -> None:
    output: Any = await FunctionAgent(llm=llm, tools=TOOLS[:1], output_cls=Weather).run(WEATHER)
    assert isinstance(output.get_pydantic_model(Weather), Weather)


async def test_a_react_agent_answers(llm: MLXPersistentLLM) -> None:
    brief = llm.model_copy(update={"max_tokens": 16})
    assert str(await ReActAgent(llm=brief, tools=TOOLS[:1]).run("Hello."))


async def test_agents_hand_off(llm: MLXPersistentLLM) -> None:
    desk = FunctionAgent(name="desk", description="Welcomes people.", llm=llm, initial_tool_choice="handoff")
    meteo = FunctionAgent(
        name="meteo", description="Knows the weather.", llm=llm, tools=TOOLS[:1], can_handoff_to=[]
    )
    handler = AgentWorkflow(agents=[desk, meteo], root_agent="desk").run(
        "Hand off, to_agent meteo, reason weather."
    )
    results = [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    output: Any = await handler
    assert results[0].tool_kwargs["to_agent"] == "meteo"
    assert output.current_agent_name == "meteo"
