"""The session of a call, over every route by which LangChain and LangGraph reach a chat model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar, TypedDict
from uuid import UUID

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableConfig, RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Send

from agent_memory_core import InvalidRequest, SessionKey
from langchain_agent_memory import ChatMLXPersistent
from langchain_agent_memory.sessions import resolve_session


class Recorder(ChatMLXPersistent):
    """Keeps the session of each call instead of running it."""

    keys: ClassVar[list[SessionKey]] = []
    answers: ClassVar[list[AIMessage]] = []

    def _record(self, run_manager: object, kwargs: dict[str, Any]) -> AIMessage:
        self.keys.append(self._take_session(kwargs, run_manager=run_manager))
        return self.answers.pop(0) if self.answers else AIMessage("ok")

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        message = self._record(run_manager, kwargs)
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        return self._generate(messages, stop, run_manager, **kwargs)

    def _stream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        message = self._record(run_manager, kwargs)
        yield ChatGenerationChunk(
            message=AIMessageChunk(content=message.content, tool_calls=message.tool_calls)
        )

    async def _astream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._stream(messages, stop, run_manager, **kwargs):
            yield chunk


@pytest.fixture(autouse=True)
def _clean() -> None:
    Recorder.keys.clear()
    Recorder.answers.clear()


THREAD: RunnableConfig = {"configurable": {"thread_id": "T"}}
T = SessionKey("T")
Route = Callable[[Recorder], object]


async def _drain(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


def _graph(node: Any) -> Any:
    builder = StateGraph(MessagesState)
    builder.add_node("talk", node)
    builder.add_edge(START, "talk")
    builder.add_edge("talk", END)
    return builder


def _sync_node(model: Recorder) -> Any:
    return lambda state: {"messages": [model.invoke(state["messages"])]}


def _node_with_config(model: Recorder) -> Any:
    def node(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"], config)]}

    return node


def _node_with_own_configurable(model: Recorder) -> Any:
    return lambda state: {"messages": [model.invoke(state["messages"], {"configurable": {"k": 1}})]}


def _async_node(model: Recorder) -> Any:
    async def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    return node


INPUT: Any = {"messages": [HumanMessage("hi")]}
PROMPT = ChatPromptTemplate.from_messages([("human", "{text}")])


def _saved(node: Any) -> Any:
    return _graph(node).compile(checkpointer=InMemorySaver())


DIRECT: dict[str, Route] = {
    "invoke": lambda m: m.invoke("hi", THREAD),
    "ainvoke": lambda m: asyncio.run(m.ainvoke("hi", THREAD)),
    "stream": lambda m: list(m.stream("hi", THREAD)),
    "astream": lambda m: asyncio.run(_drain(m.astream("hi", THREAD))),
    "batch": lambda m: m.batch(["hi"], THREAD),
    "abatch": lambda m: asyncio.run(m.abatch(["hi"], THREAD)),
    "events of version 2": lambda m: asyncio.run(_drain(m.astream_events("hi", THREAD, version="v2"))),
    "chain": lambda m: (PROMPT | m).invoke({"text": "hi"}, THREAD),
    "chain, streamed": lambda m: list((PROMPT | m).stream({"text": "hi"}, THREAD)),
    "chain, streamed, async": lambda m: asyncio.run(_drain((PROMPT | m).astream({"text": "hi"}, THREAD))),
    "with_config": lambda m: m.with_config(THREAD).invoke("hi"),
    "with_config, streamed": lambda m: list(m.with_config(THREAD).stream("hi")),
    "bound tools": lambda m: m.bind_tools([]).invoke("hi", THREAD),
    "retry": lambda m: m.with_retry().invoke("hi", THREAD),
    "fallback": lambda m: _around(_fail).with_fallbacks([m]).invoke("hi", THREAD),
    "configurable field": lambda m: m.configurable_fields(temperature=ConfigurableField(id="heat")).invoke(
        "hi", {"configurable": {"thread_id": "T", "heat": 0.5}}
    ),
    "lambda, configuration around": lambda m: _around(m.invoke).invoke("hi", THREAD),
    "lambda, streamed": lambda m: _around(lambda x: list(m.stream(x))).invoke("hi", THREAD),
    "plain thread with configuration": lambda m: _in_thread(lambda: m.invoke("hi", THREAD)),
    "bound session": lambda m: m.bind(session_id="T").invoke("hi", {"configurable": {"thread_id": "other"}}),
    "argument over everything": lambda m: m.invoke(
        "hi", {"configurable": {"session_id": "other"}}, session_id="T"
    ),
    "session_id over thread_id": lambda m: m.invoke(
        "hi", {"configurable": {"thread_id": "other"}, "metadata": {"session_id": "T"}}
    ),
    "own name over session_id": lambda m: m.invoke(
        "hi", {"configurable": {"session_id": "other"}, "metadata": {"agent_memory_session_id": "T"}}
    ),
    "metadata": lambda m: m.invoke("hi", {"metadata": {"conversation_id": "T"}}),
    "callback handler over thread_id": lambda m: m.invoke(
        "hi", {"callbacks": [Tagged()], "configurable": {"thread_id": "other"}}
    ),
    "generate, without an entry point": lambda m: m.generate([[HumanMessage("hi")]], session_id="T"),
    "agenerate": lambda m: asyncio.run(m.agenerate([[HumanMessage("hi")]], metadata={"thread_id": "T"})),
}


class Tagged(BaseCallbackHandler):
    """A handler that names the session of all calls it watches."""

    agent_memory_session_id = "T"


def _around(call: Callable[[Any], Any]) -> RunnableLambda[Any, Any]:
    """``call`` in a runnable that gets a configuration and passes none on."""
    return RunnableLambda(lambda x: call(x))


def _fail(_: object) -> str:
    raise ValueError("on purpose")


def _in_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.parametrize("route", DIRECT)
def test_a_direct_call_finds_its_session(route: str) -> None:
    DIRECT[route](Recorder())
    assert Recorder.keys == [T]


GRAPHS: dict[str, Route] = {
    "node": lambda m: _saved(_sync_node(m)).invoke(INPUT, THREAD),
    "node given its configuration": lambda m: _saved(_node_with_config(m)).invoke(INPUT, THREAD),
    "node that passes another": lambda m: _saved(_node_with_own_configurable(m)).invoke(INPUT, THREAD),
    "node, async graph": lambda m: asyncio.run(_saved(_sync_node(m)).ainvoke(INPUT, THREAD)),
    "async node": lambda m: asyncio.run(_saved(_async_node(m)).ainvoke(INPUT, THREAD)),
    "updates": lambda m: list(_saved(_sync_node(m)).stream(INPUT, THREAD, stream_mode="updates")),
    "messages": lambda m: list(_saved(_sync_node(m)).stream(INPUT, THREAD, stream_mode="messages")),
    "messages, async": lambda m: asyncio.run(
        _drain(_saved(_async_node(m)).astream(INPUT, THREAD, stream_mode="messages"))
    ),
    "events": lambda m: asyncio.run(
        _drain(_saved(_async_node(m)).astream_events(INPUT, THREAD, version="v2"))
    ),
    "no checkpointer": lambda m: _graph(_sync_node(m)).compile().invoke(INPUT, THREAD),
}


@pytest.mark.parametrize("route", GRAPHS)
def test_a_graph_node_belongs_to_its_thread(route: str) -> None:
    GRAPHS[route](Recorder())
    assert Recorder.keys == [SessionKey("T", lane="talk")]


def test_batch_gives_each_input_the_session_of_its_own_configuration() -> None:
    configs: list[RunnableConfig] = [{"configurable": {"thread_id": name}} for name in "ABC"]
    Recorder().batch(["hi"] * 3, configs)
    assert sorted(Recorder.keys, key=lambda key: key.session_id or "") == [SessionKey(n) for n in "ABC"]


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
async def test_events_of_version_3_resolve_at_the_call() -> None:
    pytest.importorskip("langchain_core.language_models.chat_model_stream", reason="no events of version 3")
    model = Recorder()
    list(model.stream_events("hi", THREAD, version="v3"))
    stream = await model.astream_events("hi", THREAD, version="v3")
    await _drain(stream)
    assert Recorder.keys == [T, T]


def test_streams_resolve_when_called_not_when_read() -> None:
    model = Recorder()
    stream = _around(lambda x: [model.stream(x)]).invoke("hi", THREAD)[0]
    list(stream)
    assert Recorder.keys == [T]


def test_a_thread_that_lost_its_context_is_anonymous() -> None:
    model = Recorder()
    _around(lambda x: _in_thread(lambda: model.invoke(x))).invoke("hi", THREAD)
    assert Recorder.keys == [SessionKey(None)]


def test_callbacks_alone_carry_the_session_into_a_thread() -> None:
    model = Recorder()

    def node(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        _in_thread(lambda: model.invoke("hi", {"callbacks": config["callbacks"], "metadata": {"k": 1}}))
        return {"messages": []}

    _saved(node).invoke(INPUT, THREAD)
    assert Recorder.keys == [SessionKey("T", lane="talk")]


def test_the_model_has_a_session_of_its_own_for_calls_without_one() -> None:
    model = Recorder(session_id="mine", namespace="us")
    model.invoke("hi")
    model.invoke("hi", THREAD)
    assert Recorder.keys == [SessionKey("mine", "us"), SessionKey("T", "us")]


def test_namespace_of_the_call_then_configuration_then_model() -> None:
    model = Recorder(namespace="us")
    config: RunnableConfig = {"configurable": {"agent_memory_namespace": "them"}}
    model.invoke("hi", config)
    model.invoke("hi", config, namespace="me")
    assert [key.namespace for key in Recorder.keys] == ["them", "me"]


def test_a_subgraph_and_a_parallel_fan_out_share_thread_and_have_lanes() -> None:
    model = Recorder()
    inner = _graph(_sync_node(model)).compile()
    builder = StateGraph(MessagesState)
    builder.add_node("team", inner)
    builder.add_node("worker", _sync_node(model))
    builder.add_conditional_edges(START, lambda state: [Send("worker", state), Send("worker", state)])
    builder.add_edge("worker", "team")
    builder.compile(checkpointer=InMemorySaver()).invoke(INPUT, THREAD)
    assert Recorder.keys == [
        SessionKey("T", lane="worker"),
        SessionKey("T", lane="worker"),
        SessionKey("T", lane="team|talk"),
    ]


def test_runtime_context_names_a_session() -> None:
    class Context(TypedDict):
        session_id: str

    model = Recorder()
    builder = StateGraph(MessagesState, context_schema=Context)
    builder.add_node("talk", _sync_node(model))
    builder.add_edge(START, "talk")
    builder.compile().invoke(INPUT, context={"session_id": "S"})
    assert Recorder.keys == [SessionKey("S", lane="talk")]


def agents() -> Any:
    """LangChain's agents, which the oldest langchain-core that a chat model runs on does not have yet."""
    return pytest.importorskip("langchain.agents", reason="needs the extra agents")


