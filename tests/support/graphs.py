"""Graphs of LangGraph in the shapes that people build, around any chat model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, Send

from langchain_agent_memory import ChatMLXPersistent

POLITE = "Be polite to everybody and think before you speak. "
BRIEF = "You are a careful assistant in a team. " + POLITE * 14


def thread(name: str) -> RunnableConfig:
    return {"configurable": {"thread_id": name}}


def agent_of(llm: ChatMLXPersistent, tools: Sequence[BaseTool], **options: Any) -> Any:
    """``create_agent`` without its types, which know nothing of states with other keys."""
    return create_agent(llm, tools, **options)


def human(text: str) -> Any:
    return {"messages": [HumanMessage(text)]}


def answers(messages: Sequence[BaseMessage]) -> list[AIMessage]:
    return [message for message in messages if isinstance(message, AIMessage)]


def says(model: ChatMLXPersistent, prompt: str) -> Callable[[MessagesState], dict[str, Any]]:
    """A node that answers the conversation under a system prompt of its own."""

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke([SystemMessage(prompt), *state["messages"]])]}

    return node


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return {"Paris": "sunny", "Rome": "rainy"}.get(city, "cloudy")


def two_calls(name: str) -> AIMessage:
    """What a model says that calls a tool twice at once."""
    cities = ("Paris", "Rome")
    return AIMessage(
        "",
        tool_calls=[
            {"name": name, "args": {"city": city}, "id": city, "type": "tool_call"} for city in cities
        ],
    )


def agent(llm: ChatMLXPersistent) -> Any:
    return agent_of(llm, [get_weather], system_prompt=BRIEF, checkpointer=InMemorySaver())


def supervisor(llm: ChatMLXPersistent) -> Any:
    """One node that speaks to all, and sends the work to two agents in turn."""
    workers = ("reader", "writer")

    def lead(state: MessagesState) -> Command[str]:
        since = (
            len(state["messages"])
            - 1
            - max(i for i, m in enumerate(state["messages"]) if isinstance(m, HumanMessage))
        )
        done = since // 2
        message = llm.invoke([SystemMessage(f"{BRIEF}You lead the team."), *state["messages"]])
        return Command(goto=workers[done] if done < len(workers) else END, update={"messages": [message]})

    graph: Any = StateGraph(MessagesState)
    graph.add_node("lead", lead)
    for name in workers:
        graph.add_node(name, says(llm, f"{BRIEF}You are the {name}."))
        graph.add_edge(name, "lead")
    graph.add_edge(START, "lead")
    return graph.compile(checkpointer=InMemorySaver())


class Swarm(MessagesState):
    """A conversation, and who is speaking with the user."""

    active: str


def swarm(llm: ChatMLXPersistent) -> Any:
    """Two agents that hand the conversation over to each other; who had it last has the next turn."""

    def member(name: str, other: str) -> Callable[[Swarm], Command[str]]:
        inner = agent_of(llm, [get_weather], system_prompt=f"{BRIEF}You are {name}.", name=name)

        def node(state: Swarm) -> Command[str]:
            known = len(state["messages"])
            new = inner.invoke({"messages": list(state["messages"])})["messages"][known:]
            is_first = isinstance(state["messages"][-1], HumanMessage)
            return Command(goto=other if is_first else END, update={"messages": new, "active": name})

        return node

    graph: Any = StateGraph(Swarm)
    graph.add_node("alice", member("alice", "bob"))
    graph.add_node("bob", member("bob", "alice"))
    graph.add_conditional_edges(START, lambda state: state.get("active") or "alice", ["alice", "bob"])
    return graph.compile(checkpointer=InMemorySaver())


def subgraphs(llm: ChatMLXPersistent) -> Any:
    """Two unnamed agents in one graph, the second a level deeper; both are nodes called "model"."""
    inner: Any = StateGraph(MessagesState)
    inner.add_node("deep", agent_of(llm, [get_weather], system_prompt=f"{BRIEF}You are below."))
    inner.add_edge(START, "deep")
    outer: Any = StateGraph(MessagesState)
    outer.add_node("first", agent_of(llm, [], system_prompt=f"You are above. {BRIEF}"))
    outer.add_node("second", inner.compile())
    outer.add_edge(START, "first")
    outer.add_edge("first", "second")
    return outer.compile(checkpointer=InMemorySaver())


class Fan(MessagesState):
    """A conversation, and what each of the parallel workers said."""

    said: Annotated[list[BaseMessage], operator.add]


def fan_out(llm: ChatMLXPersistent, prompt: str = BRIEF) -> Any:
    """Three tasks of one node, each with a question of its own behind the same conversation."""
    questions = ("What is my favourite colour?", "What did I say?", "What is the weather in Rome?")

    def worker(state: MessagesState) -> dict[str, Any]:
        return {"said": [llm.invoke([SystemMessage(prompt), *state["messages"]])]}

    def split(state: Fan) -> list[Send]:
        return [Send("worker", {"messages": [*state["messages"], HumanMessage(q)]}) for q in questions]

    graph: Any = StateGraph(Fan)
    graph.add_node("answer", says(llm, prompt))
    graph.add_node("worker", worker)
    graph.add_edge(START, "answer")
    graph.add_conditional_edges("answer", split, ["worker"])
    return graph.compile(checkpointer=InMemorySaver())


def expert(llm: ChatMLXPersistent) -> BaseTool:
    """An agent as a tool; it speaks in the thread it is called from."""
    inner = agent_of(llm, [], system_prompt=f"You are the expert. {BRIEF}", name="inner")

    @tool
    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        return str(inner.invoke(human(f"It rains in {city}. How is it in {city}?"))["messages"][-1].text)

    return get_weather


def agent_with_expert(llm: ChatMLXPersistent) -> Any:
    return agent_of(llm, [expert(llm)], system_prompt=BRIEF, checkpointer=InMemorySaver())


SHAPES = [agent, supervisor, swarm, subgraphs, fan_out, agent_with_expert]
