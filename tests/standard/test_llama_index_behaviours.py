"""What LlamaIndex's own tests say of function calling and of agents, with a real model in the place of their mocks.

By the file of LlamaIndex's core that has the same behaviour under test; what the model need not be there for, and
what `test_llama_index_contract.py` and `test_llama_index_callbacks.py` hold already, is not repeated.

    llms/test_function_calling          a tool that fails, called outright: told, or raised where that is asked for
    llms/test_structured_llm            braces in what is said to a structured model stay as they are
    llms/test_callbacks                 the prompt as a keyword, twice, or not at all; nothing private in callbacks;
                                        a stream without text
    llms/test_instrumentation_events    an event is written down without a change to the response in it
    agent/workflow/test_function_call   a result that is the answer; not where the tool failed; a tool that raises
    agent/workflow/test_return_direct_e2e   the same, through a whole run
    agent/workflow/test_single_agent_workflow  a tool without arguments; too many steps, refused or summed up; an empty
                                        answer of a ReActAgent is asked for again; a message of several blocks; run ids
    agent/workflow/test_multi_agent_workflow  a handoff to nobody; state that a tool changes; a human in the loop, saved
                                        and restored in the middle of a run
    agent/workflow/test_thinking_delta  thoughts in the stream of every kind of agent; none where there are none
    agent/workflow/test_agent_with_structured_output  a class or function for the answer, of an agent or a workflow

Two things there cannot be had. `test_predict_and_call` and the parsing of steps in `test_single_agent_workflow` need
text in ReAct's form, for which there is no grammar and which so small a model does not write by itself;
`test_tool_streaming` tells of results in parts, which the supported releases of LlamaIndex do not know.
"""

# No postponed annotations: LlamaIndex reads those of tools as they are.
import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core.agent.react.formatter import ReActChatFormatter
from llama_index.core.agent.workflow import (
    AgentInput,
    AgentOutput,
    AgentStream,
    AgentStreamStructuredOutput,
    AgentWorkflow,
    CodeActAgent,
    FunctionAgent,
    ReActAgent,
    ToolCallResult,
)
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ThinkingBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatStartEvent
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from pydantic import BaseModel, Field
from support import tiny_models
from workflows.context import PickleSerializer
from workflows.errors import WorkflowRuntimeError
from workflows.events import HumanResponseEvent, InputRequiredEvent

from llama_index_agent_memory import MLXPersistentLLM

pytestmark = [
    # LlamaIndex walks over the deprecated names of its own agents, which are pydantic models.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
    # LlamaIndex's structured model still calls pydantic's json.
    pytest.mark.filterwarnings("ignore:The `json` method is deprecated"),
]

QUESTION = "My name is Ada. What is my name?"
WEATHER = "What is the weather in Paris?"


class Weather(BaseModel):
    """The weather of a city. A small model may find no end of a text that has no bound."""

    city: str = Field(max_length=40)
    degrees: int


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "sunny"


def check_door(city: str) -> str:
    """Check the door in a city."""
    raise RuntimeError("The door is stuck.")


def tool(function: Callable[..., Any], **more: Any) -> FunctionTool:
    return FunctionTool.from_defaults(function, **more)


@pytest.fixture(scope="module")
def llm() -> Iterator[MLXPersistentLLM]:
    model = MLXPersistentLLM(model="tiny-chat", cache_dir=None, max_tokens=80)
    yield model
    model.memory.close()


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLXPersistentLLM]:
    """A model that thinks before it answers."""
    folder = tiny_models.thinking_chat(tmp_path_factory.mktemp("models") / "thinks")
    model = MLXPersistentLLM(model=folder, cache_dir=None, max_tokens=40)
    yield model
    model.memory.close()


class Seen(list[Any]):
    """The events of a run."""

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]


async def follow(agent: Any, *asked: Any, **more: Any) -> tuple[Seen, Any]:
    """The events of a run, and what it came to: its output, or the error that ended it."""
    handler = agent.run(*asked, **more)
    seen = Seen([event async for event in handler.stream_events()])
    try:
        return seen, await handler
    except WorkflowRuntimeError as error:
        return seen, error


# Function calling


