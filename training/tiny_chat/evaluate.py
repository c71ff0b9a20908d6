"""Measure a model folder through mlx-lm, greedily, on words and wordings that training never saw.

Every figure has its number of samples beside it; ``--out`` writes them as JSON, from which ``card.py`` makes the card.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from mlx_lm import load, stream_generate

from training.tiny_chat.corpus import LETTERS_PER_TOKEN, Conversation, Turn
from training.tiny_chat.facts import Fact, acknowledge, draw_fact, draw_foreign_fact
from training.tiny_chat.json_answers import json_question
from training.tiny_chat.talk import brief, passage, small_talk
from training.tiny_chat.tools import Call, Tool, make_result, make_tool, make_tools, request
from training.tiny_chat.words import Source

DISTANCES: Final = (0, 100, 300, 1000, 2000)
ABOUT_USER: Final = ("favourite", "name", "home", "work", "relative", "object")
LONGEST_REPLY: Final = 160


@dataclass(frozen=True)
class Reply:
    """What the model said, whether it closed its turn, and the calls in it; None for a call that does not parse."""

    text: str
    closed: bool
    calls: list[Call | None]


@dataclass(frozen=True)
class Case:
    """A conversation that ends with a question, and what each figure asks of the reply."""

    talk: Conversation
    score: Callable[[Reply], dict[str, bool]]


@dataclass
class Cell:
    """The samples of one figure."""

    task: str
    wordings: str
    samples: int = 0
    right: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    misses: list[tuple[str, str]] = field(default_factory=list)

    def add(self, case: Case, reply: Reply, tokens: int) -> None:
        """Count one reply."""
        self.samples += 1
        self.prompt_tokens += tokens
        scores = {**case.score(reply), "closed": reply.closed}
        for name, good in scores.items():
            self.right[name] = self.right.get(name, 0) + good
        if not all(scores.values()):
            self.misses.append((case.talk.turns[-1].content, reply.text))

    def record(self) -> dict[str, Any]:
        """The cell for the JSON."""
        mean = round(self.prompt_tokens / self.samples)
        return {
            "task": self.task,
            "wordings": self.wordings,
            "n": self.samples,
            "right": self.right,
            "mean_prompt_tokens": mean,
        }


class Model:
    """A model folder, asked greedily."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load(str(folder))[:2]

    def tokens(self, talk: Conversation) -> list[int]:
        """The prompt."""
        ids = self.tokenizer.apply_chat_template(
            talk.messages(), tools=talk.schemas() or None, add_generation_prompt=True
        )
        return list(ids if isinstance(ids, list) else ids["input_ids"])

    def reply(self, prompt: list[int]) -> Reply:
        """The greedy answer to a prompt."""
        text, reason = "", None
        for part in stream_generate(self.model, self.tokenizer, prompt, max_tokens=LONGEST_REPLY):
            text += part.text
            reason = part.finish_reason
        return Reply(text, reason == "stop", list(self._calls(text)))

    def _calls(self, text: str) -> Iterator[Call | None]:
        start, end = (
            re.escape(mark) for mark in (self.tokenizer.tool_call_start, self.tokenizer.tool_call_end)
        )
        for body in re.findall(f"{start}(.*?)(?:{end}|$)", text, re.DOTALL):
            try:
                call = self.tokenizer.tool_parser(body, None)
                yield Call(call["name"], call["arguments"])
            except (ValueError, KeyError, TypeError):
                yield None


# --- Cases ----------------------------------------------------------------------------------------


def says(value: str) -> Callable[[Reply], dict[str, bool]]:
    """Whether the reply has the value, whole."""
    return lambda reply: {"right": re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reply.text) is not None}


def says_exactly(text: str) -> Callable[[Reply], dict[str, bool]]:
    """Whether the reply is this and nothing else."""
    return lambda reply: {"right": reply.text.strip() == text}


def fill(source: Source, talk: Conversation, tokens: int) -> None:
    """Let so many tokens of small talk and texts pass."""
    until = talk.letters() + tokens * LETTERS_PER_TOKEN
    while talk.letters() < until:
        talk.exchange(*(passage(source) if source.chance(0.25) else small_talk(source)), "talk")


def different_facts(source: Source, count: int, kinds: tuple[str, ...] = ABOUT_USER) -> list[Fact]:
    """Facts of different kinds."""
    return [draw_fact(source, kind) for kind in source.rng.sample(kinds, count)]


def tell(source: Source, talk: Conversation, facts: list[Fact]) -> None:
    """Let the user tell each fact in a turn."""
    for fact in facts:
        talk.exchange(fact.told(source), acknowledge(source, [fact]), "talk")


def recall(source: Source, *, distance: int = 0, system: int = 0, turns: int = 0) -> Case:
    """Three facts told, filler, one asked for; after a long system prompt if one is wanted."""
    talk = Conversation()
    if system:
        talk.turns.append(_system_turn(source, system))
    facts = different_facts(source, 3)
    tell(source, talk, facts)
    fill(source, talk, distance)
    for _ in range(turns):
        talk.exchange(*small_talk(source), "talk")
    fact = source.rng.choice(facts)
    talk.user(fact.asked(source))
    return Case(talk, says(fact.value))


def recall_from_system(source: Source) -> Case:
    """A fact hidden in a system prompt of about 1,000 tokens."""
    fact = draw_foreign_fact(source)
    talk = Conversation([_system_turn(source, 1000, fact)])
    talk.user(fact.asked(source))
    return Case(talk, says(fact.value))


def _system_turn(source: Source, tokens: int, fact: Fact | None = None) -> Turn:
    sentences = brief(source, int(tokens * LETTERS_PER_TOKEN))
    if fact:
        sentences.insert(source.rng.randint(1, len(sentences)), fact.told(source))
    return Turn("system", " ".join(sentences))


