"""Agents and graphs of LangGraph on the real engine: whatever shape runs in a thread, what is known is reused.

Every call in this file is watched: it must reuse at least the longest prefix that its prompt shares with a branch
of its session. Node names, uuids and parallel tasks may give calls equal keys; keys decide nothing.
"""

from __future__ import annotations

import string
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain.agents.middleware import LLMToolEmulator, ModelRequest, SummarizationMiddleware, dynamic_prompt
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, RetryPolicy, interrupt
from pydantic import BaseModel, Field
from support.cases import some_of
from support.graphs import (
    BRIEF,
    POLITE,
    SHAPES,
    agent_of,
    agent_with_expert,
    answers,
    fan_out,
    get_weather,
    human,
    swarm,
    thread,
    two_calls,
)
from support.watched_calls import Call, Watch

from agent_memory_core import SessionKey
from agent_memory_core.blocks.prefix_cache import MIN_BLOCK_PART, MIN_TAIL_PART
from langchain_agent_memory import ChatMLXPersistent
from langchain_agent_memory.langgraph import follow
from langchain_agent_memory.middleware import PrefixSummarization


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatMLXPersistent]:
    """One engine for the whole file; tests keep apart by their threads."""
    store = tmp_path_factory.mktemp("langgraph") / "caches"
    model = ChatMLXPersistent(cache_dir=store, temperature=0, max_tokens=48, memory_budget_mb=64)
    yield model
    model.memory.close()


@pytest.fixture(scope="module")
def watched(llm: ChatMLXPersistent) -> Watch:
    return Watch(llm.memory)


@pytest.fixture(autouse=True)
def watch(watched: Watch) -> Iterator[Watch]:
    """The calls of one test; each must have reused what it could."""
    watched.calls.clear()
    yield watched
    short = [(call.key, call.read, call.floor) for call in watched.calls if call.read < call.floor]
    assert short == []


@pytest.mark.parametrize("shape", some_of(SHAPES, [agent_with_expert, fan_out]))
def test_threads_at_once_keep_apart_and_warm(
    llm: ChatMLXPersistent, watch: Watch, shape: Callable[[ChatMLXPersistent], Any]
) -> None:
    graph = shape(llm)
    words = {"plum": "velvet", "velvet": "plum"}

    def talk(word: str) -> str:
        said = []
        for text in (
            f"My favourite colour is {word}.",
            "What is the weather in Paris?",
            "What is my favourite colour?",
        ):
            state = graph.invoke(human(text), thread(f"{shape.__name__} {word}"))
            said += [m.text for m in (*answers(state["messages"]), *answers(state.get("said", [])))]
        return " ".join(said).lower()

    with ThreadPoolExecutor(2) as pool:
        for (own, other), said in zip(words.items(), pool.map(talk, words), strict=True):
            assert own in said
            assert other not in said
    for word in words:
        mine = [call for call in watch.calls if call.key.session_id == f"{shape.__name__} {word}"]
        assert len(mine) >= 3
        # Whoever spoke in an earlier turn has its conversation by now; only what was said since is new.
        for call in mine[-2:]:
            assert call.read > 0.6 * len(call.prompt)


async def test_shapes_run_in_coroutines_and_streams_alike(llm: ChatMLXPersistent) -> None:
    asked = human("My favourite colour is plum.")
    for shape in (swarm, fan_out):
        whole = shape(llm).invoke(asked, thread(f"sync {shape.__name__}"))
        other = await shape(llm).ainvoke(asked, thread(f"async {shape.__name__}"))
        assert [m.text for m in other["messages"]] == [m.text for m in whole["messages"]]
        texts = [
            token.text
            async for token, _ in shape(llm).astream(
                asked, thread(f"s {shape.__name__}"), stream_mode="messages"
            )
            if isinstance(token, AIMessage)
        ]
        assert answers(whole["messages"])[0].text in "".join(texts)


# One row each of what collides


def test_one_agent_pays_for_new_tokens_only(llm: ChatMLXPersistent, watch: Watch) -> None:
    """Ten turns with tools, begun cold: what is computed is what the model did not write itself, once."""
    chat = agent_of(
        llm, [get_weather], system_prompt=f"Ten turns are ahead. {BRIEF}", checkpointer=InMemorySaver()
    )
    for city in (
        "Paris",
        "Rome",
        "Oslo",
        "Berlin",
        "Madrid",
        "London",
        "Vienna",
        "Athens",
        "Dublin",
        "Lisbon",
    ):
        state = chat.invoke(human(f"What is the weather in {city}?"), thread("ten turns"))
    calls = answers(state["messages"])
    assert sum(bool(call.tool_calls) for call in calls) >= 8
    assert [m.usage_metadata and m.usage_metadata["input_tokens"] for m in calls] == [
        len(call.prompt) for call in watch.calls
    ]
    written = sum(m.usage_metadata["output_tokens"] for m in calls[:-1] if m.usage_metadata)
    new = len(watch.calls[-1].prompt) - written
    assert 0.95 * new <= sum(call.computed for call in watch.calls) <= 1.15 * new
    assert watch.lanes("ten turns") == ["model"]


