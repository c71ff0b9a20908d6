"""ChatMLXPersistent on the real engine with the model that ships with the package."""

from __future__ import annotations

import asyncio
import copy
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.runnables import ConfigurableField, RunnableConfig
from langchain_core.runnables.configurable import RunnableConfigurableFields
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite import SqliteSaver
from pydantic import ValidationError

from agent_memory_core import InvalidRequest, InvalidSetting, ModelNotFound, PromptTooLong
from langchain_agent_memory import ChatMLXPersistent

LONG = SystemMessage("You are a careful assistant who remembers what people say. " * 12)
QUESTION: list[BaseMessage] = [LONG, HumanMessage("My name is Ada. What is my name?")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("langchain") / "caches"


@pytest.fixture(scope="module")
def llm(store: Path) -> Iterator[ChatMLXPersistent]:
    """One engine for the whole file; tests keep apart by their sessions and namespaces."""
    model = ChatMLXPersistent(cache_dir=store, temperature=0, max_tokens=24)
    yield model
    model.memory.close()


def thread(name: str) -> RunnableConfig:
    return {"configurable": {"thread_id": name}}


def cache_read(message: AIMessage) -> int:
    assert message.usage_metadata is not None
    return message.usage_metadata["input_token_details"]["cache_read"]


def merge(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0] + chunks[1:]
    assert isinstance(whole, AIMessageChunk)
    return whole


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reconfigured(model: ChatMLXPersistent) -> ChatMLXPersistent:
    """What a configurable field makes of a model: a new one from all its fields, given or not."""
    configurable = model.configurable_fields(seed=ConfigurableField(id="seed"))
    assert isinstance(configurable, RunnableConfigurableFields)
    made, _ = configurable.prepare({"configurable": {"seed": 3}})
    assert isinstance(made, ChatMLXPersistent)
    assert made.seed == 3
    return made


# Construction


def test_constructing_loads_and_touches_nothing(tmp_path: Path) -> None:
    model = ChatMLXPersistent(model="no/such/model", cache_dir=tmp_path / "caches")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelNotFound, match="no/such/model"):
        model.invoke("hi")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"max_tokens": 0}, InvalidRequest),
        ({"top_p": 1.5}, InvalidRequest),
        ({"stop": [""]}, InvalidRequest),
        ({"max_batch_size": 0}, InvalidSetting),
        ({"model": ""}, InvalidSetting),
    ],
)
def test_an_impossible_value_is_refused_by_name(values: dict[str, Any], error: type[Exception]) -> None:
    (name,) = values
    with pytest.raises(ValidationError, match=f"{name}=.* is not valid") as refused:
        ChatMLXPersistent(**values)
    assert isinstance(refused.value.errors()[0]["ctx"]["error"], error)


def test_both_names_of_a_field_are_taken() -> None:
    one = ChatMLXPersistent(model="m", max_tokens=5, stop=["x"])
    two = ChatMLXPersistent(**{"model_name": "m", "max_completion_tokens": 5, "stop_sequences": ["x"]})
    assert one == two


def test_what_is_not_given_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_MAX_TOKENS", "7")
    monkeypatch.setenv("AGENT_MEMORY_KV_BITS", "8")
    monkeypatch.setenv("AGENT_MEMORY_MODEL", "elsewhere")
    given = ChatMLXPersistent(model="tiny-chat", kv_bits=None, max_tokens=9)
    anew = reconfigured(ChatMLXPersistent())

    def chosen(model: ChatMLXPersistent) -> list[Any]:
        return [model._identifying_params[name] for name in ("model", "kv_bits", "max_tokens", "seed")]

    assert chosen(given) == ["tiny-chat", None, 9, None]
    assert chosen(anew) == ["elsewhere", 8, 7, 3]


def test_copies_share_one_engine(llm: ChatMLXPersistent) -> None:
    copies = [
        pickle.loads(pickle.dumps(llm)),
        copy.deepcopy(llm),
        llm.model_copy(update={"temperature": 1}),
        reconfigured(llm),
        ChatMLXPersistent(cache_dir=str(llm.cache_dir)),
    ]
    assert all(model.memory is llm.memory for model in copies)
    assert ChatMLXPersistent(cache_dir=llm.cache_dir, kv_bits=4).memory is not llm.memory


# Memory


