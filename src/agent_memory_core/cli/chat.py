"""`agent-memory chat`: a conversation in the terminal that continues after a restart."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import typer

from agent_memory_core import AgentMemory, ChatHistory, InvalidSetting, SessionKey, TurnReport
from agent_memory_core.cli.formats import duration
from agent_memory_core.cli.options import CacheDir, DiskBudget, Model, Namespace, err, given, out, read_line


def chat(
    session: Annotated[str, typer.Option(help="The session to start or to continue.")] = "chat",
    model: Model = None,
    system: Annotated[
        str | None, typer.Option(help="The system message of a new session.", show_default=False)
    ] = None,
    cache_dir: CacheDir = None,
    disk_budget: DiskBudget = None,
    namespace: Namespace = "default",
    max_tokens: Annotated[int, typer.Option(help="The most tokens of one answer.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="How freely tokens are chosen; 0 is greedy.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes sampled answers repeatable.", show_default=False)
    ] = None,
) -> None:
    """Talk to a model. The conversation continues after a restart; an empty line ends the command."""
    sampling = given(max_tokens=max_tokens, temperature=temperature, seed=seed)
    options = given(model=model, cache_dir=cache_dir, disk_budget_mb=disk_budget)
    with AgentMemory(**options) as memory:
        transcript = _transcript(memory, namespace, session)
        history = _begun(transcript.read() if transcript is not None else [], system, session)
        with err.status(f"loading {memory.model_name}"):
            memory.load()
        while text := read_line():
            history.append({"role": "user", "content": text})
            answer = _answer(memory, history, SessionKey(session, namespace=namespace), sampling)
            history.append({"role": "assistant", "content": answer})
            if transcript is not None:
                transcript.write(history)


def _begun(history: list[dict[str, str]], system: str | None, session: str) -> list[dict[str, str]]:
    """The history of a session, whose system message is ``system`` where it is new.

    Raises:
        InvalidSetting: the session began with another system message.
    """
    first = [{"role": "system", "content": system}] if system else []
    if not history:
        return first
    if system and history[:1] != first:
        raise InvalidSetting(
            f"session {session!r} began without this system message, and what it holds depends on that: "
            "leave --system out, or name another --session."
        )
    err.print(f"continuing session {session!r} after {len(history)} messages.")
    return history


def _transcript(memory: AgentMemory, namespace: str, session: str) -> ChatHistory | None:
    history = memory.history(session, namespace)
    if history is None:
        err.print("there is no folder for sessions (cache_dir is none): nothing of this chat is kept.")
    return history


def _answer(
    memory: AgentMemory, history: list[dict[str, str]], key: SessionKey, sampling: dict[str, Any]
) -> str:
    text = ""
    with memory.chat(history, session=key, stream=True, **sampling) as stream:
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
        f"first token after {duration(report.time_to_first_token)}"
    )