def test_two_unnamed_agents_in_one_thread_do_not_thrash(llm: ChatMLXPersistent, watch: Watch) -> None:
    """Equal keys, different system prompts: a branch each."""
    first = agent_of(llm, [], system_prompt=f"You are above. {BRIEF}")
    second = agent_of(llm, [], system_prompt=f"You are below. {BRIEF}")
    history: list[BaseMessage] = []
    for text in ("My name is Ada.", "I live in Rome.", "What is my name?"):
        history.append(HumanMessage(text))
        for one in (first, second):
            one.invoke({"messages": history}, thread("two agents"))
        history.append(AIMessage("I see."))
    assert {call.key for call in watch.calls} == {SessionKey("two agents", lane="model")}
    assert len(watch.lanes("two agents")) == 2
    for earlier, later in zip(watch.calls, watch.calls[2:], strict=False):
        assert later.read >= len(earlier.prompt) - MIN_BLOCK_PART


def test_a_warm_fan_out_shares_what_it_begins_with(llm: ChatMLXPersistent, watch: Watch) -> None:
    fan_out(llm).invoke(human("Hello."), thread("fan-out"))
    first, *tasks = watch.calls
    assert len(tasks) == 3
    assert {call.key.lane for call in tasks} == {"worker"}
    for task in tasks:
        assert task.read >= len(first.prompt) - MIN_BLOCK_PART
    # One went on where the conversation was, the others forked; nobody overwrote anybody.
    assert len(watch.lanes("fan-out")) == 3


def test_a_cold_fan_out_computes_what_it_begins_with_once(llm: ChatMLXPersistent, watch: Watch) -> None:
    prompt = "Quite another team has quite another brief. " + POLITE * 14
    asked = [[SystemMessage(prompt), HumanMessage(text)] for text in ("One.", "Two.", "Three.")]
    begin = threading.Event()
    held = llm.memory._thread.call(lambda engine: begin.wait(20))
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(llm.batch, asked, thread("cold"))
        while llm.memory._thread._inbox.qsize() < len(asked):
            time.sleep(0.01)
        begin.set()
        done.result()
    assert held.result() is True
    assert sum(call.computed for call in watch.calls) < 2 * len(watch.calls[0].prompt)


def test_an_agent_as_a_tool_called_twice_at_once(llm: ChatMLXPersistent, watch: Watch) -> None:
    chat = agent_with_expert(llm)
    for _ in range(2):
        chat.update_state(
            thread("expert"),
            {"messages": [HumanMessage("And now?"), two_calls("get_weather")]},
            as_node="model",
        )
        chat.invoke(None, thread("expert"))
    inner = [call for call in watch.calls if "inner" in call.key.lane]
    assert len(inner) == 4
    assert len({call.key for call in inner}) == 1
    # The same questions again.
    assert all(call.computed <= MIN_TAIL_PART for call in inner[2:])


def test_a_batch_with_one_configuration(llm: ChatMLXPersistent, watch: Watch) -> None:
    start = [SystemMessage(BRIEF), HumanMessage("Hello.")]
    first = llm.invoke(start, thread("batch"))
    texts = ("My name is Ada.", "My name is Tom.", "My name is Eva.")
    said = llm.batch([[*start, first, HumanMessage(text)] for text in texts], thread("batch"))
    assert len({message.text for message in said}) == 3
    known = len(watch.calls[0].prompt)
    assert all(call.read >= known - MIN_TAIL_PART for call in watch.calls[1:])
    assert len({message.response_metadata["branch_id"] for message in said}) == 3


# Time travel


def turns(chat: Any, name: str) -> list[AIMessage]:
    for text in ("My name is Ada.", "I live in Rome.", "What is my name?"):
        state = chat.invoke(human(text), thread(name))
    return answers(state["messages"])


def after_turn(chat: Any, name: str, number: int) -> Any:
    """The checkpoint at the end of a turn."""
    ends = [s for s in chat.get_state_history(thread(name)) if s.next == () and s.values.get("messages")]
    return ends[::-1][number - 1]


