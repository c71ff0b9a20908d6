"""MLXPersistentLLM on the real engine with the model that ships with the package."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support.conversations import ASYNC_CASES, CASES, RULES, Answer, Bench, History

from agent_memory_core import InvalidRequest
from langchain_agent_memory import ChatMLXPersistent
from llama_index_agent_memory import MLXPersistentLLM, memory_session

pytestmark = [
    # LlamaIndex walks over the deprecated names of its own agents, which are pydantic models.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    # A context leaves its memory out, which has to be given again.
    pytest.mark.filterwarnings("ignore::workflows.context.state_store.UnserializableKeyWarning"),
]

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


class LlamaIndex:
    """How LlamaIndex asks, for the properties that hold in every framework."""

    model = MLXPersistentLLM

    def _messages(self, history: History) -> list[ChatMessage]:
        return [ChatMessage(text, role=role) for role, text in history]

    def _answer(self, response: ChatResponse) -> Answer:
        usage = raw(response)["usage"]
        return Answer(
            response.message.content or "",
            usage["prompt_tokens"],
            usage["completion_tokens"],
            cached(response),
            raw(response),
        )

    def ask(self, llm: Any, history: History, **options: Any) -> Answer:
        return self._answer(llm.chat(self._messages(history), **options))

    async def aask(self, llm: Any, history: History, **options: Any) -> Answer:
        return self._answer(await llm.achat(self._messages(history), **options))

    def stream(self, llm: Any, history: History, **options: Any) -> Iterator[str]:
        return (p.delta for p in llm.stream_chat(self._messages(history), **options) if p.delta)

    async def astream(self, llm: Any, history: History, **options: Any) -> AsyncIterator[str]:
        async for piece in await llm.astream_chat(self._messages(history), **options):
            if piece.delta:
                yield piece.delta

    def count(self, llm: Any, history: History) -> int:
        counted: int = llm.count_tokens(self._messages(history))
        return counted


@pytest.fixture
def bench(llm: MLXPersistentLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(LlamaIndex(), llm, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_holds_in_every_framework(bench: Bench, case: Callable[[Bench], None]) -> None:
    case(bench)


@pytest.mark.parametrize("case", ASYNC_CASES, ids=lambda case: case.__name__)
async def test_what_holds_of_coroutines(bench: Bench, case: Callable[[Bench], Awaitable[None]]) -> None:
    await case(bench)


# Construction


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


def test_a_session_of_the_surroundings_is_the_callers(llm: MLXPersistentLLM) -> None:
    with memory_session("around", namespace="d"):
        llm.complete("hi")
    assert [s.session_id for s in llm.memory.sessions("d")] == ["around"]


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


async def test_what_cannot_be_read_is_refused_at_the_call(llm: MLXPersistentLLM) -> None:
    picture = [ChatMessage(blocks=[ImageBlock(url="https://example.com/a.png")])]
    with pytest.raises(InvalidRequest, match="'image'"):
        llm.stream_chat(picture)
    with pytest.raises(InvalidRequest, match="'image'"):
        await llm.astream_chat(picture)


def test_a_stream_that_is_never_read_runs_nothing(llm: MLXPersistentLLM) -> None:
    stream = llm.stream_complete("hi", max_tokens=4000)
    numbers = llm.memory.stats()
    assert (numbers.waiting, numbers.running) == (0, 0)
    del stream


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
    outputs = await calls_of(workflow, "Hand off, to_agent meteo, reason weather.", ctx=context)
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
        session_id="short", token_limit=110, token_flush_size=20, async_engine=database
    )
    talk = FunctionAgent(llm=llm, system_prompt=RULES)
    reasons = []
    for number in range(6):
        (answer,) = await calls_of(talk, f"My number is {number}. What is my number?", memory=memory)
        reasons.append(raw(answer)["miss_reason"])
    assert reasons[1] == ""
    assert "diverged" in reasons


async def test_a_context_without_its_memory_begins_anew(llm: MLXPersistentLLM, database: AsyncEngine) -> None:
    talk = FunctionAgent(llm=llm, system_prompt=RULES)
    memory = Memory.from_defaults(session_id="lost", token_limit=8000, async_engine=database)
    context: Context[Any] = Context(talk)
    await context.store.set("agent_memory_session_id", "lost")
    await calls_of(talk, "My name is Ada.", ctx=context, memory=memory)
    saved = context.to_dict()
    (without,) = await calls_of(talk, "What is my name?", ctx=Context.from_dict(talk, saved))
    # Nothing is missed: to the engine this is another first question after the same prompt.
    assert raw(without)["miss_reason"] == ""
    assert without.response.content != "Your name is Ada."
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


def test_counted_tokens_include_those_of_tools(llm: MLXPersistentLLM) -> None:
    assert llm.count_tokens(QUESTION, [WEATHER]) > llm.count_tokens(QUESTION)
    assert len(llm.tokenizer("hello there")) > 0