def _call(name: str, **args: Any) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": args, "id": f"call-{name}"}])


def test_an_agent_inside_a_tool_stays_in_the_thread_with_a_lane_of_its_own() -> None:
    create_agent = agents().create_agent
    model = Recorder()
    inner = create_agent(model, [], name="inner")

    @tool
    def ask(question: str) -> str:
        """Ask the inner agent."""
        answer: list[BaseMessage] = inner.invoke({"messages": [HumanMessage(question)]})["messages"]
        return answer[-1].text

    outer = create_agent(model, [ask], name="outer", checkpointer=InMemorySaver())
    Recorder.answers.append(_call("ask", question="why"))
    outer.invoke(INPUT, THREAD)
    assert [key.session_id for key in Recorder.keys] == ["T", "T", "T"]
    assert [key.lane for key in Recorder.keys] == ["outer/model", "inner/tools|model", "outer/model"]


def test_a_graph_called_with_a_thread_of_its_own_leaves_the_outer_one() -> None:
    model = Recorder()
    inner = _saved(_sync_node(model))

    def node(state: MessagesState) -> dict[str, Any]:
        inner.invoke({"messages": state["messages"]}, {"configurable": {"thread_id": "inner"}})
        return {"messages": []}

    _saved(node).invoke(INPUT, THREAD)
    assert [key.session_id for key in Recorder.keys] == ["inner"]


