"""What is lost with a machine whose turns are acknowledged when they are on its own disk (``cold_ack="local"``).

A process takes turns in several sessions as fast as it can, while each request to the object store is slow. It is
killed with SIGKILL at a random moment, and its disk counts as gone: another memory with an empty folder goes on from
the object store alone. A turn is lost if the next one of its session has to compute any of its prompt again.

The bound is what the queue on the lost disk says: ``cold.status().waiting_turns``. It is read from that disk after the
kill, by nobody but this benchmark.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cold import Link
from obstore.store import LocalStore
from record import argument_parser, write_result

from agent_memory_core import AgentMemory
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.cold.book import Book
from agent_memory_core.storage.cold.tier import ColdTier

SESSIONS = 8
LONGEST = 6.0
"""Seconds from the first turn until the kill, at most."""

LINKS = {
    "1 Gbit/s, 30 ms": (1.25e8, 0.03),
    "200 Mbit/s, 100 ms": (2.5e7, 0.1),
    "200 Mbit/s, 1 s": (2.5e7, 1.0),
    "gone": (2.5e7, 3600.0),
}
TARGETS = {"lost beyond the queue": "<= 0", "sessions that lost and did not wait": "<= 0"}


@dataclass
class Talk:
    """One session, as its client holds it."""

    name: str
    messages: list[dict[str, str]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    """tokens of the prompt of each acknowledged turn"""

    def say(self) -> list[dict[str, str]]:
        """The next prompt."""
        question = f"Question {len(self.prompts)} of {self.name}. " * 8
        return [*self.messages, {"role": "user", "content": question}]

    def hear(self, text: str, prompt_tokens: int) -> None:
        """The answer to it."""
        self.messages = [*self.say(), {"role": "assistant", "content": text}]
        self.prompts.append(prompt_tokens)


@dataclass(frozen=True)
class Kill:
    """What one kill cost."""

    turns: int
    waiting: dict[str, int]
    """commits in the queue of the lost disk, by session"""
    lost: dict[str, int]
    """turns, by session, of those that lost any"""


def main() -> None:
    """Kill a process often over each link and write the result file."""
    parser = argument_parser("cold_loss", __doc__)
    parser.add_argument("--kills", type=int, default=5, help="of each link")
    parser.add_argument("--talk", nargs=2, metavar=("FOLDER", "LINK"), help="be the process that is killed")
    options = parser.parse_args()
    if options.talk:
        talk(Path(options.talk[0]), options.talk[1])
    with tempfile.TemporaryDirectory() as folder:
        chance = random.Random(1)
        links = {
            name: [
                one_kill(Path(folder, f"{number} {name}"), name, chance) for number in range(options.kills)
            ]
            for name in LINKS
        }
    results = {"links": {name: told(kills) for name, kills in links.items()}, "ratios": ratios(links)}
    settings = {"sessions": SESSIONS, "seconds": LONGEST, "targets": TARGETS}
    write_result(options.out, settings, results, {"name": "tiny-chat"})
    missed = [name for name in TARGETS if results["ratios"][name] > 0]
    sys.exit(f"missed: {', '.join(missed)}" if missed else None)


def told(kills: list[Kill]) -> dict[str, int]:
    """What is worth keeping of the kills over one link."""
    return {
        "kills": len(kills),
        "turns": sum(kill.turns for kill in kills),
        "lost": sum(sum(kill.lost.values()) for kill in kills),
        "most lost": max(sum(kill.lost.values()) for kill in kills),
        "most sessions": max(len(kill.lost) for kill in kills),
        "most waiting": max(sum(kill.waiting.values()) for kill in kills),
    }


def ratios(links: dict[str, list[Kill]]) -> dict[str, int]:
    """What the targets speak of, over all kills."""
    lost = [
        (kill, name, turns) for kills in links.values() for kill in kills for name, turns in kill.lost.items()
    ]
    return {
        "lost beyond the queue": sum(max(0, turns - kill.waiting.get(name, 0)) for kill, name, turns in lost),
        "sessions that lost and did not wait": sum(name not in kill.waiting for kill, name, _ in lost),
    }


# -- the process that is killed ---------------------------------------------------------------------------


def talk(folder: Path, link: str) -> None:
    """Take turns until killed, and print each that was acknowledged."""
    bucket = LocalStore(folder / "bucket", mkdir=True)
    slow = Link(bucket, *LINKS[link])
    slow.prefix = bucket.prefix
    memory = opened(folder / "here")
    store = memory._required_store()
    store.mirror.close()
    store.mirror = ColdTier(store, slow, timeout=10.0)
    talks = [Talk(f"session {number}") for number in range(SESSIONS)]
    while True:
        for one in talks:
            answer = memory.chat(one.say(), session=one.name, max_tokens=4)
            assert answer.report.persisted
            one.hear(answer.text, answer.report.usage.prompt_tokens)
            print(json.dumps([one.name, answer.text, one.prompts[-1]]), flush=True)


def opened(folder: Path, **settings: Any) -> AgentMemory:
    """A memory with its model loaded and a cold tier."""
    memory = AgentMemory(
        cache_dir=folder, min_free_mb=0, batching="never", **{"cold_url": "memory://none", **settings}
    )
    memory.load()
    return memory


# -- the one that kills it --------------------------------------------------------------------------------


def one_kill(folder: Path, link: str, chance: random.Random) -> Kill:
    """Let a process talk, kill it, and go on with its sessions from the object store."""
    talks = {one.name: one for one in acknowledged(folder, link, chance.uniform(0.5, LONGEST))}
    waiting = left_in_queue(folder / "here")
    lost: dict[str, int] = {}
    with opened(folder / "there", cold_url=(folder / "bucket").as_uri()) as there:
        for one in talks.values():
            read = there.chat(one.say(), session=one.name, max_tokens=1).report.usage.cache_read
            missing = sum(tokens > read for tokens in one.prompts)
            if missing:
                lost[one.name] = missing
    return Kill(sum(len(one.prompts) for one in talks.values()), waiting, lost)


def acknowledged(folder: Path, link: str, seconds: float) -> list[Talk]:
    """The turns that a process acknowledged until it was killed, so many seconds after its first one."""
    talks: dict[str, Talk] = {}
    command = [sys.executable, __file__, "--talk", str(folder), link]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in killed_after(process, seconds):
            with suppress(json.JSONDecodeError):
                name, text, prompt_tokens = json.loads(line)
                talks.setdefault(name, Talk(name)).hear(text, prompt_tokens)
    return list(talks.values())


def killed_after(process: subprocess.Popen[str], seconds: float) -> Iterator[str]:
    """What a process prints until it is killed, so many seconds after its first line."""
    assert process.stdout is not None
    yield process.stdout.readline()
    time.sleep(seconds)
    process.kill()
    yield from process.stdout


def left_in_queue(folder: Path) -> dict[str, int]:
    """What the queue on a disk counts, by session. Nothing is uploaded any more."""
    store = BlockStore(folder, quota_bytes=2**40)
    try:
        return {session: commits for (_, session), commits in Book(store).unsent().items()}
    finally:
        store.close()


if __name__ == "__main__":
    main()
