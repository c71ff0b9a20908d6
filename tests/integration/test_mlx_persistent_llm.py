"""MLXPersistentLLM on the real engine with the model that ships with the package."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from llama_index.core.agent.react.formatter import ReActChatFormatter
from llama_index.core.agent.workflow import AgentOutput, AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.memory import InsertMethod, Memory, StaticMemoryBlock
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from agent_memory_core import InvalidRequest, InvalidSetting, ModelNotFound, PromptTooLong
from langchain_agent_memory import ChatMLXPersistent
from llama_index_agent_memory import MLXPersistentLLM, memory_session

pytestmark = [
    # LlamaIndex walks over the deprecated names of its own agents, which are pydantic models.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    # A context leaves its memory out, which has to be given again.
    pytest.mark.filterwarnings("ignore::workflows.context.state_store.UnserializableKeyWarning"),
]

RULES = "You are a careful assistant who remembers what people say. " * 12
LONG = ChatMessage(RULES, role="system")
QUESTION = [LONG, ChatMessage("My name is Ada. What is my name?")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama-index") / "caches"


@pytest.fixture(scope="module")
def llm(store: Path) -> Iterator[MLXPersistentLLM]:
    """One engine for the whole file; tests keep apart by their sessions and namespaces."""
    model = MLXPersistentLLM(cache_dir=store, temperature=0, max_tokens=24)
    yield model
    model.memory.close()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """Where memories of a test lie: of its own, because nothing else closes it."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'chat.db'}")
    yield engine
    await engine.dispose()


def raw(response: Any) -> dict[str, Any]:
    assert isinstance(response.raw, dict)
    return response.raw


def cached(response: Any) -> int:
    found: int = raw(response)["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Construction


def test_constructing_loads_and_touches_nothing(tmp_path: Path) -> None:
    model = MLXPersistentLLM(model="no/such/model", cache_dir=tmp_path / "caches")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelNotFound, match="no/such/model"):
        model.complete("hi")


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
        MLXPersistentLLM(**values)
    assert isinstance(refused.value.errors()[0]["ctx"]["error"], error)


def test_both_names_of_a_field_are_taken() -> None:
    one = MLXPersistentLLM(model="m", max_tokens=5, stop=["x"])
    two = MLXPersistentLLM(**{"model_name": "m", "max_completion_tokens": 5, "stop_sequences": ["x"]})
    assert one.to_dict() == two.to_dict()


def test_what_is_not_given_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_MEMORY_MAX_TOKENS", "7")
    monkeypatch.setenv("AGENT_MEMORY_KV_BITS", "8")
    monkeypatch.setenv("AGENT_MEMORY_MODEL", "elsewhere")
    monkeypatch.setenv("AGENT_MEMORY_CONTEXT_LENGTH", "123")
    given = MLXPersistentLLM(model="tiny-chat", kv_bits=None, max_tokens=9)
    anew = MLXPersistentLLM.from_json(MLXPersistentLLM(seed=3).to_json())
    assert (given.memory.config.kv_bits, given.to_payload()["max_tokens"]) == (None, 9)
    assert (anew.memory.config.kv_bits, anew.to_payload()["max_tokens"]) == (8, 7)
    assert (given.to_payload()["model"], anew.to_payload()["model"]) == ("tiny-chat", "elsewhere")
    assert (anew.metadata.context_window, anew.metadata.num_output) == (123, 7)


# Memory


def test_the_next_turn_pays_for_new_tokens_only(llm: MLXPersistentLLM) -> None:
    first = llm.chat(QUESTION, session_id="turns")
    again = llm.chat([*QUESTION, first.message, ChatMessage("Thank you.")], session_id="turns")
    assert first.message.content == "Your name is Ada."
    # All of the first turn but its last token, whose key and value were never needed.
    assert cached(again) >= raw(first)["usage"]["total_tokens"] - 2
    report = raw(again)
    assert (report["hit_tier"], report["miss_reason"], report["session_id"]) == ("hot", "", "turns")
    assert report["persisted"] is True
    assert report["ttft_ms"] > 0


