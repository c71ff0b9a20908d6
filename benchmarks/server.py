"""What HTTP costs above the engine: the same turns through a server, and in process on the same memory.

    first token      of a turn of which all but its last message is known: seconds from asking to the first text
    tokens a second  of 8 streams at once, from the first request to the end of the last answer
    processor        the seconds that the process with the engine computes for the same turn, and for a token of the
                     8 streams: on a machine that others use, too, these say what HTTP costs, and times do not

The server runs in this process, whose engine both sides share; clients over HTTP are a process of their own. Both
sides take turns, so what slows the machine slows both.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from common import assistant, user, write_model
from record import argument_parser, median_of, write_result

from agent_memory_core import AgentMemory
from agent_memory_core.server import ServerSettings, create_app

LAYERS, KNOWN, NEW, STREAMS, PROMPT, ANSWER = 4, 2048, 32, 8, 64, 96
TARGETS = {"first token seconds more": "<= 0.015", "tokens a second, HTTP / in process": ">= 0.9"}
AIMS = {"first token seconds more": "<= 0.005", "tokens a second, HTTP / in process": ">= 0.97"}
"""What is to be reached; a target is what may not be missed where MLX and the server share two cores."""
TURN, RATE = ("first token", "turn, processor"), ("tokens a second", "tokens a processor second")
CHAT = "/v1/chat/completions"
Turns = list[dict[str, str]]


def main() -> None:
    """Measure both sides in turns and write the result file."""
    parser = argument_parser("server", __doc__)
    parser.add_argument("--samples", type=int, default=15, help="turns of each side")
    parser.add_argument("--client", help="be the client of this server", metavar="URL")
    options = parser.parse_args()
    if options.client:
        answer_commands(options.client)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), LAYERS)
        memory = AgentMemory(model=model, cache_dir=Path(folder, "store"))
        with memory, served(memory) as url, Client(url) as client:
            samples = [measured(memory, client, number) for number in range(1 + options.samples)][1:]
    settings = {
        "layers": LAYERS,
        "known": KNOWN,
        "new": NEW,
        "streams": STREAMS,
        "prompt": PROMPT,
        "answer": ANSWER,
        "targets": TARGETS,
        "aims": AIMS,
    }
    write_result(options.out, settings, summary(samples))


def measured(memory: AgentMemory, client: Client, number: int) -> dict[str, dict[str, float]]:
    """One sample of each side: in process first at even numbers, over HTTP first at odd ones."""
    known = [user(KNOWN, 1, first=True), assistant(" yes"), user(NEW, 1000 + number, first=False)]
    other = [*known[:2], user(NEW, 5000 + number, first=False)]
    # Whatever is asked, all but its last message is there.
    memory.chat(known[:1], session="known", max_tokens=1, temperature=0)
    inside, outside = prompts(2 * number), prompts(2 * number + 1)
    sides = {
        "in process": (lambda: first_token(memory, known), lambda: rate(memory, inside, f"p{number}")),
        "HTTP": (lambda: client.ask("first_token", other), lambda: client.ask("rate", outside, f"h{number}")),
    }
    order = sorted(sides, reverse=number % 2 == 1)
    turns = {side: with_processor(sides[side][0]) for side in order}
    rates = {side: with_processor(sides[side][1]) for side in order}
    found = {}
    for side in sides:
        per_second = STREAMS * ANSWER / rates[side][1]
        found[side] = dict(zip(TURN + RATE, (*turns[side], rates[side][0], per_second), strict=True))
    return found


def with_processor(measure: Callable[[], float]) -> tuple[float, float]:
    """What is measured, and the seconds that this process computed meanwhile."""
    began = time.process_time()
    return measure(), time.process_time() - began


def prompts(seed: int) -> list[Turns]:
    """Prompts that nobody has seen."""
    return [[user(PROMPT, 10_000 + STREAMS * seed + i, first=True)] for i in range(STREAMS)]


def summary(samples: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians of both sides, and of the difference and the ratio within each sample."""
    medians = {
        side: {name: median_of([sample[side][name] for sample in samples]) for name in TURN + RATE}
        for side in ("in process", "HTTP")
    }
    more = {
        f"{name} seconds more": median_of([s["HTTP"][name] - s["in process"][name] for s in samples])
        for name in TURN
    }
    shares = {
        f"{name}, HTTP / in process": median_of([s["HTTP"][name] / s["in process"][name] for s in samples])
        for name in RATE
    }
    return {"medians": medians, "ratios": more | shares, "samples": samples}


