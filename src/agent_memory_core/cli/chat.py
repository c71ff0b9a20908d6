"""`agent-memory chat`: a conversation in the terminal that continues after a restart."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer

from agent_memory_core import AgentMemory, ChatHistory, SessionKey, TurnReport
from agent_memory_core.cli.options import CacheDir, DiskBudget, Model, Namespace, err, given, out


def chat(
    session: Annotated[str, typer.Option(help="The session to start or to continue.")] = "chat",
    model: Model = None,
    cache_dir: CacheDir = None,
    disk_budget: DiskBudget = None,
    namespace: Namespace = "default",
    max_tokens: Annotated[int, typer.Option(help="The most tokens of one answer.")] = 256,
) -> None:
    """Talk to a model. The conversation continues after a restart; an empty line ends the command."""
    options = given(model=model, cache_dir=cache_dir, disk_budget_mb=disk_budget)
    with AgentMemory(**options) as memory:
        transcript = _transcript(memory, namespace, session)
        with err.status(f"loading {memory.model_name}"):
            memory.load()
        history = transcript.read() if transcript is not None else []
        if history:
            err.print(f"continuing session {session!r} after {len(history)} messages.")
        while text := _read_line():
            history.append({"role": "user", "content": text})
            answer = _answer(memory, history, SessionKey(session, namespace=namespace), max_tokens)
            history.append({"role": "assistant", "content": answer})
            if transcript is not None:
                transcript.write(history)


def _transcript(memory: AgentMemory, namespace: str, session: str) -> ChatHistory | None:
    history = memory.history(session, namespace)
    if history is None:
        err.print("there is no folder for sessions (cache_dir is none): nothing of this chat is kept.")
    return history


def _read_line() -> str:
    try:
        return out.input("[bold]> [/bold]", markup=True).strip()
    except EOFError:
        return ""


def _answer(memory: AgentMemory, history: list[dict[str, str]], key: SessionKey, max_tokens: int) -> str:
    text = ""
    with memory.chat(history, session=key, stream=True, max_tokens=max_tokens) as stream:
        with err.status("reading"):
            first = next(stream)
        for delta in itertools.chain([first], stream):
            text += delta.text
            out.print(delta.text, end="")
    out.print()
    if stream.report is not None:
        err.print(_summary(stream.report), style="dim")
    return text


def _summary(report: TurnReport) -> str:
    usage = report.usage
    why = f", {report.miss_reason}" if report.miss_reason else ""
    return (
        f"{usage.cache_read} of {usage.prompt_tokens} prompt tokens reused ({report.hit_tier}{why}), "
        f"first token after {report.time_to_first_token * 1000:.0f} ms"
    )
