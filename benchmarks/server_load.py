"""A server under load for some minutes: 16 clients that stream and 200 requests that wait, in every dialect.

Some clients go away in the middle of an answer. Afterwards the numbers of the server must add up to what the clients
saw, and its memory and its open files must be what they were after a quarter of the time, when all budgets are full.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from record import argument_parser, write_result

STREAMS, WAITING, SESSIONS, GOES_AWAY = 16, 200, 64, 0.05
TARGETS = {
    "memory at the end / after a quarter of the time": "<= 1.2",
    "open files at the end / after a quarter of the time": "<= 1.1",
    "wrong answers": "<= 0",
    "tokens that the server and the clients count differently": "<= 0",
    "requests that the server and the clients count differently": "<= 0",
    "exit code": "<= 0",
}
LONGEST = 256
"""More tokens than a prompt or an answer of this load has."""
WORDS = ["sea", "hill", "tree", "road", "lamp", "bird", "stone", "cloud", "river", "bread"]
VARIABLES = {
    "AGENT_MEMORY_SERVER_MAX_IN_FLIGHT": str(STREAMS + WAITING + 8),
    "AGENT_MEMORY_SERVER_MAX_IN_FLIGHT_PER_KEY": str(STREAMS + WAITING + 8),
    "AGENT_MEMORY_MEMORY_BUDGET_MB": "64",
    "AGENT_MEMORY_DISK_BUDGET_MB": "256",
    "AGENT_MEMORY_MIN_FREE_MB": "0",
}


def main() -> None:
    """Run the load and write the result file."""
    parser = argument_parser("server_load", __doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, url = started(Path(folder))
        try:
            results = asyncio.run(loaded(process.pid, url, options.minutes * 60))
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=120)
    results["ratios"]["exit code"] = code
    settings = {"streams": STREAMS, "waiting": WAITING, "sessions": SESSIONS, "minutes": options.minutes}
    write_result(options.out, settings | {"targets": TARGETS}, results, {"name": "tiny-chat"})


def started(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server process that is ready, and its address."""
    log = folder / "log"
    command = [sys.executable, "-m", "agent_memory_core", "serve", "--port", "0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--cache-dir", str(folder / "store")], env={**os.environ, **VARIABLES}, stderr=stderr
        )
    while not (found := re.findall(r"running on (\S+)", log.read_text())):
        time.sleep(0.1)
    while httpx.get(f"{found[0]}/health/ready").status_code != 200:
        time.sleep(0.1)
    return process, found[0]


class Seen:
    """What the clients saw."""

    def __init__(self) -> None:
        self.tokens = Counter({"prompt": 0, "generated": 0})
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []

    def usage(self, said: dict[str, Any]) -> None:
        """Count the tokens of an answer, in whichever dialect."""
        prompt = said.get("prompt_tokens") or said.get("input_tokens", 0)
        prompt += said.get("cache_read_input_tokens", 0) + said.get("cache_creation_input_tokens", 0)
        self.tokens["prompt"] += prompt
        self.tokens["generated"] += said.get("completion_tokens") or said.get("output_tokens", 0)


async def loaded(pid: int, url: str, seconds: float) -> dict[str, Any]:
    """Load a server and compare what it counts with what was seen."""
    seen, footprints = Seen(), list[dict[str, int]]()
    limits = httpx.Limits(max_connections=STREAMS + WAITING + 8)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(ask(client, seen, index, stream=True) for index in range(STREAMS)))
        end = time.monotonic() + seconds
        clients = [
            asyncio.ensure_future(keep_asking(client, seen, index, end)) for index in range(STREAMS + WAITING)
        ]
        while time.monotonic() < end:
            await asyncio.sleep(min(10, seconds / 8))
            footprints.append(footprint(pid))
        await asyncio.gather(*clients)
        metrics = (await client.get("/metrics")).text
    return compared(seen, metrics, footprints)


async def keep_asking(client: httpx.AsyncClient, seen: Seen, index: int, end: float) -> None:
    """One client: the first ones read streams, the others wait for whole answers."""
    while time.monotonic() < end:
        await ask(client, seen, index, stream=index < STREAMS)


async def ask(client: httpx.AsyncClient, seen: Seen, index: int, *, stream: bool) -> None:
    """One request in one dialect, by chance; some clients go away before the end."""
    path, body = random.choice(DIALECTS)(" ".join(random.choices(WORDS, k=24)))
    body["stream"] = stream
    headers = {"x-session-id": f"s{random.randrange(SESSIONS)}"}
    began = time.monotonic()
    async with client.stream("POST", path, json=body, headers=headers) as answer:
        if stream and random.random() < GOES_AWAY:
            await anext(answer.aiter_raw(), b"")
            seen.outcomes["gone"] += 1
            return
        text = (await answer.aread()).decode()
    seen.seconds.append(time.monotonic() - began)
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    events = events or [json.loads(text)]
    found = [event.get("response", event).get("usage") for event in events]
    said = [usage for usage in found if usage]
    seen.outcomes["done" if answer.status_code == 200 and said else "wrong"] += 1
    if said:
        seen.usage(said[-1])


def compared(seen: Seen, metrics: str, footprints: list[dict[str, int]]) -> dict[str, Any]:
    """What was found, and the ratios that have targets."""

    def total(name: str, *labels: str) -> int:
        lines = [line for line in metrics.splitlines() if line.startswith(f"agent_memory_{name}")]
        return round(sum(float(line.split()[-1]) for line in lines if all(label in line for label in labels)))

    warm, last = footprints[len(footprints) // 4], footprints[-1]
    answered = sum(total("requests_total", f'endpoint="{path}"') for path, _ in (d("") for d in DIALECTS))
    counted = {"prompt": total("prompt_tokens_total"), "generated": total("generated_tokens_total")}
    # An answer that its client did not read to its end may have come to it all the same.
    unread = seen.outcomes["gone"] * LONGEST
    more = {name: counted[name] - seen.tokens[name] for name in counted}
    differ = sum(max(0, -count, count - unread) for count in more.values())
    memory, files, *_ = TARGETS
    ratios = {
        memory: round(last["memory"] / warm["memory"], 3),
        files: round(last["files"] / max(1, warm["files"]), 3),
        "wrong answers": seen.outcomes["wrong"],
        "tokens that the server and the clients count differently": differ,
        "requests that the server and the clients count differently": abs(
            answered - sum(seen.outcomes.values())
        ),
    }
    return {
        "ratios": ratios,
        "requests": dict(seen.outcomes),
        "tokens": {"clients": dict(seen.tokens), "server": counted},
        "seconds": {
            "median": round(statistics.median(seen.seconds), 3),
            "longest": round(max(seen.seconds), 3),
        },
        "footprints": footprints,
    }


def footprint(pid: int) -> dict[str, int]:
    """Bytes and open files of a process."""
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    files = Path(f"/proc/{pid}/fd")
    return {"memory": int(said.stdout) * 1024, "files": len(list(files.iterdir())) if files.exists() else 0}


def _chat(text: str) -> tuple[str, dict[str, Any]]:
    options = {"include_usage": True}
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 16, "stream_options": options}
    return "/v1/chat/completions", body


def _message(text: str) -> tuple[str, dict[str, Any]]:
    return "/v1/messages", {"messages": [{"role": "user", "content": text}], "max_tokens": 16}


def _response(text: str) -> tuple[str, dict[str, Any]]:
    return "/v1/responses", {"input": text, "max_output_tokens": 16}


DIALECTS = (_chat, _message, _response)


if __name__ == "__main__":
    main()