def corrected(source: Source) -> Case:
    """A fact told, told anew with another value, and asked for."""
    talk = Conversation()
    old = draw_fact(source, source.pick("favourite", "home", "object", "relative"))
    value = draw_fact(source, old.form.name).value
    new = Fact(old.key, value, old.form, {**old.slots, "v": value})
    tell(source, talk, [old])
    fill(source, talk, 60)
    talk.exchange("Actually, " + new.told(source), f"Got it. {new.answer}", "talk")
    fill(source, talk, 60)
    talk.user(new.asked(source))
    return Case(talk, says(value))


def never_told(source: Source) -> Case:
    """A question for something never told."""
    talk = Conversation()
    told, asked = different_facts(source, 2)
    tell(source, talk, [told])
    talk.user(asked.asked(source))
    return Case(talk, says_exactly(asked.unknown))


def _offer(source: Source, arguments: int) -> tuple[Conversation, Tool]:
    """A conversation with one to four tools, and the one to use."""
    tool = make_tool(source, arguments)
    others = [
        t
        for t in make_tools(source, source.rng.choice((0, 1, 2, 3)))
        if not {*t.noun.split()} & {*tool.noun.split()}
    ]
    talk = Conversation(tools=source.rng.sample([tool, *others], len(others) + 1))
    if source.chance(0.5):
        talk.turns.append(_short_system())
    return talk, tool


def _short_system() -> Turn:
    return Turn("system", "You are a helpful assistant.")


def calls(*expected: Call) -> Callable[[Reply], dict[str, bool]]:
    """Whether the calls parse, have the right names, and are exactly these."""

    def score(reply: Reply) -> dict[str, bool]:
        made = [call for call in reply.calls if call]
        return {
            "parsed": len(made) == len(reply.calls) == len(expected),
            "name": [call.name for call in made] == [call.name for call in expected],
            "right": made == list(expected),
        }

    return score


def tool_call(source: Source, *, arguments: int) -> Case:
    """A request that one of the tools answers."""
    talk, tool = _offer(source, arguments)
    text, call = request(source, tool)
    talk.user(text)
    return Case(talk, calls(call))


def parallel_calls(source: Source) -> Case:
    """Two requests in one turn."""
    talk, tool = _offer(source, 1)
    (first, call), (second, other) = request(source, tool), request(source, tool)
    talk.user(f"{first} And {second}")
    return Case(talk, calls(call, other))


def no_call(source: Source) -> Case:
    """Tools are offered, but the question is for a fact or small talk."""
    talk, _ = _offer(source, 1)
    if source.chance(0.5):
        fact = draw_fact(source)
        tell(source, talk, [fact])
        talk.user(fact.asked(source))
    else:
        talk.user(small_talk(source)[0])
    return Case(talk, lambda reply: {"right": not reply.calls})


def answer_from_result(source: Source) -> Case:
    """A tool has returned; the answer must say what."""
    talk, tool = _offer(source, 1)
    text, call = request(source, tool)
    result = make_result(source, tool)
    talk.user(text)
    talk.assistant("", "call", call)
    talk.returned(result)
    return Case(talk, says_exactly(result.answer))


def json_answer(source: Source) -> Case:
    """A question that wants JSON."""
    asked, answer = json_question(source)
    talk = Conversation()
    talk.user(asked)
    return Case(talk, says_exactly(answer))


# --- The whole ------------------------------------------------------------------------------------

Maker = Callable[[Source], Case]


def plan() -> Iterator[tuple[str, Maker, bool]]:
    """Task, maker, and whether it is measured with trained wordings too."""
    for distance in DISTANCES:
        yield f"recall after {distance} tokens", partial(recall, distance=distance), distance < 1000
    yield "recall after a 1,000-token system prompt", partial(recall, system=1000), False
    yield "the same, twelve turns later", partial(recall, system=1000, turns=12), False
    yield "recall from a 1,000-token system prompt", recall_from_system, False
    yield "recall of a corrected fact", corrected, False
    yield "never told", never_told, False
    for count in range(5):
        yield f"tool call, {count} arguments", partial(tool_call, arguments=count), True
    yield "two tool calls in one turn", parallel_calls, False
    yield "no tool needed", no_call, False
    yield "answer from a tool's result", answer_from_result, False
    yield "JSON answer", json_answer, False


def evaluate(folder: Path, samples: int, only: str, misses: int) -> list[Cell]:
    """Every figure whose task has ``only`` in its name."""
    model = Model(folder)
    cells = []
    for index, (task, make, both) in enumerate(plan()):
        for held in (True, False) if both else (True,):
            if only not in task:
                continue
            cell = Cell(task, "held out" if held else "trained")
            source = Source(7_000 + index, held_values=True, held_wordings=held)
            for _ in range(samples // 2 if "000" in task else samples):
                case = make(source)
                prompt = model.tokens(case.talk)
                cell.add(case, model.reply(prompt), len(prompt))
            cells.append(cell)
            print(json.dumps(cell.record()), flush=True)
            for asked, said in cell.misses[:misses]:
                print(f"    {asked!r}\n        {said!r}")
    return cells


def main() -> None:
    """Evaluate a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--out", type=Path, help="JSON file for the figures; what it says of the training stays"
    )
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--only", default="", help="part of the tasks' names")
    parser.add_argument("--misses", type=int, default=0, help="how many wrong replies to show")
    options = parser.parse_args()
    began = time.monotonic()
    cells = evaluate(options.model, options.samples, options.only, options.misses)
    if options.out:
        kept = (
            json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"training": ""}
        )
        text = json.dumps({**kept, "cells": [cell.record() for cell in cells]}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