def test_the_next_turn_pays_for_new_tokens_only(llm: ChatMLXPersistent) -> None:
    first = llm.invoke(QUESTION, thread("turns"))
    again = llm.invoke([*QUESTION, first, HumanMessage("Thank you.")], thread("turns"))
    assert first.usage_metadata is not None
    assert again.usage_metadata is not None
    # All of the first turn but its last token, whose key and value were never needed.
    known = first.usage_metadata["total_tokens"] - 1
    assert cache_read(again) >= known - 1
    details = again.usage_metadata["input_token_details"]
    assert details["cache_read"] + details["cache_creation"] == again.usage_metadata["input_tokens"]
    assert again.response_metadata["hit_tier"] == "hot"
    assert again.response_metadata["session_id"] == "turns"
    assert again.response_metadata["persisted"] is True
    assert again.response_metadata["ttft_ms"] > 0


def test_a_session_survives_a_restart(tmp_path: Path) -> None:
    def answer(history: list[BaseMessage]) -> AIMessage:
        model = ChatMLXPersistent(cache_dir=tmp_path, temperature=0, max_tokens=24)
        try:
            return model.invoke(history, thread("ada"))
        finally:
            model.memory.close()

    history = list(QUESTION)
    history += [answer(history), HumanMessage("Say my name again.")]
    restarted = answer(history)
    assert restarted.response_metadata["hit_tier"] == "warm"
    assert cache_read(restarted) > 0

    unbroken = ChatMLXPersistent(cache_dir=None, temperature=0, max_tokens=24)
    unbroken.invoke(QUESTION)
    assert unbroken.invoke(history).content == restarted.content
    unbroken.memory.close()


def test_sessions_and_namespaces_are_the_callers(llm: ChatMLXPersistent) -> None:
    llm.invoke("hi", thread("mine"), namespace="a")
    llm.invoke("hi", thread("yours"), namespace="b")
    llm.invoke("hi", namespace="c")
    assert [s.session_id for s in llm.memory.sessions("a")] == ["mine"]
    assert [s.session_id for s in llm.memory.sessions("b")] == ["yours"]
    assert llm.memory.sessions("c") == []


def test_an_agent_goes_on_after_a_restart_of_everything(tmp_path: Path) -> None:
    """A process that has the checkpoints and the cache directory has the conversation, and has it warm."""
    handler = UsageMetadataCallbackHandler()

    def turn(text: str) -> list[BaseMessage]:
        model = ChatMLXPersistent(cache_dir=tmp_path / "caches", temperature=0, max_tokens=24)
        with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.db")) as saver:
            agent = create_agent(model, [], system_prompt=LONG.text, checkpointer=saver)
            config: RunnableConfig = {**thread("T"), "callbacks": [handler]}
            messages: list[BaseMessage] = agent.invoke({"messages": [HumanMessage(text)]}, config)["messages"]
        assert [s.session_id for s in model.memory.sessions()] == ["T"]
        model.memory.close()
        return messages

    turn("My name is Ada.")
    messages = turn("What is my name?")
    assert len(messages) == 4
    last = messages[-1]
    assert isinstance(last, AIMessage)
    assert last.response_metadata["hit_tier"] == "warm"
    assert handler.usage_metadata["tiny-chat"]["input_token_details"]["cache_read"] == cache_read(last) > 0


# Routes


async def test_every_route_gives_the_same_answer(llm: ChatMLXPersistent) -> None:
    expected = llm.invoke(QUESTION)
    routes = [
        merge(list(llm.stream(QUESTION))),
        await llm.ainvoke(QUESTION),
        merge([chunk async for chunk in llm.astream(QUESTION)]),
        *llm.batch([QUESTION, QUESTION]),
        *await llm.abatch([QUESTION, QUESTION]),
    ]
    assert expected.text
    assert {message.text for message in routes} == {expected.text}
    assert {message.response_metadata["model_name"] for message in routes} == {"tiny-chat"}
    assert {message.response_metadata["finish_reason"] for message in routes} == {
        expected.response_metadata["finish_reason"]
    }


def test_an_answer_arrives_in_pieces(llm: ChatMLXPersistent) -> None:
    chunks = list(llm.stream(QUESTION))
    assert len([chunk for chunk in chunks if chunk.content]) > 1
    assert [chunk.usage_metadata is not None for chunk in chunks[-2:]] == [False, True]
    assert {chunk.response_metadata["model_provider"] for chunk in chunks} == {"mlx"}


def test_many_threads_at_once_answer_as_one_by_one(llm: ChatMLXPersistent) -> None:
    questions = [f"My name is {name}. What is my name?" for name in ("Ada", "Mia", "Tom", "Eva")]
    one_by_one = [llm.invoke(q).text for q in questions]
    configs = [thread(f"batch {i}") for i in range(4)]
    assert [m.text for m in llm.batch(list(questions), configs)] == one_by_one


# Options of a call


