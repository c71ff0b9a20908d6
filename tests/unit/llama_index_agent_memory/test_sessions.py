"""The session of a call, over every route by which LlamaIndex reaches a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID, uuid4

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer, Memory
from llama_index.core.prompts import PromptTemplate
from llama_index.core.storage.chat_store.sql import SQLAlchemyChatStore
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context
from llama_index_instrumentation.dispatcher import instrument_tags
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import create_async_engine

from agent_memory_core import ChatResult, Delta, InvalidRequest, SessionKey, ToolCall, TurnReport, Usage
from agent_memory_core.adapter import Turn
from llama_index_agent_memory import MLXPersistentLLM, memory_session
from llama_index_agent_memory.sessions import Surroundings, _of_memory, look_around, resolve_session

pytestmark = [
    # LlamaIndex walks over the deprecated names of its own agents, which are pydantic models.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]

REPORT = TurnReport("stop", Usage(1, 1, 0), "none", "new", 0.0, 0.0, 0.0, None, None, "tiny-chat", False)


class Script:
    """Stands where the engine does and says what the test wrote."""

    def __init__(self, answer: ChatResult) -> None:
        self.answer = answer
        self.deltas = [
            Delta(text=answer.text),
            Delta(tool_calls=answer.tool_calls, report=answer.report),
        ]

    def chat(self, request: Any, session: Any, *, stream: bool = False) -> Any:
        return Stream(self.deltas) if stream else self.answer

    async def achat(self, request: Any, session: Any, *, stream: bool = False) -> Any:
        return Stream(self.deltas) if stream else self.answer


class Stream:
    def __init__(self, deltas: list[Delta]) -> None:
        self.deltas = iter(deltas)

    def __enter__(self) -> Iterator[Delta]:
        return self.deltas

    def __exit__(self, *_: object) -> None: ...

    async def __aenter__(self) -> AsyncIterator[Delta]:
        return _each(self.deltas)

    async def __aexit__(self, *_: object) -> None: ...


async def _each(deltas: Iterator[Delta]) -> AsyncIterator[Delta]:
    for delta in deltas:
        yield delta


class Recorder(MLXPersistentLLM):
    """Keeps the session of each call instead of running it."""

    keys: ClassVar[list[SessionKey]] = []
    answers: ClassVar[list[str | ToolCall]] = []

    def _turn(self, messages: Any, kwargs: Any, seen: Surroundings) -> Turn:
        turn = super()._turn(messages, kwargs, seen)
        self.keys.append(turn.session)
        said = self.answers.pop(0) if self.answers else "Thought: I can answer.\nAnswer: ok"
        calls = (said,) if isinstance(said, ToolCall) else ()
        text = said if isinstance(said, str) else ""
        return turn._replace(memory=Script(ChatResult(text, "", calls, (), (), REPORT)))


def recorder(**fields: Any) -> Recorder:
    return Recorder(cache_dir=None, context_window=1000, **fields)


@pytest.fixture(autouse=True)
def _clean() -> None:
    Recorder.keys.clear()
    Recorder.answers.clear()


@pytest.fixture
def loop() -> Iterator[None]:
    """The loop that LlamaIndex makes where a sync engine finds none, and would leave open."""
    made = asyncio.new_event_loop()
    asyncio.set_event_loop(made)
    yield
    asyncio.set_event_loop(None)
    made.close()


S = SessionKey("S")
HI = [ChatMessage("hi")]
Route = Callable[[Recorder], object]
ARoute = Callable[[Recorder], Awaitable[object]]


async def drain(stream: Awaitable[AsyncIterator[Any]]) -> list[Any]:
    return [item async for item in await stream]


class Answer(BaseModel):
    """An answer."""

    text: str = ""


ASK = PromptTemplate("hi")


# Calls of the model itself


SYNC: dict[str, Route] = {
    "chat": lambda m: m.chat(HI),
    "stream_chat": lambda m: list(m.stream_chat(HI)),
    "complete": lambda m: m.complete("hi"),
    "stream_complete": lambda m: list(m.stream_complete("hi")),
    "predict": lambda m: m.predict(ASK),
    "stream": lambda m: list(m.stream(ASK)),
    "chat_with_tools": lambda m: m.chat_with_tools([], "hi"),
    "stream_chat_with_tools": lambda m: list(m.stream_chat_with_tools([], "hi")),
    "chat engine": lambda m: _engine(m).chat("hi"),
    "chat engine, streamed": lambda m: list(_engine(m).stream_chat("hi").response_gen),
}
ASYNC: dict[str, ARoute] = {
    "achat": lambda m: m.achat(HI),
    "astream_chat": lambda m: drain(m.astream_chat(HI)),
    "acomplete": lambda m: m.acomplete("hi"),
    "astream_complete": lambda m: drain(m.astream_complete("hi")),
    "apredict": lambda m: m.apredict(ASK),
    "achat_with_tools": lambda m: m.achat_with_tools([], "hi"),
    "astream_chat_with_tools": lambda m: drain(m.astream_chat_with_tools([], "hi")),
    "chat engine": lambda m: _engine(m).achat("hi"),
    "function agent": lambda m: _run(FunctionAgent(llm=m)),
    "function agent, not streaming": lambda m: _run(FunctionAgent(llm=m, streaming=False)),
    "react agent": lambda m: _run(ReActAgent(llm=m)),
    "agent workflow": lambda m: _run(AgentWorkflow(agents=[FunctionAgent(llm=m)])),
    "to_thread": lambda m: asyncio.to_thread(m.chat, HI),
    "task": lambda m: asyncio.create_task(m.achat(HI)),
}


def _engine(llm: Recorder) -> SimpleChatEngine:
    return SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults(llm=llm))


async def _run(agent: Any, **more: Any) -> Any:
    return await agent.run("hi", **more)


@pytest.mark.parametrize("route", SYNC)
@pytest.mark.usefixtures("loop")
def test_tags_reach_every_call(route: str) -> None:
    with memory_session("S"):
        SYNC[route](recorder())
    assert Recorder.keys == [S]


@pytest.mark.parametrize("route", ASYNC)
async def test_tags_reach_every_coroutine_and_agent(route: str) -> None:
    with memory_session("S"):
        await ASYNC[route](recorder())
    assert [key.session_id for key in Recorder.keys] == ["S"]


@pytest.mark.parametrize("route", SYNC)
@pytest.mark.usefixtures("loop")
def test_the_model_has_a_session_of_its_own_for_calls_without_one(route: str) -> None:
    SYNC[route](recorder(session_id="S"))
    assert Recorder.keys == [S]


class Remembering:
    """A memory, as far as a session is looked for in it."""

    def __init__(self, session_id: str, address: str) -> None:
        self.session_id = session_id
        self.sql_store = SQLAlchemyChatStore(table_name="t", async_database_uri=address)


def key_of(memory: object, **named: Any) -> str | None:
    chosen, made_up = _of_memory(memory)
    return resolve_session(Surroundings(memory=chosen, made_up=made_up), **named).session_id


def test_an_id_that_a_memory_made_up_is_the_last_of_all_and_a_session_only_if_it_lasts() -> None:
    made_up, kept = str(uuid4()), "sqlite+aiosqlite:///chat.db"
    fleeting = Remembering(made_up, "sqlite+aiosqlite:///:memory:")
    assert key_of(fleeting) is None
    assert key_of(fleeting, default_session_id="mine") == "mine"
    assert key_of(Remembering(made_up, kept)) == made_up
    assert key_of(Remembering(made_up, kept), default_session_id="mine") == "mine"
    assert key_of(Remembering("ada", "sqlite+aiosqlite:///:memory:"), default_session_id="mine") == "ada"
    assert key_of(None, default_session_id="mine") == "mine"
    assert key_of(Memory.from_defaults(token_limit=100)) is None


def test_structured_answers_belong_to_a_session_too() -> None:
    llm = recorder()
    Recorder.answers += ['{"text": "a"}'] * 2
    with memory_session("S"):
        llm.structured_predict(Answer, ASK)
        list(llm.stream_structured_predict(Answer, ASK))
    assert Recorder.keys == [S, S]


def test_an_argument_goes_before_everything() -> None:
    llm = recorder(session_id="model")
    with memory_session("tags"):
        llm.chat(HI, session_id="S")
        list(llm.stream_complete("hi", session_id="S"))
        llm.chat_with_tools([], "hi", session_id="S")
    assert Recorder.keys == [S] * 3


# Order


class Tagged(BaseCallbackHandler):
    """A handler that names the session of the models it is given to."""

    agent_memory_session_id = "handler"

    def __init__(self) -> None:
        super().__init__([], [])

    def on_event_start(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def on_event_end(self, *args: Any, **kwargs: Any) -> None: ...
    def start_trace(self, trace_id: str | None = None) -> None: ...
    def end_trace(self, *args: Any, **kwargs: Any) -> None: ...


def test_a_callback_handler_goes_before_the_model_and_after_tags() -> None:
    llm = recorder(session_id="model", callback_manager=CallbackManager([Tagged()]))
    llm.chat(HI)
    with memory_session("tags"):
        llm.chat(HI)
    assert [key.session_id for key in Recorder.keys] == ["handler", "tags"]


def test_the_order_of_all_sources() -> None:
    sources: list[dict[str, Any]] = [
        {"tags": {"agent_memory_session_id": "1", "session_id": "2", "thread_id": "3"}},
        {"tags": {"session_id": "2", "thread_id": "3"}},
        {"tags": {"thread_id": "3"}},
        {"state": {"agent_memory_session_id": "4"}},
        {"memory": "5"},
        {"handler": "6"},
    ]
    seen: dict[str, Any] = {}
    for expected in range(6, 0, -1):
        seen |= sources[expected - 1]
        assert resolve_session(Surroundings(**seen), default_session_id="7").session_id == str(expected)
    assert resolve_session(Surroundings(**seen), session_id="0").session_id == "0"
    assert resolve_session(Surroundings(), default_session_id="7").session_id == "7"
    assert resolve_session(Surroundings()) == SessionKey(None)


def test_ids_that_are_not_text() -> None:
    uuid = UUID(int=7)
    assert resolve_session(Surroundings({"session_id": uuid})).session_id == str(uuid)
    assert resolve_session(Surroundings({"session_id": 7})).session_id == "7"
    assert resolve_session(Surroundings({"session_id": ["a"], "thread_id": ""})).session_id is None
    with pytest.raises(InvalidRequest, match="session_id"):
        resolve_session(Surroundings(), session_id=["a"])
    with pytest.raises(InvalidRequest, match="agent_memory_session_id"), memory_session(True):
        pass


def test_namespace_of_the_call_then_tags_then_model() -> None:
    llm = recorder(namespace="us")
    llm.chat(HI)
    with memory_session("S", namespace="them"):
        llm.chat(HI)
        llm.chat(HI, namespace="me")
    assert [key.namespace for key in Recorder.keys] == ["us", "them", "me"]


# Tags


def test_memory_session_adds_to_the_tags_around_it() -> None:
    with instrument_tags({"trace": "x", "session_id": "outer"}):
        with memory_session("S", lane="writer"):
            with memory_session("T"):
                assert look_around().tags == {
                    "trace": "x",
                    "session_id": "outer",
                    "agent_memory_session_id": "T",
                    "agent_memory_lane": "writer",
                }
            assert resolve_session(look_around()) == SessionKey("S", lane="writer")
        assert look_around().tags == {"trace": "x", "session_id": "outer"}


async def test_sessions_side_by_side_do_not_mix() -> None:
    llm = recorder()

    async def talk(name: str) -> None:
        with memory_session(name):
            for _ in range(3):
                await asyncio.sleep(0)
                await FunctionAgent(llm=llm, name=name).run("hi")

    await asyncio.gather(*(talk(name) for name in "ABC"))
    assert sorted((key.session_id, key.lane) for key in Recorder.keys) == sorted(
        zip("AAABBBCCC", "AAABBBCCC", strict=True)
    )


async def test_a_run_that_is_awaited_outside_the_block_keeps_its_session() -> None:
    with memory_session("S"):
        handler = FunctionAgent(llm=recorder()).run("hi")
    await handler
    assert Recorder.keys == [SessionKey("S", lane="Agent")]


async def test_streams_resolve_when_called_not_when_read() -> None:
    llm = recorder()
    with memory_session("S"):
        streams = [llm.stream_chat(HI), llm.stream_complete("hi")]
        later = [await llm.astream_chat(HI), await llm.astream_complete("hi")]
    thread = threading.Thread(target=lambda: [list(stream) for stream in streams])
    thread.start()
    thread.join()
    for stream in later:
        assert [piece async for piece in stream]
    assert Recorder.keys == [S] * 4


def test_a_thread_that_lost_its_context_is_anonymous() -> None:
    llm = recorder()
    with memory_session("S"):
        thread = threading.Thread(target=lambda: llm.chat(HI))
        thread.start()
        thread.join()
    assert Recorder.keys == [SessionKey(None)]


# Workflows


@asynccontextmanager
async def memory_of(session_id: str, folder: Path) -> AsyncIterator[Memory]:
    # Of its own, because nothing else closes it.
    engine = create_async_engine(f"sqlite+aiosqlite:///{folder / 'chat.db'}")
    yield Memory.from_defaults(session_id=session_id, token_limit=4000, async_engine=engine)
    await engine.dispose()


# A context leaves its memory out, which has to be given again.
@pytest.mark.filterwarnings("ignore::workflows.context.state_store.UnserializableKeyWarning")
async def test_the_store_of_the_context_names_the_session_also_after_it_was_saved() -> None:
    agent = FunctionAgent(llm=recorder(session_id="model"), name="solo")
    context = Context(agent)
    await context.store.set("agent_memory_session_id", "S")
    await context.store.set("agent_memory_namespace", "us")
    await agent.run("hi", ctx=context)
    await agent.run("hi", ctx=Context.from_dict(agent, context.to_dict()))
    assert Recorder.keys == [SessionKey("S", "us", "solo")] * 2


async def test_the_memory_of_the_workflow_names_the_session(tmp_path: Path) -> None:
    llm = recorder(session_id="model")
    async with memory_of("S", tmp_path) as memory:
        await FunctionAgent(llm=llm).run("hi", memory=memory)
        await AgentWorkflow(agents=[ReActAgent(llm=llm)]).run("hi", memory=memory)
    assert [key.session_id for key in Recorder.keys] == ["S", "S"]


async def test_each_agent_of_a_handoff_has_its_lane() -> None:
    llm = recorder()
    a1 = FunctionAgent(name="a1", description="First.", llm=llm)
    a2 = FunctionAgent(name="a2", description="Second.", llm=llm)
    Recorder.answers.append(ToolCall("handoff", {"to_agent": "a2", "reason": "why not"}, "c1"))
    with memory_session("S"):
        await AgentWorkflow(agents=[a1, a2], root_agent="a1").run("hi")
    assert Recorder.keys == [SessionKey("S", lane="a1"), SessionKey("S", lane="a2")]


async def test_an_agent_inside_a_tool_stays_in_the_session_with_a_lane_of_its_own() -> None:
    llm = recorder()

    async def ask(question: str) -> str:
        """Ask the inner agent."""
        return str(await FunctionAgent(name="inner", llm=llm).run(question))

    outer = FunctionAgent(name="outer", llm=llm, tools=[FunctionTool.from_defaults(async_fn=ask)])
    Recorder.answers.append(ToolCall("ask", {"question": "why"}, "c1"))
    with memory_session("S"):
        await outer.run("hi")
    assert [key.session_id for key in Recorder.keys] == ["S", "S", "S"]
    assert [key.lane for key in Recorder.keys] == ["outer", "inner", "outer"]