# In process -------------------------------------------------------------------------------------------------


def first_token(memory: AgentMemory, turns: Turns) -> float:
    """Seconds to the first text of an answer."""
    began = time.perf_counter()
    with memory.chat(turns, session="known", stream=True, max_tokens=2, temperature=0) as stream:
        first = next(delta for delta in stream if delta.text)
        seconds = time.perf_counter() - began
        assert first.text
        rest = list(stream)
    report = stream.report if rest else None
    assert report is not None
    assert report.usage.cache_read >= KNOWN
    return seconds


def rate(memory: AgentMemory, asked: list[Turns], name: str) -> float:
    """Tokens a second of several streams at once."""

    def read(index: int) -> None:
        session = f"{name}.{index}"
        stream = memory.chat(asked[index], session=session, stream=True, max_tokens=ANSWER, temperature=0)
        for _ in stream:
            pass
        assert stream.report is not None
        assert stream.report.usage.completion_tokens == ANSWER

    return _rate_of(read)


def _rate_of(read: Any) -> float:
    with ThreadPoolExecutor(STREAMS) as threads:
        began = time.perf_counter()
        list(threads.map(read, range(STREAMS)))
        return STREAMS * ANSWER / (time.perf_counter() - began)


# Over HTTP --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(memory: AgentMemory) -> Iterator[str]:
    """A server on the memory, and its address."""
    app = create_app(memory, ServerSettings(max_in_flight=64))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    while httpx.get(f"{url}/health/ready").status_code != 200:
        time.sleep(0.01)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join()


class Client:
    """The process that asks over HTTP."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, __file__, "--client", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, name: str, *arguments: Any) -> float:
        """Let it measure something, and return what it measured."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))


def answer_commands(url: str) -> None:
    """Measure what each line of standard input says."""
    address = url.removeprefix("http://")
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        measures: dict[str, Callable[..., float]] = {"first_token": http_first_token, "rate": http_rate}
        seconds = measures[name](address, *arguments)
        print(json.dumps(seconds), flush=True)


@contextlib.contextmanager
def streamed(address: str, body: dict[str, Any]) -> Iterator[HTTPResponse]:
    """A stream, by a client that computes little: it shares the cores with the server."""
    with contextlib.closing(HTTPConnection(address, timeout=600)) as connection:
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        yield connection.getresponse()


def http_first_token(address: str, turns: Turns) -> float:
    """Seconds to the first text of a stream."""
    seconds, usage = 0.0, dict[str, Any]()
    began = time.perf_counter()
    with streamed(address, _body(turns, "known", 2)) as answer:
        while line := answer.readline().decode():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            if not seconds and any(choice["delta"].get("content") for choice in event.get("choices", ())):
                seconds = time.perf_counter() - began
            usage = event.get("usage") or usage
    assert usage["prompt_tokens_details"]["cached_tokens"] >= KNOWN
    return seconds


def http_rate(address: str, asked: list[Turns], name: str) -> float:
    """Tokens a second of several streams at once."""

    def read(index: int) -> None:
        with streamed(address, _body(asked[index], f"{name}.{index}", ANSWER)) as answer:
            text = answer.read().decode()
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert events[-1]["usage"]["completion_tokens"] == ANSWER

    return _rate_of(read)


def _body(turns: Turns, session: str, tokens: int) -> dict[str, Any]:
    said = {"messages": turns, "session_id": session, "max_tokens": tokens, "temperature": 0}
    return said | {"stream": True, "stream_options": {"include_usage": True}}


if __name__ == "__main__":
    main()
