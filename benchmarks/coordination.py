"""What agents that talk compute: with their memory on disk, with a memory that is lost at each restart, and with none.

    persistent       the service as it is; its process restarts between the parts of a conversation
    cold             the same, and what was computed is gone after each restart, so that views are computed anew
    whole history    mlx-lm alone, as a framework calls a model that keeps nothing: every prompt is computed whole
    LangGraph        the same in a graph whose node asks a chat model of LangChain that keeps nothing

dilemma: two suspects, twenty rounds in four phases, with a restart before each. routing: ten experts have each read one
article; two rounds of one question for each, with a restart before each round. The model is random and answers in
words; all modes are given the same prompts but for what the agents answer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import write_model
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.graph import START, MessagesState, StateGraph
from mlx_lm import load, stream_generate
from record import argument_parser, write_result

from agent_memory_core import AgentMemory
from agent_memory_core.coordination import Book, CoordinationService, load_scenario, view

LAYERS, ANSWER, ROUNDS, PHASES = 2, 16, 20, 4
TARGETS = {
    "dilemma, tokens": "<= 0.1",
    "routing, tokens": "<= 0.2",
    "dilemma, seconds": "<= 0.75",
    "routing, seconds": "<= 0.75",
}
Messages = Sequence[Any]


@dataclass
class Cost:
    """What a conversation cost."""

    turns: int = 0
    prompt: int = 0
    computed: int = 0
    seconds: float = 0.0

    def add(self, turns: int, prompt: int, computed: int, seconds: float) -> None:
        """Count some turns."""
        self.turns += turns
        self.prompt += prompt
        self.computed += computed
        self.seconds = round(self.seconds + seconds, 3)


def main() -> None:
    """Run both conversations in all modes and write the result file."""
    parser = argument_parser("coordination", __doc__)
    options = parser.parse_args()
    results: dict[str, Any] = {"costs": {}, "ratios": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), LAYERS)
        for name, part in {"dilemma": dilemma, "routing": routing}.items():
            persistent, prompts = conversation(model, Path(folder, name), part, keep=True)
            cold, _ = conversation(model, Path(folder, f"{name}-cold"), part, keep=False)
            costs = {
                "persistent": persistent,
                "cold": cold,
                "whole history": whole_history(model, prompts),
                "LangGraph": in_langgraph(model, prompts),
            }
            results["costs"][name] = {mode: vars(cost) for mode, cost in costs.items()}
            print(name, costs, flush=True)
            whole = costs["whole history"]
            results["ratios"][f"{name}, tokens"] = round(persistent.computed / whole.computed, 4)
            results["ratios"][f"{name}, seconds"] = round(persistent.seconds / whole.seconds, 4)
    settings = {"layers": LAYERS, "answer": ANSWER, "rounds": ROUNDS, "phases": PHASES, "targets": TARGETS}
    write_result(options.out, settings, results)


def conversation(
    model: str, folder: Path, part: Callable[[CoordinationService, int], str | None], *, keep: bool
) -> tuple[Cost, list[Messages]]:
    """The parts of a conversation, each in a new engine; what it cost, and every prompt."""
    cost, prompts, number, more = Cost(), [], 0, True
    folder.mkdir()
    while more:
        caches = folder / "caches" if keep else None
        with (
            AgentMemory(model=model, cache_dir=caches, min_free_mb=0, memory_budget_mb=1024) as memory,
            CoordinationService(memory, folder / "coordination.db") as service,
        ):
            memory.chat("Hello!", max_tokens=2)
            started = time.perf_counter()
            sid = part(service, number)
            seconds = time.perf_counter() - started
            more, number = sid is not None, number + 1
            if sid is not None:
                rows = service.stats(sid)
                # What is read before the first question is the same work in every mode.
                if rows:
                    cost.add(
                        len(rows), sum(row.prompt for row in rows), sum(row.new for row in rows), seconds
                    )
                prompts += prompts_of(service._stored(sid).book)
                service.close_session(sid)
    return cost, prompts


def dilemma(service: CoordinationService, number: int) -> str | None:
    """One phase of the dilemma; None after the last one."""
    if number == PHASES:
        return None
    scenario = load_scenario("prisoners_dilemma")
    sid = service.create_session(
        {
            "agents": [scenario.role("marco"), scenario.role("danny")],
            "topology": "round_robin",
            "initial_prompt": scenario.phases[0].initial_prompt,
            "persistent_cache_prefix": "dilemma",
            "sampling": {"max_tokens": ANSWER, "temperature": 0.0},
        }
    ).session_id
    for _ in range(ROUNDS // PHASES):
        service.round(sid)
    return sid


def routing(service: CoordinationService, number: int) -> str | None:
    """The experts read (not counted), or one question for each of them; None after two rounds."""
    if number == 3:
        return None
    scenario = load_scenario("routing")
    names = scenario.phases[0].agents
    sid = service.create_session(
        {
            "agents": [scenario.role(name) for name in names],
            "topology": "whisper",
            "persistent_cache_prefix": "library",
            "sampling": {"max_tokens": ANSWER, "temperature": 0.0},
        }
    ).session_id
    if number == 0:
        service.prime(sid)
    else:
        for expert in names[1:]:
            service.turn(sid, speaker=expert, to="router", prompt="What is the code, and who knows it?")
    return sid


def prompts_of(book: Book) -> list[Messages]:
    """The messages with which each agent was asked, turn by turn."""
    found = []
    for once in book.spoken:
        before = tuple(other for other in book.spoken if other.seq < once.seq)
        then = replace(book, events=book.events[: once.upto], spoken=before)
        found.append(view(then, once.agent_id).prompt(once.cue))
    return found


def whole_history(model: str, prompts: Sequence[Messages]) -> Cost:
    """The same prompts for mlx-lm, which is given each one whole."""
    loaded, tokenizer = load(model)[:2]
    cost = Cost()
    for messages in prompts:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        ids = list(tokenizer.apply_chat_template(plain, add_generation_prompt=True))
        started = time.perf_counter()
        for _ in stream_generate(loaded, tokenizer, ids, max_tokens=ANSWER):
            pass
        cost.add(1, len(ids), len(ids), time.perf_counter() - started)
    return cost


class Forgetful(BaseChatModel):
    """A chat model of LangChain on mlx-lm that keeps nothing between calls."""

    loaded: Any
    tokenizer: Any

    @property
    def _llm_type(self) -> str:
        return "forgetful"

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        ids = list(
            self.tokenizer.apply_chat_template(
                convert_to_openai_messages(messages), add_generation_prompt=True
            )
        )
        text = "".join(
            piece.text for piece in stream_generate(self.loaded, self.tokenizer, ids, max_tokens=ANSWER)
        )
        used = {"input_tokens": len(ids), "output_tokens": ANSWER, "total_tokens": len(ids) + ANSWER}
        answer = AIMessage(text, usage_metadata=used)
        return ChatResult(generations=[ChatGeneration(message=answer)])


def in_langgraph(model: str, prompts: Sequence[Messages]) -> Cost:
    """The same prompts, each of them the history of a graph's state."""
    loaded, tokenizer = load(model)[:2]
    llm = Forgetful(loaded=loaded, tokenizer=tokenizer)
    graph = StateGraph(MessagesState)
    graph.add_node("agent", lambda state: {"messages": [llm.invoke(state["messages"])]})
    graph.add_edge(START, "agent")
    agent = graph.compile()
    cost = Cost()
    for messages in prompts:
        history = [(message.role, message.content) for message in messages]
        started = time.perf_counter()
        answer = agent.invoke({"messages": history})["messages"][-1]
        tokens = answer.usage_metadata["input_tokens"]
        cost.add(1, tokens, tokens, time.perf_counter() - started)
    return cost


if __name__ == "__main__":
    main()