def test_calls_that_middleware_makes_for_itself_are_ephemeral() -> None:
    create_agent = agents().create_agent
    model = Recorder()
    made = agents().middleware.SummarizationMiddleware
    middleware = made(model, trigger=("messages", 2), keep=("messages", 1))
    agent = create_agent(model, [], middleware=[middleware], checkpointer=InMemorySaver())
    agent.invoke({"messages": [HumanMessage("a"), AIMessage("b"), HumanMessage("c")]}, THREAD)
    summary, answer = Recorder.keys
    assert (summary.session_id, summary.ephemeral) == ("T", True)
    assert summary.lane.endswith("/summarization")
    assert answer == SessionKey("T", lane="model")


def test_ids_that_are_not_text() -> None:
    uuid = UUID(int=7)
    assert resolve_session({"configurable": {"thread_id": uuid}}).session_id == str(uuid)
    assert resolve_session({"configurable": {"thread_id": 7}}).session_id == "7"
    assert resolve_session({"configurable": {"session_id": ["a"], "thread_id": ""}}).session_id is None
    with pytest.raises(InvalidRequest, match="session_id"):
        resolve_session(session_id=["a"])


def test_equal_conversations_of_two_users_are_two_sessions() -> None:
    def session(**configurable: Any) -> str | None:
        return resolve_session({"configurable": configurable}).session_id

    pairs = [("ada", "1"), ("tom", "1"), ("ada", "2"), ('a", "b', "c"), ("a", 'b", "c')]
    named = [session(user_id=user, conversation_id=conversation) for user, conversation in pairs]
    assert len(set(named)) == len(pairs)
    assert session(user_id=7, conversation_id=1) == session(user_id="7", conversation_id="1")
    assert session(conversation_id="1") == "1"
    assert session(user_id="ada") is None
    # A thread is LangGraph's own key, under which its checkpoints are.
    assert session(user_id="ada", thread_id="1", conversation_id="2") == "1"


