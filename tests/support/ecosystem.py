"""Conversations inside packages that others wrote, each on the real package and the real model.

Run as a program it takes some turns of one of them in one thread, prints what each turn reused as a line of JSON, and
may then kill itself with SIGKILL:

    python tests/support/ecosystem.py NAME FOLDER FIRST LAST [kill]
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.tools import tool

from langchain_agent_memory import ChatMLXPersistent, ReuseHandler

SYSTEM = "You are a helpful assistant. You answer in one short sentence. " * 8
QUESTIONS = ("What is the weather in Rome?", "What is the weather in Paris?", "What is the weather in Oslo?")

Turn = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Runs one turn: what the user says, and the configuration; returns the state after it."""


class Directed(ChatMLXPersistent):
    """tiny-chat is too small to choose among many tools, so each question begins with a call of the first that fits.

    The calls are the model's own, held to the tool's schema, and all else it writes as it likes.
    """

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        return super()._generate(messages, *args, **directed(messages, kwargs))

    async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        return await super()._agenerate(messages, *args, **directed(messages, kwargs))


PREFERRED = ("transfer_to_", "get_weather", "manage_memory")


def directed(messages: Sequence[BaseMessage], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call with the choice of a tool, where several may be called."""
    names = [tool["function"]["name"] for tool in keywords.get("tools") or ()]
    if not names or keywords.get("tool_choice"):
        return dict(keywords)
    called = {
        call["name"] for message in since_question(messages) for call in getattr(message, "tool_calls", ())
    }
    wanted = [n for prefix in PREFERRED for n in names if n.startswith(prefix) and n not in called]
    # Who was handed over to answers himself: handing back would never end.
    if any(name.startswith("transfer_to_") for name in called):
        wanted = [name for name in wanted if not name.startswith("transfer_to_")]
    return {**keywords, "tool_choice": wanted[0] if wanted else "none"}


def since_question(messages: Sequence[BaseMessage]) -> list[BaseMessage]:
    """The messages after the user's last one."""
    asked = max((i for i, message in enumerate(messages) if isinstance(message, HumanMessage)), default=-1)
    return list(messages[asked + 1 :])


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "It is sunny."


# The packages ---------------------------------------------------------------------------------------------------


def graph_turn(graph: Any) -> Turn:
    async def turn(text: str, config: dict[str, Any]) -> Any:
        return await graph.ainvoke({"messages": [("user", text)]}, config)

    return turn


async def supervisor(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """A supervisor that hands each question to an expert."""
    agent = import_module("langgraph.prebuilt").create_react_agent
    expert = agent(llm, [get_weather], name="weather_expert", prompt=SYSTEM + "You know the weather.")
    package = import_module("langgraph_supervisor")
    return graph_turn(
        package.create_supervisor([expert], model=llm, prompt=SYSTEM).compile(checkpointer=saver)
    )


async def swarm(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """Two agents that hand over to each other."""
    package, agent = import_module("langgraph_swarm"), import_module("langgraph.prebuilt").create_react_agent
    hand_over = package.create_handoff_tool
    alice = agent(llm, [hand_over(agent_name="Bob")], prompt=SYSTEM + "You are Alice.", name="Alice")
    bob = agent(llm, [get_weather, hand_over(agent_name="Alice")], prompt=SYSTEM + "You are Bob.", name="Bob")
    return graph_turn(
        package.create_swarm([alice, bob], default_active_agent="Alice").compile(checkpointer=saver)
    )


async def deep_agent(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """An agent with files, plans and subagents, whose tools are long."""
    create = import_module("deepagents").create_deep_agent
    return graph_turn(create(model=llm, tools=[get_weather], system_prompt=SYSTEM, checkpointer=saver))


async def memories(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """An agent that keeps memories in a store, by langmem's tools."""
    langmem, store = import_module("langmem"), import_module("langgraph.store.memory").InMemoryStore()
    tools = [langmem.create_manage_memory_tool(("m",)), langmem.create_search_memory_tool(("m",))]
    agent = import_module("langchain.agents").create_agent
    return graph_turn(agent(llm, tools, system_prompt=SYSTEM, checkpointer=saver, store=store))


async def mcp_tools(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """An agent whose tools are those of an MCP server in another process."""
    client = import_module("langchain_mcp_adapters.client").MultiServerMCPClient
    server = {"command": sys.executable, "args": [__file__, "mcp-server"], "transport": "stdio"}
    tools = await client({"weather": server}).get_tools()
    agent = import_module("langchain.agents").create_agent
    return graph_turn(agent(llm, tools, system_prompt=SYSTEM, checkpointer=saver))


async def extraction(llm: ChatMLXPersistent, saver: Any, folder: Path) -> Turn:
    """trustcall fills a form from what is said, question after question in one history."""
    weather = {
        "name": "Weather",
        "description": "What somebody wants to know.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    }
    form = {"type": "function", "function": weather}
    extract = import_module("trustcall").create_extractor(llm, tools=[form], tool_choice="Weather")
    kept = folder / "history.json"
    said: list[tuple[str, str]] = json.loads(kept.read_text()) if kept.exists() else [("system", SYSTEM)]

    async def turn(text: str, config: dict[str, Any]) -> Any:
        said.append(("user", text))
        state = await extract.ainvoke({"messages": list(said)}, config)
        said.append(("assistant", str(state["responses"][0])))
        kept.write_text(json.dumps(said))
        return state

    return turn


@dataclass(frozen=True, slots=True)
class Scenario:
    """One package."""

    package: str
    """Its name on the package index."""
    module: str
    make: Callable[[ChatMLXPersistent, Any, Path], Awaitable[Turn]]
    repeats: bool = True
    """Whether the same conversation has the same words each time."""

    @property
    def is_installed(self) -> bool:
        """Whether it can be run here."""
        return find_spec(self.module) is not None


SCENARIOS: dict[str, Scenario] = {
    "supervisor": Scenario("langgraph-supervisor", "langgraph_supervisor", supervisor),
    "swarm": Scenario("langgraph-swarm", "langgraph_swarm", swarm),
    "deepagents": Scenario("deepagents", "deepagents", deep_agent),
    "langmem": Scenario("langmem", "langmem", memories, repeats=False),
    "trustcall": Scenario("trustcall", "trustcall", extraction),
    "mcp": Scenario("langchain-mcp-adapters", "langchain_mcp_adapters", mcp_tools),
}


# One process ----------------------------------------------------------------------------------------------------


async def take_turns(name: str, folder: Path, first: int, last: int) -> None:
    """Take turns ``first`` up to ``last`` and print what each of them reused."""
    llm = Directed(cache_dir=str(folder / "caches"), min_free_mb=0, temperature=0, max_tokens=60)
    saver = import_module("langgraph.checkpoint.sqlite.aio").AsyncSqliteSaver
    async with saver.from_conn_string(str(folder / "checkpoints.db")) as checkpoints:
        turn = await SCENARIOS[name].make(llm, checkpoints, folder)
        for number in range(first, last):
            reuse = ReuseHandler()
            config = {"configurable": {"thread_id": "t"}, "callbacks": [reuse], "recursion_limit": 40}
            state = await turn(QUESTIONS[number], config)
            said = [(message.type, message.text) for message in state["messages"]]
            total = reuse.total
            counts = {"calls": total.turns, "prompt": total.reused + total.new, "reused": total.reused}
            print(json.dumps({"turn": number, **counts, "said": said[-1]}), flush=True)


def serve_mcp() -> None:
    """An MCP server with one tool."""
    server = import_module("mcp.server.fastmcp").FastMCP("weather")
    server.tool(name="get_weather", description="Get the weather of a city.")(lambda city: "It is sunny.")
    server.run()


def run(name: str, folder: Path, first: int, last: int, *, kill: bool = False) -> list[dict[str, Any]]:
    """Take turns in a process of their own, which is killed after them if ``kill``; return what each reused."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        __file__,
        name,
        str(folder),
        str(first),
        str(last),
        *(["kill"] if kill else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(name: str, folder: str = "", first: str = "0", last: str = "0", kill: str = "") -> None:
    """See the module."""
    if name == "mcp-server":
        serve_mcp()
        return
    asyncio.run(take_turns(name, Path(folder), int(first), int(last)))
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