def test_an_answer_ends_before_a_stop_string(llm: ChatMLXPersistent) -> None:
    whole = llm.invoke(QUESTION).text
    word = whole.split()[-1]
    cut = whole[: whole.index(word)]
    assert llm.invoke(QUESTION, stop=[word]).text == cut
    assert llm.bind(stop=[word]).invoke(QUESTION).text == cut
    assert llm.model_copy(update={"stop": [word]}).invoke(QUESTION).text == cut
    assert llm.model_copy(update={"stop": [word]}).invoke(QUESTION, stop=[]).text == whole


def test_sampling_of_a_call_goes_before_that_of_the_model(llm: ChatMLXPersistent) -> None:
    short = llm.invoke(QUESTION, max_completion_tokens=2)
    assert short.usage_metadata is not None
    assert short.usage_metadata["output_tokens"] == 2
    assert short.response_metadata["finish_reason"] == "length"
    hot = [llm.invoke(QUESTION, temperature=5.0, seed=seed).text for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_an_unknown_option_is_refused(llm: ChatMLXPersistent) -> None:
    with pytest.raises(InvalidRequest, match=r"'tempreature'.*temperature"):
        llm.invoke("hi", tempreature=1)
    with pytest.raises(InvalidRequest, match="temperature=-1"):
        llm.invoke("hi", temperature=-1)
    with pytest.raises(InvalidRequest, match="response_format"):
        llm.invoke("hi", response_format={"type": "xml"})


def test_what_cannot_be_read_is_refused(llm: ChatMLXPersistent) -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(InvalidRequest, match="image_url"):
        llm.invoke([HumanMessage([picture])])
    with pytest.raises(PromptTooLong):
        llm.invoke("word " * 20_000)


# Withdrawing


def idle(llm: ChatMLXPersistent) -> Callable[[], bool]:
    return lambda: not (llm.memory.stats().waiting or llm.memory.stats().running)


def test_leaving_a_stream_frees_its_place(llm: ChatMLXPersistent) -> None:
    for chunk in llm.stream(QUESTION, max_tokens=4000):
        assert not idle(llm)()
        if chunk.content:
            break
    del chunk
    wait_until(idle(llm))


async def test_leaving_an_async_stream_frees_its_place(llm: ChatMLXPersistent) -> None:
    async for chunk in llm.astream(QUESTION, max_tokens=4000):
        if chunk.content:
            break
    await asyncio.to_thread(wait_until, idle(llm))


@pytest.mark.parametrize("streams", [False, True])
async def test_a_cancelled_task_frees_its_place(llm: ChatMLXPersistent, streams: bool) -> None:
    async def drain() -> None:
        async for _ in llm.astream(QUESTION, max_tokens=4000):
            pass

    task = asyncio.ensure_future(drain() if streams else llm.ainvoke(QUESTION, max_tokens=4000))
    await asyncio.to_thread(wait_until, lambda: not idle(llm)())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(wait_until, idle(llm))


# Tools


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "sunny"


def test_tools_are_called_and_their_results_answered(llm: ChatMLXPersistent) -> None:
    bound = llm.bind_tools([get_weather], max_tokens=80)
    ask = HumanMessage("What is the weather in Paris?")
    call = bound.invoke([ask])
    assert [(c["name"], c["args"]) for c in call.tool_calls] == [("get_weather", {"city": "Paris"})]
    assert call.response_metadata["finish_reason"] == "tool_calls"
    streamed = merge(list(bound.stream([ask])))
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [("get_weather", {"city": "Paris"})]
    result = get_weather.invoke(call.tool_calls[0])
    assert isinstance(result, ToolMessage)
    answer = bound.invoke([ask, call, result])
    assert "sunny" in answer.text
    assert cache_read(answer) > 0


def test_no_tools_are_called_where_none_may_be(llm: ChatMLXPersistent) -> None:
    ask = "What is the weather in Paris?"
    assert llm.bind_tools([get_weather], tool_choice="none", max_tokens=80).invoke(ask).tool_calls == []


def test_a_choice_of_a_tool_that_is_not_there_is_refused(llm: ChatMLXPersistent) -> None:
    with pytest.raises(InvalidRequest, match="get_weather"):
        llm.bind_tools([get_weather], tool_choice="get_wether")


# Tokens


def test_counted_tokens_are_those_of_the_prompt(llm: ChatMLXPersistent) -> None:
    answer = llm.invoke(QUESTION)
    assert answer.usage_metadata is not None
    assert llm.get_num_tokens_from_messages(QUESTION) == answer.usage_metadata["input_tokens"]
    assert (
        llm.get_num_tokens_from_messages(QUESTION, tools=[get_weather])
        > answer.usage_metadata["input_tokens"]
    )
    assert llm.get_num_tokens_from_messages([]) == 0
    assert llm.get_num_tokens("hello there") == len(llm.get_token_ids("hello there")) > 0