def test_a_conversations_user_may_be_named_elsewhere() -> None:
    model = Recorder()
    model.invoke("hi", {"configurable": {"conversation_id": "1"}, "metadata": {"user_id": "ada"}})
    model.invoke("hi", {"configurable": {"conversation_id": "1", "user_id": "ada"}})
    assert Recorder.keys[0] == Recorder.keys[1]


def test_only_a_thread_is_one() -> None:
    # What is called a thread is forgotten where no checkpoint of that name exists.
    assert resolve_session({"configurable": {"thread_id": "1"}}).is_thread
    assert not resolve_session({"configurable": {"conversation_id": "1"}}).is_thread


class Watch(BaseCallbackHandler):
    """Keeps everything a tracer is told of a call."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.told.append(f"{args} {kwargs}")


def test_traces_do_not_show_the_key() -> None:
    watch = Watch()
    model = Recorder(callbacks=[watch])
    model.invoke("hi", session_id="secret-session", namespace="secret-namespace")
    list(model.stream("hi", session_id="secret-session"))
    owner = Recorder(callbacks=[watch], session_id="secret", namespace="secret", cache_dir="/secret/caches")
    owner.invoke("hi")
    (RunnableLambda(str) | owner).invoke("hi", {"callbacks": [watch]})
    assert len(watch.told) == 4
    assert "Recorder" in watch.told[-1]
    assert not any("SessionKey" in told or "secret" in told for told in watch.told)


def test_the_response_cache_is_shared_by_sessions_and_split_by_namespaces() -> None:
    model = Recorder(cache=InMemoryCache())
    for session, namespace in (("a", "us"), ("b", "us"), ("a", "them")):
        model.invoke("hi", session_id=session, namespace=namespace)
    assert Recorder.keys == [SessionKey("a", "us"), SessionKey("a", "them")]
