"""ChatMLXPersistent on the real engine with the model that ships with the package."""

from __future__ import annotations

import copy
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
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
from langchain_core.tracers.base import BaseTracer
from langgraph.checkpoint.sqlite import SqliteSaver
from support.conversations import ASYNC_CASES, CASES, RULES, Answer, Bench, History
from support.pieces import REPORT

from agent_memory_core import InvalidRequest, UnknownSetting
from agent_memory_core.adapter import measurements
from langchain_agent_memory import ChatMLXPersistent

LONG = SystemMessage(RULES)
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


def reconfigured(model: ChatMLXPersistent) -> ChatMLXPersistent:
    """What a configurable field makes of a model: a new one from all its fields, given or not."""
    configurable = model.configurable_fields(seed=ConfigurableField(id="seed"))
    assert isinstance(configurable, RunnableConfigurableFields)
    made, _ = configurable.prepare({"configurable": {"seed": 3}})
    assert isinstance(made, ChatMLXPersistent)
    assert made.seed == 3
    return made


class LangChain:
    """How LangChain asks, for the properties that hold in every framework."""

    model = ChatMLXPersistent
    roles: ClassVar[dict[str, type[BaseMessage]]] = {
        "system": SystemMessage,
        "user": HumanMessage,
        "assistant": AIMessage,
    }

    def _messages(self, history: History) -> list[BaseMessage]:
        return [self.roles[role](text) for role, text in history]

    def _answer(self, message: AIMessage) -> Answer:
        usage = message.usage_metadata
        assert usage is not None
        details = usage["input_token_details"]
        assert details["cache_read"] + details["cache_creation"] == usage["input_tokens"]
        return Answer(
            message.text,
            usage["input_tokens"],
            usage["output_tokens"],
            details["cache_read"],
            message.response_metadata,
        )

    def ask(self, llm: Any, history: History, **options: Any) -> Answer:
        return self._answer(llm.invoke(self._messages(history), **options))

    async def aask(self, llm: Any, history: History, **options: Any) -> Answer:
        return self._answer(await llm.ainvoke(self._messages(history), **options))

    def stream(self, llm: Any, history: History, **options: Any) -> Iterator[str]:
        return (c.text for c in llm.stream(self._messages(history), **options) if c.content)

    def astream(self, llm: Any, history: History, **options: Any) -> AsyncIterator[str]:
        return (c.text async for c in llm.astream(self._messages(history), **options) if c.content)

    def count(self, llm: Any, history: History) -> int:
        counted: int = llm.get_num_tokens_from_messages(self._messages(history))
        return counted


@pytest.fixture
def bench(llm: ChatMLXPersistent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(LangChain(), llm, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_holds_in_every_framework(bench: Bench, case: Callable[[Bench], None]) -> None:
    case(bench)


@pytest.mark.parametrize("case", ASYNC_CASES, ids=lambda case: case.__name__)
async def test_what_holds_of_coroutines(bench: Bench, case: Callable[[Bench], Awaitable[None]]) -> None:
    await case(bench)


# Construction


def test_both_names_of_a_field_are_taken() -> None:
    one = ChatMLXPersistent(model="m", max_tokens=5, stop=["x"])
    two = ChatMLXPersistent(**{"model_name": "m", "max_completion_tokens": 5, "stop_sequences": ["x"]})
    assert one == two


def test_a_name_of_another_provider_is_warned_of() -> None:
    with pytest.warns(UnknownSetting, match="'base_url' is no setting of ChatMLXPersistent"):
        ChatMLXPersistent(**{"base_url": "http://localhost"})


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


def test_an_unknown_response_format_is_refused(llm: ChatMLXPersistent) -> None:
    with pytest.raises(InvalidRequest, match="response_format"):
        llm.invoke("hi", response_format={"type": "xml"})


def test_what_cannot_be_read_is_refused(llm: ChatMLXPersistent) -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(InvalidRequest, match="image_url"):
        llm.invoke([HumanMessage([picture])])


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


def test_where_no_tool_is_offered_the_answer_is_text_whatever_the_history_holds(
    llm: ChatMLXPersistent,
) -> None:
    call = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 2, "b": 3}, "id": "1"}])
    result = ToolMessage("5", tool_call_id="1")
    ask = HumanMessage("What is 2 plus 3?")
    again = [AIMessage("The result is 5."), HumanMessage("What is the weather in Rome?")]
    histories = [[ask, call, result, *again], [ask, call, result], [ask, call, result, *again, call, result]]
    for history in histories:
        for answer in (
            llm.invoke(history, max_tokens=80),
            llm.invoke(history, max_tokens=80, tool_choice="none"),
            merge(list(llm.stream(history, max_tokens=80))),
        ):
            assert answer.text.strip()
            assert "<tool_call>" not in answer.text
            assert (answer.tool_calls, answer.invalid_tool_calls) == ([], [])


# The response cache and tracers