def test_a_fork_starts_warm_and_the_old_branch_stays_so(llm: ChatMLXPersistent, watch: Watch) -> None:
    chat = agent_of(llm, [], system_prompt=BRIEF, checkpointer=InMemorySaver())
    said = turns(chat, "travel")
    head = after_turn(chat, "travel", 3)
    old = after_turn(chat, "travel", 1)
    first = watch.calls[0]
    fork = answers(chat.invoke(human("What is the weather in Rome?"), old.config)["messages"])
    assert fork[0].text == said[0].text
    assert watch.calls[-1].read >= len(first.prompt)
    assert watch.lanes("travel") == ["model", "model"]
    chat.invoke(human("Thank you."), head.config)
    assert watch.calls[-1].read >= len(watch.calls[2].prompt)
    assert len(watch.lanes("travel")) == 2
    # And the fork, too.
    chat.invoke(human("Thank you."), after_turn(chat, "travel", 4).config)
    assert watch.calls[-1].read >= len(watch.calls[3].prompt)


def test_an_edited_state_is_a_fork_where_it_was_edited(llm: ChatMLXPersistent, watch: Watch) -> None:
    chat = agent_of(llm, [], system_prompt=BRIEF, checkpointer=InMemorySaver())
    turns(chat, "edited")
    state = chat.get_state(thread("edited"))
    second = state.values["messages"][2]
    chat.update_state(thread("edited"), {"messages": [HumanMessage("I live in Oslo.", id=second.id)]})
    chat.invoke(human("Where do I live?"), thread("edited"))
    assert watch.calls[-1].read >= len(watch.calls[0].prompt)
    assert len(watch.lanes("edited")) == 2
    chat.invoke(human("Thank you."), state.config)
    assert watch.calls[-1].read >= len(watch.calls[2].prompt)


@pytest.mark.parametrize("by", ["interrupt", "retry"])
def test_a_node_that_runs_again_goes_over_the_same_branch(
    llm: ChatMLXPersistent, watch: Watch, by: str
) -> None:
    attempts: list[str] = []

    def node(state: MessagesState) -> dict[str, Any]:
        message = llm.invoke([SystemMessage(BRIEF), *state["messages"]])
        attempts.append(message.text)
        if by == "interrupt":
            return {"messages": [message, HumanMessage(interrupt(message.text))]}
        if len(attempts) == 1:
            raise ConnectionError("once")
        return {"messages": [message]}

    graph = StateGraph(MessagesState)
    graph.add_node("node", node, retry_policy=RetryPolicy(initial_interval=0.01, jitter=False))
    graph.add_edge(START, "node")
    built = graph.compile(checkpointer=InMemorySaver())
    built.invoke(human("My name is Ada."), thread(by))
    if by == "interrupt":
        built.invoke(Command(resume="Go on."), thread(by))
    assert attempts[0] == attempts[1]
    (again,) = watch.calls[1:]
    assert again.computed <= MIN_TAIL_PART
    assert watch.lanes(by) == ["node"]


def test_a_prompt_with_a_clock_in_its_first_line_is_cold(llm: ChatMLXPersistent, watch: Watch) -> None:
    """No memory can help here; it does not do harm either."""
    ticks = iter(range(100))

    @dynamic_prompt
    def clock(request: ModelRequest[Any]) -> str:
        return f"It is {next(ticks)} o'clock. {BRIEF}"

    chat = agent_of(llm, [], middleware=[clock], checkpointer=InMemorySaver())
    turns(chat, "clock")
    assert all(call.read < MIN_BLOCK_PART for call in watch.calls)


# Middleware that calls the model itself


def of_middleware(watch: Watch) -> list[Call]:
    return [call for call in watch.calls if call.key.ephemeral]


def test_calls_of_middleware_own_nothing(llm: ChatMLXPersistent, watch: Watch) -> None:
    brief = llm.model_copy(update={"max_tokens": 12})
    chat = agent_of(
        llm,
        [get_weather],
        system_prompt=BRIEF,
        middleware=[
            LLMToolEmulator(model=brief),
            SummarizationMiddleware(brief, trigger=("messages", 5), keep=("messages", 1)),
        ],
        checkpointer=InMemorySaver(),
    )
    for text in ("What is the weather in Paris?", "My name is Ada.", "What is my name?"):
        chat.invoke(human(text), thread("middleware"))
    purposes = {call.key.lane.rsplit("/", 1)[-1] for call in of_middleware(watch)}
    assert purposes == {"summarization", "tool_emulation"}
    # The conversation before the summary, and the one after it.
    assert watch.lanes("middleware") == ["model", "model"]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("coroutine", [False, True])