@pytest.mark.parametrize("way", ["called", "awaited"])
def test_a_tool_that_fails_is_told_or_raised(llm: MLXPersistentLLM, way: str) -> None:
    def call(**more: Any) -> Any:
        if way == "called":
            return llm.predict_and_call([tool(check_door)], "Check the door in Paris.", **more)
        return asyncio.run(llm.apredict_and_call([tool(check_door)], "Check the door in Paris.", **more))

    told = call()
    assert "The door is stuck." in told.response
    assert [source.is_error for source in told.sources] == [True]
    with pytest.raises(ValueError, match="The door is stuck"):
        call(error_on_tool_error=True)


# Completion


@pytest.mark.parametrize("way", ["complete", "stream_complete"])
def test_the_prompt_of_a_completion(llm: MLXPersistentLLM, way: str) -> None:
    complete = getattr(llm, way)
    by_name = complete(prompt=QUESTION)
    last = by_name if way == "complete" else list(by_name)[-1]
    assert last.text == "Your name is Ada."
    with pytest.raises(TypeError, match="prompt"):
        complete(QUESTION, prompt=QUESTION)
    with pytest.raises(ValueError, match="No prompt"):
        complete()


def test_a_stream_without_text_still_ends_with_its_report(llm: MLXPersistentLLM) -> None:
    (only,) = llm.stream_chat([ChatMessage(QUESTION)], stop=["Y"])
    assert (only.message.content, only.delta) == ("", "")
    assert only.raw["finish_reason"] == "stop"


# Events


class Watch(BaseEventHandler):
    """Keeps every event while it is entered."""

    seen: list[BaseEvent] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.seen.append(event)

    def __enter__(self) -> "Watch":
        get_dispatcher().add_event_handler(self)
        return self

    def __exit__(self, *failure: object) -> None:
        get_dispatcher().event_handlers.remove(self)


def test_an_event_is_written_down_without_a_change_to_its_response(llm: MLXPersistentLLM) -> None:
    with Watch() as watch:
        *_, answer = llm.stream_chat_with_tools([tool(get_weather)], WEATHER)
        llm.complete(QUESTION)
    raw, blocks = dict(answer.raw), list(answer.message.blocks)
    written = [json.loads(event.model_dump_json()) for event in watch.seen]
    assert written[-1]["response"]["raw"]["usage"]["prompt_tokens"] > 0
    assert (answer.raw, answer.message.blocks) == (raw, blocks)


def test_callbacks_are_told_nothing_private(llm: MLXPersistentLLM) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    private = {"session_id": "private", "namespace": "private", "callback_manager": CallbackManager([debug])}
    llm.model_copy(update=private).complete(QUESTION)
    ((start, _),) = debug.get_event_pairs(CBEventType.LLM)
    assert "private" not in str(start.payload)


# Results that are the answer


@pytest.mark.parametrize("around", ["agent", "workflow"])
async def test_a_result_is_the_answer_where_the_tool_says_so(llm: MLXPersistentLLM, around: str) -> None:
    agent = FunctionAgent(llm=llm, tools=[tool(get_weather, return_direct=True)])
    context: Context[Any] = Context(agent if around == "agent" else AgentWorkflow(agents=[agent]))
    runs = agent if around == "agent" else AgentWorkflow(agents=[agent])
    seen, output = await follow(runs, WEATHER, ctx=context)
    assert output.response.content == "sunny"
    assert len(seen.of(AgentOutput)) == 1  # the model was not asked again
    assert await context.store.get("current_tool_calls") == []


async def test_a_failure_is_no_answer(llm: MLXPersistentLLM) -> None:
    door = tool(check_door, return_direct=True)
    agent = FunctionAgent(llm=llm, tools=[door], initial_tool_choice="check_door")
    seen, output = await follow(agent, "Check the door in Paris.")
    (failed,) = seen.of(ToolCallResult)
    assert failed.tool_output.is_error
    assert isinstance(failed.tool_output.exception, RuntimeError)
    assert len(seen.of(AgentOutput)) == 2  # the model heard of it
    assert output.response.content == "The door is stuck."


# Steps of an agent


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_tool_without_arguments(llm: MLXPersistentLLM, streaming: bool) -> None:
    rings = []

    def ring() -> str:
        """Ring the bell."""
        rings.append(1)
        return "rang"

    agent = FunctionAgent(llm=llm, tools=[tool(ring)], initial_tool_choice="ring", streaming=streaming)
    seen, output = await follow(agent, "Ring the bell.")
    assert (len(rings), [result.tool_kwargs for result in seen.of(ToolCallResult)]) == (1, [{}])
    assert "rang" in output.response.content