def test_a_session_survives_a_restart(tmp_path: Path) -> None:
    def answer(history: list[ChatMessage]) -> ChatResponse:
        model = MLXPersistentLLM(cache_dir=tmp_path, temperature=0, max_tokens=24)
        try:
            response: ChatResponse = model.chat(history, session_id="ada")
            return response
        finally:
            model.memory.close()

    history = list(QUESTION)
    history += [answer(history).message, ChatMessage("Say my name again.")]
    restarted = answer(history)
    assert raw(restarted)["hit_tier"] == "warm"
    assert cached(restarted) > 0

    unbroken = MLXPersistentLLM(cache_dir=None, temperature=0, max_tokens=24)
    unbroken.chat(QUESTION)
    assert unbroken.chat(history).message == restarted.message
    unbroken.memory.close()


def test_sessions_and_namespaces_are_the_callers(llm: MLXPersistentLLM) -> None:
    with memory_session("mine", namespace="a"):
        llm.complete("hi")
    llm.complete("hi", session_id="yours", namespace="b")
    llm.complete("hi", namespace="c")
    assert [s.session_id for s in llm.memory.sessions("a")] == ["mine"]
    assert [s.session_id for s in llm.memory.sessions("b")] == ["yours"]
    assert llm.memory.sessions("c") == []


def test_both_frameworks_go_on_with_one_session(llm: MLXPersistentLLM) -> None:
    chain = ChatMLXPersistent(cache_dir=llm.cache_dir, temperature=0, max_tokens=24)
    assert chain.memory is llm.memory

    said = [SystemMessage(RULES), HumanMessage("My name is Tom.")]
    first = chain.invoke(said, session_id="both")
    second = llm.chat(
        [
            LONG,
            ChatMessage("My name is Tom."),
            ChatMessage(first.text, role="assistant"),
            ChatMessage("What is my name?"),
        ],
        session_id="both",
    )
    assert first.usage_metadata is not None
    assert cached(second) >= first.usage_metadata["total_tokens"] - 2
    assert second.message.content == "Your name is Tom."

    more = [
        first,
        HumanMessage("What is my name?"),
        AIMessage("Your name is Tom."),
        HumanMessage("Thank you."),
    ]
    third = chain.invoke([*said, *more], session_id="both")
    assert third.usage_metadata is not None
    assert (
        third.usage_metadata["input_token_details"]["cache_read"] >= raw(second)["usage"]["total_tokens"] - 2
    )
    assert [s.branches for s in llm.memory.sessions() if s.session_id == "both"] == [1]


# Options of a call


def test_an_answer_ends_before_a_stop_string(llm: MLXPersistentLLM) -> None:
    assert llm.chat(QUESTION, stop=["Ada"]).message.content == "Your name is "
    stopped = llm.model_copy(update={"stop": ["Ada"]})
    assert stopped.chat(QUESTION).message.content == "Your name is "
    assert stopped.chat(QUESTION, stop=[]).message.content == "Your name is Ada."


