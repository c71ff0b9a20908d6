"""A session of several agents as a LangGraph graph: the books of `agent_memory_core.coordination`, LangGraph's rest.

    graph = as_graph(spec, llm, checkpointer=InMemorySaver())
    state = graph.invoke({}, {"configurable": {"thread_id": "trip"}})
    for event in state["events"]:
        print(event["sender_id"], event["content"])

So checkpointers, time travel, interrupts and studio work on it. What agents know follows from the events and from when
each spoke; nothing else is in the state. With the same seed it says what `CoordinationService` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_executor_for_config

from agent_memory_core import InvalidRequest, Message
from agent_memory_core.coordination import (
    WARMER,
    Asked,
    Book,
    Draft,
    SessionSpec,
    announced,
    ask,
    begin,
    event_data,
    event_of,
    is_over,
    session_name,
    spoken_data,
    spoken_of,
    tell,
    upcoming,
)
from langchain_agent_memory.chat_models import ChatMLXPersistent

try:
    from langgraph.graph import END, START, StateGraph
    from langgraph.graph.state import CompiledStateGraph
except ImportError as error:
    raise ImportError(
        "langchain_agent_memory.coordination_graph needs LangGraph: install the extra langgraph, "
        "pip install 'agent-memory-mlx[langgraph]'."
    ) from error

Data = dict[str, Any]


def _appended(before: Sequence[Data], more: Sequence[Data]) -> list[Data]:
    """Events, those that are new numbered on. A person's words need only ``sender_id`` and ``content``."""
    defaults = {"kind": "public", "turn": 0, "visible_to": [], "interrupted": False}
    return [*before, *({**defaults, **event, "seq": n} for n, event in enumerate(more, len(before)))]


def _joined(before: Sequence[Data], more: Sequence[Data]) -> list[Data]:
    return [*before, *more]


class Talk(TypedDict, total=False):
    """The state: plain data, which any checkpointer can keep."""

    events: Annotated[list[Data], _appended]
    """What happened; see `agent_memory_core.coordination.Event`."""
    spoken: Annotated[list[Data], _joined]
    """When each agent spoke, and after which events."""


def as_graph(
    spec: SessionSpec | Mapping[str, Any], llm: ChatMLXPersistent, **compiled: Any
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """A graph in which the agents of a session speak until it is over.

    Each agent's memory is the session that `CoordinationService` would give it in a session with the thread's id.
    People enter their words by ``update_state``, as an event. Decisions are not part of the graph.

    Args:
        spec: the session, with ``max_turns``.
        llm: the model of all agents.
        compiled: for ``StateGraph.compile``, as ``checkpointer`` and ``interrupt_before=["speak"]``.

    Raises:
        InvalidRequest: the specification cannot be used, or has no ``max_turns``.
    """
    session = SessionSpec.of(spec)
    if not session.max_turns:
        raise InvalidRequest("max_turns=0 is not valid: a graph needs to know when it ends.")
    talk = _Talk(session, llm)
    graph: StateGraph[Any, Any, Any, Any] = StateGraph(Talk)
    graph.add_node("begin", talk.begin)
    graph.add_node("speak", talk.speak)
    graph.add_edge(START, "begin")
    graph.add_conditional_edges("begin", talk.next, ["speak", END])
    graph.add_conditional_edges("speak", talk.next, ["speak", END])
    return graph.compile(**compiled).with_config(recursion_limit=session.max_turns + 10)


class _Talk:
    """The nodes of the graph."""

    def __init__(self, spec: SessionSpec, llm: ChatMLXPersistent) -> None:
        self._begun = begin(spec)
        self._llm = llm

    def begin(self, state: Talk) -> Talk:
        """What all or one are told before the first turn."""
        return {} if state.get("events") else {"events": [event_data(event) for event in self._begun.events]}

    def next(self, state: Talk) -> str:
        """Where the graph goes on."""
        return END if is_over(self._book(state)) else "speak"

    def speak(self, state: Talk, config: RunnableConfig) -> Talk:
        """The next agent speaks; in a broadcast all do, at once."""
        kept = self._book(state)
        book = announced(kept)
        asked = [
            ask(book, book.spec.agent(speaker), to, place=place)
            for place, (speaker, to) in enumerate(upcoming(book))
        ]
        draft = Draft(book)
        for each, said in zip(asked, self._answers(book.spec, asked, config), strict=True):
            tell(draft, each, said)
        events = [*book.events[len(kept.events) :], *draft.events]
        return {"events": [*map(event_data, events)], "spoken": [*map(spoken_data, draft.spoken)]}

    def _book(self, state: Talk) -> Book:
        events = tuple(map(event_of, state.get("events", ())))
        spoken = tuple(map(spoken_of, state.get("spoken", ())))
        return Book(self._begun.spec, self._begun.minds, events, spoken)

    def _answers(self, spec: SessionSpec, asked: Sequence[Asked], config: RunnableConfig) -> list[str]:
        thread = str(config.get("configurable", {}).get("thread_id", "graph"))

        def answer(each: Asked) -> str:
            messages, options = _messages(each.messages), self._options(spec, each, thread)
            said = self._llm.invoke(messages, config, **options).text
            if said.strip():
                return said
            warmer = options.get("temperature", self._llm.temperature or 0.0) + WARMER
            return self._llm.invoke(messages, config, **{**options, "temperature": warmer}).text

        with get_executor_for_config(config) as executor:
            return list(executor.map(answer, asked))

    def _options(self, spec: SessionSpec, asked: Asked, thread: str) -> Data:
        sampling = {**spec.sampling, **asked.agent.sampling}
        if spec.seed is not None:
            sampling["seed"] = (spec.seed + asked.number) % 2**64
        stop = [*sampling.pop("stop", ()), *asked.stop]
        return {**sampling, "stop": stop, "session_id": session_name(thread, spec, asked.agent)}


def _messages(messages: Sequence[Message]) -> list[BaseMessage]:
    kinds = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}
    return [kinds[message.role](message.content) for message in messages]