@pytest.mark.parametrize("around", ["agent", "workflow"])
async def test_too_many_steps_are_refused_or_summed_up(llm: MLXPersistentLLM, around: str) -> None:
    agent = FunctionAgent(llm=llm, tools=[tool(get_weather)])
    runs = agent if around == "agent" else AgentWorkflow(agents=[agent])
    _, error = await follow(runs, WEATHER, max_iterations=1)
    assert isinstance(error, WorkflowRuntimeError)
    assert "Max iterations of 1 reached" in str(error)
    with Watch() as watch:
        _, output = await follow(runs, WEATHER, max_iterations=1, early_stopping_method="generate")
    assert output.response.content
    asked = [event for event in watch.seen if isinstance(event, LLMChatStartEvent)]
    assert "maximum number of iterations" in str(asked[-1].messages[-1].content)


async def test_an_empty_answer_is_asked_for_again(llm: MLXPersistentLLM) -> None:
    mute = llm.model_copy(update={"stop": ["Y"], "max_tokens": 20})
    seen, _ = await follow(ReActAgent(llm=mute, tools=[tool(get_weather)]), QUESTION, max_iterations=3)
    assert seen.of(AgentOutput)[0].response.content == ""
    assert "your previous response was empty" in str(seen.of(AgentInput)[1].input[-1].content).lower()


async def test_all_blocks_of_a_message_are_read(llm: MLXPersistentLLM) -> None:
    message = ChatMessage(blocks=[TextBlock(text="My name is Ada."), TextBlock(text="What is my name?")])
    agent = FunctionAgent(llm=llm, tools=[])
    _, output = await follow(agent, user_msg=message, ctx=Context(agent))
    one_text = [ChatMessage("My name is Ada.\nWhat is my name?")]
    assert output.raw["usage"]["prompt_tokens"] == llm.count_tokens(one_text)


async def test_the_id_of_a_run_is_no_session(llm: MLXPersistentLLM) -> None:
    handler = FunctionAgent(llm=llm, tools=[]).run(QUESTION, run_id="run 1")
    assert handler.run_id == "run 1"
    output: Any = await handler
    assert output.raw["session_id"] is None


# Agents together


async def test_a_handoff_to_nobody_is_told(llm: MLXPersistentLLM) -> None:
    desk = FunctionAgent(name="desk", description="Welcomes.", llm=llm, initial_tool_choice="handoff")
    meteo = FunctionAgent(name="meteo", description="Knows the weather.", llm=llm)
    workflow = AgentWorkflow(agents=[desk, meteo], root_agent="desk", early_stopping_method="generate")
    seen, output = await follow(workflow, "Hand off to Tom.", max_iterations=2)
    (told,) = seen.of(ToolCallResult)
    assert "Agent Tom not found" in told.tool_output.content
    assert {event.current_agent_name for event in seen.of(AgentOutput)} == {"desk"}
    assert output.response.content


async def test_a_tool_changes_the_state(llm: MLXPersistentLLM) -> None:
    async def count(ctx: Context[Any]) -> str:
        """Count one more."""
        state = await ctx.store.get("state")
        await ctx.store.set("state", {"counter": state["counter"] + 1})
        return "counted"

    agent = FunctionAgent(llm=llm, tools=[tool(count)], initial_tool_choice="count")
    workflow = AgentWorkflow(
        agents=[agent], initial_state={"counter": 0}, state_prompt="Current state: {state}. {msg}"
    )
    context: Context[Any] = Context(workflow)
    seen, output = await follow(workflow, "Count.", ctx=context)
    for event in seen.of(AgentInput):
        for message in event.input:
            assert message.role != "user" or str(message.content).count("Current state:") == 1
    assert (await context.store.get("state"))["counter"] == 1
    assert output.raw["finish_reason"] == "stop"