def test_sampling_of_a_call_goes_before_that_of_the_model(llm: MLXPersistentLLM) -> None:
    short = llm.chat(QUESTION, max_completion_tokens=2)
    assert raw(short)["usage"]["completion_tokens"] == 2
    assert raw(short)["finish_reason"] == "length"
    hot = [llm.complete("Tell me.", temperature=5.0, seed=seed).text for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_an_unknown_option_is_refused(llm: MLXPersistentLLM) -> None:
    with pytest.raises(InvalidRequest, match=r"'tempreature'.*temperature"):
        llm.complete("hi", tempreature=1)
    with pytest.raises(InvalidRequest, match="temperature=-1"):
        llm.complete("hi", temperature=-1)


async def test_what_cannot_be_read_is_refused_at_the_call(llm: MLXPersistentLLM) -> None:
    picture = [ChatMessage(blocks=[ImageBlock(url="https://example.com/a.png")])]
    with pytest.raises(InvalidRequest, match="'image'"):
        llm.stream_chat(picture)
    with pytest.raises(InvalidRequest, match="'image'"):
        await llm.astream_chat(picture)
    with pytest.raises(PromptTooLong):
        llm.complete("word " * 20_000)


# Side by side


async def test_many_at_once_answer_as_one_by_one(llm: MLXPersistentLLM) -> None:
    questions = [f"My name is {name}. What is my name?" for name in ("Ada", "Mia", "Tom", "Eva")]
    one_by_one = [llm.complete(q).text for q in questions]
    at_once = await asyncio.gather(
        *(llm.acomplete(q, session_id=f"gather {i}") for i, q in enumerate(questions))
    )
    assert [answer.text for answer in at_once] == one_by_one


# Withdrawing


def idle(llm: MLXPersistentLLM) -> Callable[[], bool]:
    return lambda: not (llm.memory.stats().waiting or llm.memory.stats().running)


def test_leaving_a_stream_frees_its_place(llm: MLXPersistentLLM) -> None:
    for piece in llm.stream_chat(QUESTION, max_tokens=4000, temperature=2.0, seed=1):
        assert not idle(llm)()
        if piece.delta:
            break
    wait_until(idle(llm))


def test_a_stream_that_is_never_read_runs_nothing(llm: MLXPersistentLLM) -> None:
    stream = llm.stream_complete("hi", max_tokens=4000)
    assert idle(llm)()
    del stream


async def test_leaving_an_async_stream_frees_its_place(llm: MLXPersistentLLM) -> None:
    async for piece in await llm.astream_chat(QUESTION, max_tokens=4000):
        if piece.delta:
            break
    await asyncio.to_thread(wait_until, idle(llm))


@pytest.mark.parametrize("streams", [False, True])
async def test_a_cancelled_task_frees_its_place(llm: MLXPersistentLLM, streams: bool) -> None:
    async def drain() -> None:
        async for _ in await llm.astream_chat(QUESTION, max_tokens=4000, temperature=2.0, seed=1):
            pass

    asked = drain() if streams else llm.achat(QUESTION, max_tokens=4000, temperature=2.0, seed=1)
    task: asyncio.Task[Any] = asyncio.ensure_future(asked)
    await asyncio.to_thread(wait_until, lambda: not idle(llm)())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(wait_until, idle(llm))


# Agents


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "sunny"


WEATHER = FunctionTool.from_defaults(get_weather)


async def calls_of(agent: Any, text: str, **more: Any) -> list[AgentOutput]:
    """What the calls of the model in one run came to."""
    handler = agent.run(text, **more)
    outputs = [event async for event in handler.stream_events() if isinstance(event, AgentOutput)]
    await handler
    return outputs


def agent_on(llm: MLXPersistentLLM, **more: Any) -> FunctionAgent:
    return FunctionAgent(
        llm=llm.model_copy(update={"max_tokens": 80}), tools=[WEATHER], system_prompt=RULES, **more
    )


async def test_an_agent_pays_for_new_tokens_only(llm: MLXPersistentLLM, database: AsyncEngine) -> None:
    agent = agent_on(llm)
    memory = Memory.from_defaults(session_id="agent", token_limit=8000, async_engine=database)
    ask, answer = await calls_of(agent, "What is the weather in Paris?", memory=memory)
    (block,) = [block for block in ask.response.blocks if isinstance(block, ToolCallBlock)]
    assert (block.tool_name, block.tool_kwargs) == ("get_weather", {"city": "Paris"})
    again = (await calls_of(agent, "What is the weather in Oslo?", memory=memory))[0]
    for before, after in ((ask, answer), (answer, again)):
        assert raw(after)["session_id"] == "agent"
        assert raw(after)["miss_reason"] == ""
        assert cached(after) >= raw(before)["usage"]["total_tokens"] - 2


async def test_agents_of_a_workflow_share_a_session(llm: MLXPersistentLLM) -> None:
    desk = agent_on(llm, name="desk", description="Welcomes people.", initial_tool_choice="handoff")
    meteo = agent_on(llm, name="meteo", description="Knows the weather.", can_handoff_to=[])
    workflow = AgentWorkflow(agents=[desk, meteo], root_agent="desk")
    context: Context[Any] = Context(workflow)
    await context.store.set("agent_memory_session_id", "team")
    outputs = await calls_of(workflow, "Hand off to meteo.", ctx=context)
    assert [output.current_agent_name for output in outputs[:2]] == ["desk", "meteo"]
    assert {raw(output)["session_id"] for output in outputs} == {"team"}


# What LlamaIndex itself does to prompts, and what is said of it


async def test_a_state_that_is_shown_in_the_first_step_alone_is_reported(
    llm: MLXPersistentLLM, database: AsyncEngine
) -> None:
    async def reasons(**more: Any) -> list[str]:
        memory = Memory.from_defaults(token_limit=8000, async_engine=database)
        outputs = await calls_of(agent_on(llm, **more), "What is the weather in Paris?", memory=memory)
        return [raw(output)["miss_reason"] for output in outputs[1:]]

    assert "diverged" in await reasons(initial_state={"mood": "good"})
    assert set(await reasons()) == {""}


async def test_a_memory_block_that_changes_costs_what_stands_behind_it(
    llm: MLXPersistentLLM, database: AsyncEngine
) -> None:
    async def third_turn(method: InsertMethod) -> AgentOutput:
        facts = StaticMemoryBlock(name="facts", static_content="")
        memory = Memory.from_defaults(
            session_id=f"blocks {method.value}",
            token_limit=8000,
            async_engine=database,
            memory_blocks=[facts],
            insert_method=method,
        )
        talk = FunctionAgent(llm=llm, system_prompt=RULES)
        for colour, text in (("red", "My name is Ada."), ("blue", "Thank you."), ("grey", "Hello.")):
            facts.static_content = [TextBlock(text=f"The sky is {colour}.")]
            (answer,) = await calls_of(talk, text, memory=memory)
        return answer

    in_front, behind = await third_turn(InsertMethod.SYSTEM), await third_turn(InsertMethod.USER)
    assert raw(in_front)["miss_reason"] == raw(behind)["miss_reason"] == "diverged"
    assert cached(in_front) < cached(behind)
    assert cached(behind) > llm.count_tokens([LONG, ChatMessage("My name is Ada.")])


async def test_a_memory_that_drops_old_messages_is_reported(
    llm: MLXPersistentLLM, database: AsyncEngine
) -> None:
    memory = Memory.from_defaults(
        session_id="short", token_limit=60, token_flush_size=20, async_engine=database
    )
    talk = FunctionAgent(llm=llm, system_prompt=RULES)
    reasons = []
    for number in range(6):
        (answer,) = await calls_of(talk, f"My number is {number}. What is my number?", memory=memory)
        reasons.append(raw(answer)["miss_reason"])
    assert reasons[1] == ""
    assert "diverged" in reasons


async def test_a_context_without_its_memory_is_reported(llm: MLXPersistentLLM, database: AsyncEngine) -> None:
    talk = FunctionAgent(llm=llm, system_prompt=RULES)
    memory = Memory.from_defaults(session_id="lost", token_limit=8000, async_engine=database)
    context: Context[Any] = Context(talk)
    await context.store.set("agent_memory_session_id", "lost")
    await calls_of(talk, "My name is Ada.", ctx=context, memory=memory)
    saved = context.to_dict()
    (without,) = await calls_of(talk, "What is my name?", ctx=Context.from_dict(talk, saved))
    assert raw(without)["miss_reason"] == "diverged"
    (with_it,) = await calls_of(talk, "What is my name?", ctx=Context.from_dict(talk, saved), memory=memory)
    assert raw(with_it)["miss_reason"] == ""
    assert with_it.response.content == "Your name is Ada."


async def test_tools_that_change_are_reported(llm: MLXPersistentLLM, database: AsyncEngine) -> None:
    def get_time(city: str) -> str:
        """Get the time in a city."""
        return "noon"

    memory = Memory.from_defaults(session_id="tools", token_limit=8000, async_engine=database)
    reasons = []
    for tools in ([WEATHER], [WEATHER], [FunctionTool.from_defaults(get_time)]):
        agent = FunctionAgent(llm=llm, tools=tools, system_prompt=RULES)
        (answer,) = await calls_of(agent, "My name is Ada.", memory=memory)
        reasons.append(raw(answer)["miss_reason"])
    assert reasons[1:] == ["", "diverged"]


@pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning")
async def test_answers_that_are_remembered_in_other_words_are_reported(
    llm: MLXPersistentLLM, database: AsyncEngine
) -> None:
    memory = Memory.from_defaults(session_id="react", token_limit=8000, async_engine=database)
    agent = ReActAgent(llm=llm, formatter=ReActChatFormatter(system_header=RULES))
    reasons = []
    for text in ("My name is Ada.", "What is my name?"):
        outputs = await calls_of(agent, text, memory=memory)
        reasons.append(raw(outputs[0])["miss_reason"])
    # What stands in the memory is the answer in other words: all but the answer itself is still known.
    assert reasons == ["new", "template"]
    assert cached(outputs[0]) >= llm.count_tokens([LONG, ChatMessage("My name is Ada.")]) - 2


# Tokens


def test_counted_tokens_are_those_of_the_prompt(llm: MLXPersistentLLM) -> None:
    answer = llm.chat(QUESTION)
    assert llm.count_tokens(QUESTION) == raw(answer)["usage"]["prompt_tokens"]
    assert llm.count_tokens(QUESTION, [WEATHER]) > llm.count_tokens(QUESTION)
    assert llm.count_tokens([]) == 0
    assert len(llm.tokenizer("hello there")) > 0