async def test_a_summary_is_asked_for_at_the_end_of_the_conversation(
    llm: ChatMLXPersistent, watch: Watch, keep: int, coroutine: bool
) -> None:
    chat = agent_of(
        llm,
        [get_weather],
        system_prompt=BRIEF,
        middleware=[
            PrefixSummarization(
                llm,
                # Answered in words; the usual request makes a model as small as this one call a tool first.
                summary_prompt="What is my name?",
                trigger=("messages", 5),
                keep=("messages", keep),
                max_summary_tokens=16,
            )
        ],
        checkpointer=InMemorySaver(),
    )
    name = f"summary {keep} {coroutine}"
    for text in ("My name is Ada.", "I live in Rome.", "What is my name?"):
        asked = human(text)
        state = await chat.ainvoke(asked, thread(name)) if coroutine else chat.invoke(asked, thread(name))
    (summary,) = of_middleware(watch)
    known = [call for call in watch.calls if not call.key.ephemeral]
    assert summary.read >= len(known[1].prompt) - (
        0 if keep == 1 else len(known[1].prompt) - len(known[0].prompt)
    )
    assert summary.computed < 100
    # The state holds the summary in the place of what it stands for, what was kept, and the answer.
    first, *rest = state["messages"]
    assert isinstance(first, HumanMessage)
    assert first.additional_kwargs == {"lc_source": "summarization"}
    assert [type(m) for m in rest] == [AIMessage] * (keep - 1) + [HumanMessage, AIMessage]
    assert [m.text for m in rest if isinstance(m, HumanMessage)] == ["What is my name?"]
    # The conversation before the summary is as warm as it was.
    assert watch.lanes(name) == ["model", "model"]
    before = after_turn(chat, name, 2)
    plain = agent_of(llm, [get_weather], system_prompt=BRIEF)
    plain.invoke({"messages": [*before.values["messages"], HumanMessage("Thank you.")]}, thread(name))
    assert watch.calls[-1].read >= len(known[1].prompt)


def test_a_summary_shares_the_tools_that_stand_for_a_form(llm: ChatMLXPersistent, watch: Watch) -> None:
    class Answer(BaseModel):
        """The answer."""

        text: str = Field(max_length=8)

    history: list[BaseMessage] = []
    for number in range(4):
        history += [HumanMessage(f"The number is {number}. {POLITE}"), AIMessage("I see.")]
    history.append(HumanMessage("What is the number?"))
    rule = PrefixSummarization(llm, trigger=("messages", 5), keep=("messages", 1), max_summary_tokens=8)
    limit: dict[str, Any] = {"recursion_limit": 3}
    for middleware in ([], [rule]):
        chat = agent_of(
            llm,
            [get_weather],
            system_prompt=BRIEF,
            response_format=ToolStrategy(Answer),
            middleware=middleware,
        )
        next(chat.stream({"messages": history}, {**thread("form"), **limit}))
    (summary, *_) = of_middleware(watch)
    assert summary.computed < 100


def test_an_agent_that_writes_no_summary_keeps_its_conversation(llm: ChatMLXPersistent, watch: Watch) -> None:
    silent = llm.model_copy(update={"stop": list(string.printable)})
    rule = PrefixSummarization(silent, trigger=("messages", 3), keep=("messages", 1))
    chat = agent_of(silent, [], system_prompt=BRIEF, middleware=[rule])
    history = [
        HumanMessage("My name is Ada."),
        AIMessage("I see."),
        HumanMessage("What is the weather in Paris?"),
    ]
    state = chat.invoke({"messages": history}, thread("silent"))
    assert len(of_middleware(watch)) == 1
    assert [m.text for m in state["messages"][:-1]] == [m.text for m in history]


@pytest.mark.parametrize(
    "bad", [{"trigger": ("words", 3)}, {"keep": ("messages", 0)}, {"trigger": ("fraction", 2)}]
)
def test_an_impossible_rule_is_refused_at_once(llm: ChatMLXPersistent, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"words|greater than 0|between 0 and 1"):
        PrefixSummarization(llm, **bad)


# Ends


def test_a_deleted_thread_is_cold_again(llm: ChatMLXPersistent, watch: Watch) -> None:
    saver = follow(InMemorySaver(), llm.memory)
    chat = agent_of(llm, [], system_prompt="Nobody else begins like this. " + POLITE * 8, checkpointer=saver)
    turns(chat, "deleted")
    saver.delete_thread("deleted")
    assert "deleted" not in [s.session_id for s in llm.memory.sessions()]
    chat.invoke(human("My name is Ada."), thread("deleted"))
    assert watch.calls[-1].read == 0
    assert isinstance(chat.get_state(thread("deleted")).values["messages"][-1], AIMessage)
    assert not any(isinstance(m, ToolMessage) for m in chat.get_state(thread("deleted")).values["messages"])