class Recorder(BaseTracer):
    """Keeps what a tracer is told of a call, but for the caller's own configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def _persist_run(self, run: Any) -> None:
        self.seen.append(repr((run.inputs, run.outputs, run.extra.get("invocation_params"))))


def test_the_response_cache_and_tracers_are_told_nothing_of_a_session(store: Path) -> None:
    model = ChatMLXPersistent(cache_dir=store, temperature=0, max_tokens=8, cache=InMemoryCache())
    recorder = Recorder()

    def config(session: str) -> RunnableConfig:
        return {"configurable": {"thread_id": session}, "callbacks": [recorder]}

    first = model.invoke(QUESTION, config("secret-one"))
    assert first.response_metadata["session_id"] == "secret-one"
    assert first.response_metadata["persisted"] is True
    second = model.invoke(QUESTION, config("secret-two"))
    assert second.content == first.content
    assert not set(second.response_metadata) & set(measurements(REPORT)) - {"finish_reason"}
    whole = merge(list(model.stream(QUESTION, config("secret-three"))))
    assert whole.response_metadata["session_id"] == "secret-three"
    assert len(recorder.seen) == 3
    private = ("secret", *(set(measurements(REPORT)) - {"finish_reason"}))
    assert not [word for word in private for seen in recorder.seen if word in seen]


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def test_what_was_prefilled_is_warm(llm: ChatMLXPersistent) -> None:
    beginning = [("system", RULES)]
    report = llm.prefill(beginning, [add], config=thread("ahead"), namespace="ahead")
    assert (report.usage.cache_read, report.session_id) == (0, "ahead")
    # A prompt's last token is always computed: the next token follows from it.
    again = await llm.aprefill(beginning, [add], session_id="ahead", namespace="ahead")
    assert again.usage.cache_read == report.usage.prompt_tokens - 1
    asked = [*beginning, ("user", "What is 2 plus 3?")]
    answer = llm.bind_tools([add]).invoke(asked, thread("ahead"), namespace="ahead")
    assert cache_read(answer) == report.usage.prompt_tokens


def test_what_was_prefilled_is_warm_after_a_restart(tmp_path: Path) -> None:
    beginning = [("system", RULES)]
    llm = ChatMLXPersistent(cache_dir=tmp_path, temperature=0, max_tokens=2)
    report = llm.prefill(beginning, [add], session_id="ahead")
    llm.memory.close()
    asked = [*beginning, ("user", "What is 2 plus 3?")]
    answer = llm.bind_tools([add]).invoke(asked, session_id="ahead")
    assert cache_read(answer) == report.usage.prompt_tokens
    assert answer.response_metadata["hit_tier"] == "warm"
    llm.memory.close()


def test_what_is_prefilled_without_a_session_is_in_memory_only(llm: ChatMLXPersistent) -> None:
    known = {session.session_id for session in llm.memory.sessions()}
    report = llm.prefill("Where is the garden?" * 60, namespace="prefilled")
    assert report.session_id is None
    answer = llm.invoke("Where is the garden?" * 60 + " Here.", namespace="prefilled", max_tokens=1)
    # The text goes on where the message ended before, and its last word may become another token.
    assert cache_read(answer) >= report.usage.prompt_tokens - 4
    assert {session.session_id for session in llm.memory.sessions()} == known


def test_a_beginning_that_cannot_be_used_is_refused(llm: ChatMLXPersistent) -> None:
    with pytest.raises(InvalidRequest, match="num_beams"):
        llm.prefill("hi", num_beams=2)
    with pytest.raises(InvalidRequest, match="at least one message"):
        llm.prefill([])


@pytest.mark.parametrize(
    "builtin",
    [
        {"type": "web_search"},
        {"type": "web_search_20250305", "name": "web_search"},
        {"googleSearch": {}},
        {"type": "code_interpreter", "container": {"type": "auto"}},
    ],
)
def test_a_tool_that_a_provider_runs_is_refused_by_name(
    llm: ChatMLXPersistent, builtin: dict[str, Any]
) -> None:
    name = str(builtin.get("type") or next(iter(builtin)))
    for choice in (None, "any"):
        with pytest.raises(InvalidRequest, match=f"{name}.* is not valid: a provider runs it"):
            llm.bind_tools([builtin], tool_choice=choice)
    with pytest.raises(InvalidRequest, match=name):
        llm.invoke("hi", tools=[builtin])


def test_a_choice_of_a_tool_that_is_not_there_is_refused(llm: ChatMLXPersistent) -> None:
    with pytest.raises(InvalidRequest, match="get_weather"):
        llm.bind_tools([get_weather], tool_choice="get_wether")


# Tokens


def test_counted_tokens_include_those_of_tools(llm: ChatMLXPersistent) -> None:
    alone = llm.get_num_tokens_from_messages(QUESTION)
    assert llm.get_num_tokens_from_messages(QUESTION, tools=[get_weather]) > alone
    assert llm.get_num_tokens("hello there") == len(llm.get_token_ids("hello there")) > 0