async def test_a_human_answers_after_the_context_was_saved(llm: MLXPersistentLLM) -> None:
    async def ask_name(ctx: Context[Any]) -> str:
        """Ask for a name."""
        asked = InputRequiredEvent(prefix="What is your name?")  # type: ignore[call-arg]
        reply = await ctx.wait_for_event(HumanResponseEvent, waiter_event=asked)
        return str(reply.response)

    agent = FunctionAgent(llm=llm, tools=[tool(ask_name)], initial_tool_choice="ask_name")
    workflow = AgentWorkflow(agents=[agent])
    context: Context[Any] = Context(workflow)
    await context.store.set("agent_memory_session_id", "human")
    # In the middle of a run a context takes its memory along in this form alone.
    serializer = PickleSerializer()
    handler = workflow.run("Ask for my name.", ctx=context)
    async for event in handler.stream_events():
        if isinstance(event, InputRequiredEvent):
            saved = handler.ctx.to_dict(serializer=serializer)
            await handler.cancel_run()
            break
    handler = workflow.run(ctx=Context.from_dict(workflow, saved, serializer=serializer))
    handler.ctx.send_event(HumanResponseEvent(response="Eva"))  # type: ignore[call-arg]
    output: Any = await handler
    assert "Eva" in output.response.content
    assert output.raw["session_id"] == "human"
    assert output.raw["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


# Thoughts


# With instructions that leave the model's own answer alone.
AGENTS: dict[str, Callable[[MLXPersistentLLM], Any]] = {
    "function": lambda m: FunctionAgent(llm=m),
    "react": lambda m: ReActAgent(llm=m, formatter=ReActChatFormatter(system_header="Help.")),
    "code": lambda m: CodeActAgent(run_code, llm=m, code_act_system_prompt="Help."),
}


def run_code(code: str) -> str:
    """Run code."""
    return ""


def test_a_model_thinks(thinker: MLXPersistentLLM) -> None:
    asked = [ChatMessage("What is my name?")]
    whole, pieces = thinker.chat(asked), list(thinker.stream_chat(asked))
    thought, text = whole.message.blocks
    assert isinstance(thought, ThinkingBlock)
    assert isinstance(text, TextBlock)
    assert (thought.content, text.text) == (" have not told", " your name yet.")
    details = whole.raw["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == thought.num_tokens == 3
    assert pieces[-1].message == whole.message
    thoughts = [piece.additional_kwargs.get("thinking_delta", "") for piece in pieces]
    assert ("".join(thoughts), "".join(p.delta or "" for p in pieces)) == (thought.content, text.text)


@pytest.mark.parametrize("kind", AGENTS)
async def test_thoughts_are_streamed(thinker: MLXPersistentLLM, kind: str) -> None:
    seen, output = await follow(AGENTS[kind](thinker), "What is my name?")
    streamed = seen.of(AgentStream)
    assert "".join(event.thinking_delta or "" for event in streamed) == " have not told"
    assert "".join(event.delta for event in streamed) == " your name yet."
    assert output.response.content == " your name yet."


async def test_no_thoughts_are_streamed_where_there_are_none(llm: MLXPersistentLLM) -> None:
    seen, _ = await follow(FunctionAgent(llm=llm, tools=[]), QUESTION)
    assert {event.thinking_delta for event in seen.of(AgentStream)} == {None}


# Structured answers


def test_braces_stay_as_they_are(llm: MLXPersistentLLM) -> None:
    text = 'I say {"city": {"name": "{Paris}"}} and {{twice}}.'
    with Watch() as watch:
        answer = llm.as_structured_llm(Weather).chat([ChatMessage(text)])
    assert isinstance(answer.raw, Weather)
    asked = [event.messages for event in watch.seen if isinstance(event, LLMChatStartEvent)]
    assert asked[-1][-1].content == text


def bonjour(messages: list[ChatMessage]) -> dict[str, Any]:
    return {"city": str(messages[-1].content), "degrees": 1}


async def abonjour(messages: list[ChatMessage]) -> dict[str, Any]:
    return bonjour(messages)


@pytest.mark.parametrize("around", ["agent", "workflow", "made of tools"])
@pytest.mark.parametrize(
    "how", [{"output_cls": Weather}, {"structured_output_fn": bonjour}, {"structured_output_fn": abonjour}]
)
async def test_an_answer_has_a_structure(llm: MLXPersistentLLM, around: str, how: dict[str, Any]) -> None:
    runs: Any
    if around == "agent":
        runs = FunctionAgent(llm=llm, tools=[], **how)
    elif around == "workflow":
        runs = AgentWorkflow(agents=[FunctionAgent(llm=llm, tools=[])], **how)
    else:
        runs = AgentWorkflow.from_tools_or_functions([get_weather], llm=llm, **how)
    seen, output = await follow(runs, QUESTION)
    assert output.response.content == "Your name is Ada."
    found = output.get_pydantic_model(Weather)
    assert seen.of(AgentStreamStructuredOutput)[-1].output == found.model_dump()
    if "structured_output_fn" in how:
        assert found == Weather(city="Your name is Ada.", degrees=1)
