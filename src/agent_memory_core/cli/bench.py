"""`agent-memory bench`: what a memory is worth with one's own model on one's own machine."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from agent_memory_core import AgentMemory, EngineConfig, InvalidSetting, TurnReport, settings_for
from agent_memory_core.cli.formats import duration, print_json, size, table
from agent_memory_core.cli.options import CacheDir, Json, Model, err, given, out, say
from agent_memory_core.cli.published import NOTICE, published, published_table

LENGTHS = (256, 1024, 4096)
ANSWER = 8
"""Tokens of an answer: enough for a session to be stored."""

WORDS = (
    "river",
    "lamp",
    "seven",
    "green",
    "quiet",
    "stone",
    "market",
    "under",
    "bread",
    "window",
    "slowly",
    "paper",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """The seconds to the first token after a conversation of one length; each is a median."""

    tokens: int
    """The tokens of the first prompt."""
    cold: float
    """Nothing of the prompt is known."""
    hot: float
    """The next turn of a session, in the process that holds it."""
    resumed: float
    """The next turn of a session, read from disk by an engine that was started anew."""
    shared: float
    """The first turn of another session that begins with the same text."""
    nbytes: int
    """What the session takes on disk."""

    @property
    def saved(self) -> float:
        """How many times sooner the resumed turn answers than the cold one."""
        return self.cold / self.resumed


def bench(
    model: Model = None,
    cache_dir: CacheDir = None,
    tokens: Annotated[
        str, typer.Option(help="The lengths of conversations, in tokens, with commas.")
    ] = ",".join(map(str, LENGTHS)),
    repeat: Annotated[int, typer.Option(min=1, help="How often each is measured; medians are shown.")] = 3,
    as_json: Json = False,
) -> None:
    """Measure cold, hot, resumed and shared turns, and say from how many tokens on the memory is worth it.

    It writes to a folder of its own beside that of the sessions, and deletes it. Times
    that others published for larger models are shown beside one's own.
    """
    lengths = _lengths(tokens)
    config = settings_for(given(model=model, cache_dir=cache_dir))
    with tempfile.TemporaryDirectory(prefix=".agent-memory-bench-", dir=_place(config)) as folder:
        found = list(_measured(config, Path(folder), lengths, repeat))
    if as_json:
        rows = [dataclasses.asdict(one) | {"cold / resumed": one.saved} for one in found]
        print_json(
            {"model": str(config.model), "seconds": rows, "verdict": verdict(found), "published": published()}
        )
        return
    out.print(_table(found))
    say(verdict(found))
    say("")
    say(NOTICE)
    out.print(published_table())


def verdict(found: Sequence[Measured]) -> str:
    """From how many tokens on a resumed session answers sooner than a cold one, and how much sooner at most."""
    longest = found[-1]
    start = break_even(found)
    if start is None:
        return (
            f"Up to {longest.tokens:,} tokens it is not worth it here: a resumed session answers after "
            f"{duration(longest.resumed)}, a cold one after {duration(longest.cold)}."
        )
    shortest = ", the shortest that was measured" if start == found[0].tokens else ""
    return (
        f"It is worth it from about {start:,} tokens on{shortest}. After {longest.tokens:,} tokens a resumed "
        f"session answers {longest.saved:.1f} times sooner than a cold one: {duration(longest.resumed)} instead of "
        f"{duration(longest.cold)}."
    )


def break_even(found: Sequence[Measured]) -> int | None:
    """The length from which on resuming saves time, on the straight line between two measured lengths.

    It is the shortest length where that one saves time already, and None where no length does.
    """
    gains = [one.cold - one.resumed for one in found]
    losing = [i for i, gain in enumerate(gains) if gain <= 0]
    if not losing:
        return found[0].tokens
    last = losing[-1]
    if last == len(found) - 1:
        return None
    low, high = gains[last], gains[last + 1]
    share = -low / (high - low)
    return round(found[last].tokens + share * (found[last + 1].tokens - found[last].tokens))


# Measuring --------------------------------------------------------------------------------------------------


def _lengths(text: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or found[0] < 32:
        raise typer.BadParameter(f"{text!r}: give numbers from 32 on, as 256,1024.", param_hint="--tokens")
    return found


def _place(config: EngineConfig) -> Path | None:
    """A folder on the volume of the sessions, because its speed is part of what is measured."""
    if config.cache_dir is None:
        return None
    return next(path for path in config.cache_dir.parents if path.exists())


def _measured(config: EngineConfig, folder: Path, lengths: Sequence[int], repeat: int) -> Iterator[Measured]:
    for tokens in lengths:
        samples = []
        for number in range(repeat):
            with err.status(f"{tokens:,} tokens, {number + 1} of {repeat}"):
                samples.append(_sample(config, folder / f"{tokens} {number}", tokens, number))
        cold, hot, resumed, shared, nbytes = (median(values) for values in zip(*samples, strict=True))
        yield Measured(tokens, cold, hot, resumed, shared, int(nbytes))


def _sample(config: EngineConfig, folder: Path, tokens: int, number: int) -> tuple[float, ...]:
    """The seconds of a cold, a hot, a resumed and a shared turn, and the bytes of the session."""
    with AgentMemory(config.replace(cache_dir=folder)) as memory:
        _warm_up(memory)
        text = _text(memory, tokens, number)
        history = [{"role": "system", "content": text}]
        cold = _turn(memory, history, "one", "Begin.")
        hot = _turn(memory, history, "one", "Go on.")
        memory.flush()
    with AgentMemory(config.replace(cache_dir=folder)) as memory:
        _warm_up(memory)
        resumed = _turn(memory, history, "one", "And then?")
        shared = _turn(memory, history[:1], "two", "Begin otherwise.")
        (nbytes,) = (info.nbytes for info in memory.sessions() if info.session_id == "one")
    times = (report.time_to_first_token for report in (cold, hot, resumed, shared))
    return (*times, nbytes)


def _warm_up(memory: AgentMemory) -> None:
    """Load the model and compile its kernels, on a prompt that shares nothing with what is measured."""
    memory.chat("Warm up.", max_tokens=2)


def _turn(memory: AgentMemory, history: list[dict[str, str]], session: str, text: str) -> TurnReport:
    history.append({"role": "user", "content": text})
    answer = memory.chat(history, session=session, max_tokens=ANSWER, temperature=0)
    history.append({"role": "assistant", "content": answer.text})
    if session == "one" and not answer.report.persisted:
        raise InvalidSetting(
            f"the session could not be stored: {answer.report.save_error or 'no reason given'}."
        )
    return answer.report


def _text(memory: AgentMemory, tokens: int, number: int) -> str:
    """A text of about so many tokens; another number gives another text from its first word on."""
    words = [f"{number} {WORDS[number % len(WORDS)]}"]
    words += [WORDS[(i * 7 + i // 11) % len(WORDS)] for i in range(tokens)]
    each = max(1.0, len(memory.encode(" ".join(words))) / len(words))
    return " ".join(words[: max(1, round(tokens / each))])


def _table(found: Sequence[Measured]) -> Any:
    columns = ("tokens", "cold", "hot", "resumed", "shared", "cold / resumed", "on disk")
    rows = table(*columns, right=columns)
    for one in found:
        times = (duration(seconds) for seconds in (one.cold, one.hot, one.resumed, one.shared))
        rows.add_row(f"{one.tokens:,}", *times, f"{one.saved:.1f}", size(one.nbytes))
    return rows
