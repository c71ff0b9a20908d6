"""Traces of agents' turns, as names of blocks: what a store sees of chats, agents, questions, scans and councils.

A trace is made from a seed and is the same everywhere. Each turn is the chain of blocks of its prompt and answer, from
the first; blocks of two turns have the same name if and only if all tokens up to their end are the same.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS, RECORDED_TOKENS = 128, 512
DAY = 24 * 3600.0
Blocks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: when it is, and the names of its blocks in order."""

    at: float
    """seconds since the trace began"""
    blocks: Blocks


class Names:
    """Gives out names of blocks that nobody else has."""

    def __init__(self) -> None:
        self._next = itertools.count()

    def fresh(self, count: int) -> Blocks:
        """So many new names."""
        return tuple(itertools.islice(self._next, count))


@dataclass(frozen=True, slots=True)
class Office:
    """What those who take turns in one trace share: names, and system prompts with tools that begin their chats."""

    names: Names
    prompts: tuple[Blocks, ...]

    @classmethod
    def open(cls, chance: random.Random, prompts: int) -> Office:
        """An office with system prompts of 512 to 6,144 tokens."""
        names = Names()
        return cls(names, tuple(names.fresh(chance.randint(4, 48)) for _ in range(prompts)))

    def prompt(self, chance: random.Random) -> Blocks:
        """A system prompt: the n-th is chosen 1/n as often as the first."""
        return chance.choices(self.prompts, [1 / (n + 1) for n in range(len(self.prompts))])[0]


Actor = Callable[[Office, random.Random, float], Iterator[Turn]]


def chat(office: Office, chance: random.Random, at: float) -> Iterator[Turn]:
    """A person's conversation: six turns in the mean, now and then after hours, or the next day."""
    blocks = office.prompt(chance)
    while True:
        blocks += office.names.fresh(chance.randint(1, 8))
        yield Turn(at, blocks)
        if chance.random() < 1 / 6:
            return
        at += chance.lognormvariate(9, 1) if chance.random() < 0.2 else chance.expovariate(1 / 90)


def agent_run(office: Office, chance: random.Random, at: float) -> Iterator[Turn]:
    """An agent that calls tools: many quick turns, often a fork, then nothing; one in five goes on after hours."""
    blocks = office.prompt(chance)
    for _ in range(2 if chance.random() < 0.2 else 1):
        for _ in range(chance.randint(6, 30)):
            blocks += office.names.fresh(chance.randint(1, 10))
            yield Turn(at, blocks)
            at += chance.expovariate(1 / 12)
            if chance.random() < 0.05:
                yield from _sub_agent(office, chance, at, blocks)
        at += chance.lognormvariate(9, 1)


def _sub_agent(office: Office, chance: random.Random, at: float, blocks: Blocks) -> Iterator[Turn]:
    for _ in range(chance.randint(2, 8)):
        blocks += office.names.fresh(chance.randint(1, 6))
        yield Turn(at, blocks)
        at += chance.expovariate(1 / 12)


def question(office: Office, chance: random.Random, at: float) -> Iterator[Turn]:
    """One question about a document of its own, and no second."""
    yield Turn(at, office.prompt(chance) + office.names.fresh(chance.randint(2, 24)))


def scan(office: Office, chance: random.Random, at: float) -> Iterator[Turn]:
    """A job that asks one question about each of many long documents."""
    prompt = office.prompt(chance)
    for _ in range(chance.randint(40, 160)):
        yield Turn(at, prompt + office.names.fresh(chance.randint(16, 64)))
        at += chance.expovariate(1 / 4)


def council(office: Office, chance: random.Random, at: float) -> Iterator[Turn]:
    """Six to twelve agents with long contexts of their own, who speak one after the other, round after round."""
    members = [
        office.prompt(chance) + office.names.fresh(chance.randint(8, 48))
        for _ in range(chance.randint(6, 12))
    ]
    for _ in range(chance.randint(4, 10)):
        for number, blocks in enumerate(members):
            members[number] = blocks + office.names.fresh(chance.randint(1, 2))
            yield Turn(at, members[number])
            at += chance.expovariate(1 / 20)


MIXES: dict[str, dict[Actor, int]] = {
    "chats": {chat: 500},
    "agents at work": {agent_run: 130},
    "councils": {council: 36},
    "questions and chats": {question: 1600, chat: 260},
    "scans and chats": {scan: 10, chat: 260},
    "all of them": {chat: 180, agent_run: 40, question: 500, scan: 3, council: 10},
}
"""The traces: how many of whom begin in one day."""


def make(mix: dict[Actor, int], seed: int, prompts: int = 12) -> list[Turn]:
    """The turns of everybody in a mix, in the order of time."""
    office = Office.open(random.Random(f"{seed} prompts"), prompts)
    turns: list[Turn] = []
    for actor, count in mix.items():
        for number in range(count):
            chance = random.Random(f"{seed} {actor.__name__} {number}")
            turns += actor(office, chance, chance.uniform(0, DAY))
    return sorted(turns, key=lambda turn: turn.at)


def recorded(path: Path) -> list[Turn]:
    """A recorded trace of JSON lines with ``timestamp`` in milliseconds and ``hash_ids``, as the Mooncake project's.

    Each of its names stands for `RECORDED_TOKENS` tokens.
    """
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [Turn(row["timestamp"] / 1000, tuple(row["hash_ids"])) for row in rows]
