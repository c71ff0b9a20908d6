"""The systems that `rivals.py` compares: how each is started, asked, saved, stopped and killed, with its settings.

All of them are processes of their own, in environments of their own. Some answer jobs line by line (`Worker`), the
others are servers, asked over HTTP as their users ask them. What a system cannot do is in `System.cannot`, with the
reason.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "rival_workers"
START_SECONDS = 180
STRANGER_FIRST = 0.5
"""Seconds between a stranger's long prompt and the turn that is asked for under its load."""

Answer = dict[str, Any]
"""A turn: ``first`` and ``arrivals`` in seconds, ``ids`` or ``text``, and of its prompt how many tokens were
``computed``, None where the system does not tell."""


@dataclass(slots=True)
class Prompt:
    """What is asked: the messages, and the same as token ids for systems that take those."""

    session: str
    messages: list[dict[str, str]]
    ids: list[int]


@dataclass
class System:
    """One system. The environment and the disk are folders; ``disk`` is empty at the start of a round."""

    name: str
    python: Path
    model: str
    environment: dict[str, str]
    settings: str
    """Its settings, and why they are fair."""
    cannot: dict[str, str] = field(default_factory=dict)
    """The names of rows that it cannot fill, and why."""
    by_ids: bool = True
    """Whether it is asked with token ids, rather than with messages."""
    disk: Path = Path()
    process: subprocess.Popen[str] | None = None

    def start(self, disk: Path) -> None:
        """Start its process and wait until it can answer."""
        self.disk = disk
        disk.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [str(self.python), *self.command()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if isinstance(self, Worker) else subprocess.DEVNULL,
                stderr=log,
                text=True,
                env=self.environment,
                cwd=WORKERS,
            )
        self.ready()

    @property
    def log(self) -> Path:
        """What it says to nobody in particular."""
        return self.disk.parent / f"{re.sub('[^a-z0-9]+', '-', self.name)}.log"

    def failed(self, what: str) -> RuntimeError:
        """It did not do something: with the end of what it said."""
        said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        return RuntimeError("\n".join([f"{self.name} {what}. The last that it said:", *said]))

    def command(self) -> list[str]:
        """What its Python runs."""
        raise NotImplementedError

    def ready(self) -> None:
        """Wait until it can answer, and let it say something."""
        raise NotImplementedError

    def turn(self, prompt: Prompt, tokens: int) -> Answer:
        """One turn of a session."""
        raise NotImplementedError

    def resume(self, prompt: Prompt, tokens: int) -> Answer:
        """The first turn of a session in a new process, with what has to be loaded for it."""
        return self.turn(prompt, tokens)

    def fork(self, prompt: Prompt, of: str, tokens: int) -> Answer:
        """A turn that goes on from another session, which stays as it is."""
        return self.turn(prompt, tokens)

    def known(self, prompt: Prompt, of: str, tokens: int) -> Answer:
        """A turn of a new session, of whose prompt another one's beginning is known."""
        return self.turn(prompt, tokens)

    def save(self, session: str) -> None:
        """Store a session where that is not done by itself."""

    def many(self, prompts: Sequence[Prompt], tokens: int) -> dict[str, float]:
        """Tokens per second of several prompts at once."""
        raise NotImplementedError

    def under_load(self, cold: Prompt, warm: Prompt, tokens: int) -> Answer:
        """A turn that is asked for a moment after a stranger's long prompt."""
        raise NotImplementedError

    def floor(self, answer: Answer) -> float | None:
        """Seconds that its own model took for the new tokens of a turn, where it says so; else it is asked apart."""
        return None

    def stop(self, *, kill: bool = False) -> None:
        """End the process, as a user does or at once."""
        process, self.process = self.process, None
        assert process is not None
        if not kill:
            self.end(process)
        process.kill() if kill else None
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def end(self, process: subprocess.Popen[str]) -> None:
        """Ask the process to end."""
        process.send_signal(signal.SIGINT)

    def written(self) -> int:
        """Bytes that the process has written to anything so far; 0 where the system does not tell."""
        assert self.process is not None
        io = Path(f"/proc/{self.process.pid}/io")
        if not io.exists():
            return 0
        return int(dict(line.split(": ") for line in io.read_text().splitlines())["wchar"])

    def stored(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.disk.rglob("*") if path.is_file())


class Worker(System):
    """A system whose process answers jobs, see ``rival_workers/protocol.py``."""

    script: str = ""
    arguments: tuple[str, ...] = ()

    def command(self) -> list[str]:
        return [str(WORKERS / self.script), self.model, str(self.disk), *self.arguments]

    def ask(self, do: str, **job: Any) -> Any:
        """Have a job done."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"do": do, **job}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise self.failed(f"ended while it was asked to {do}")
        return json.loads(line)

    def end(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.close()


class ByHand(Worker):
    """A library whose caches the caller keeps, copies, saves and loads."""

    def ready(self) -> None:
        self.ask("turn", session="hello", ids=list(range(20, 40)), tokens=2)

    def turn(self, prompt: Prompt, tokens: int, **more: Any) -> Answer:
        found: Answer = self.ask("turn", session=prompt.session, ids=prompt.ids, tokens=tokens, **more)
        return found

    def resume(self, prompt: Prompt, tokens: int) -> Answer:
        return self.turn(prompt, tokens, restore=True)

    def fork(self, prompt: Prompt, of: str, tokens: int) -> Answer:
        return self.turn(prompt, tokens, of=of)

    def known(self, prompt: Prompt, of: str, tokens: int) -> Answer:
        return self.turn(prompt, tokens, of=of)

    def save(self, session: str) -> None:
        self.ask("save", session=session)

    def many(self, prompts: Sequence[Prompt], tokens: int) -> dict[str, float]:
        found: dict[str, float] = self.ask("many", prompts=[prompt.ids for prompt in prompts], tokens=tokens)
        return found


class MlxByHand(ByHand):
    """mlx-lm."""

    script = "mlx_by_hand.py"


class TransformersByHand(ByHand):
    """transformers on PyTorch."""

    script = "transformers_by_hand.py"


class Product(Worker):
    """agent-memory."""

    script = "product.py"

    def ready(self) -> None:
        self.ask("turn", session="hello", messages=[{"role": "user", "content": "hello"}], tokens=2)

    def turn(self, prompt: Prompt, tokens: int, **more: Any) -> Answer:
        found: Answer = self.ask(
            "turn", session=prompt.session, messages=prompt.messages, tokens=tokens, **more
        )
        return found

    def fork(self, prompt: Prompt, of: str, tokens: int) -> Answer:
        return self.turn(prompt, tokens, of=of)

    def many(self, prompts: Sequence[Prompt], tokens: int) -> dict[str, float]:
        found: dict[str, float] = self.ask(
            "many", prompts=[prompt.messages for prompt in prompts], tokens=tokens, name=prompts[0].session
        )
        return found

    def under_load(self, cold: Prompt, warm: Prompt, tokens: int) -> Answer:
        jobs = {
            name: {"session": prompt.session, "messages": prompt.messages, "tokens": tokens}
            for name, prompt in (("cold", cold), ("warm", warm))
        }
        found: Answer = self.ask("under_load", **jobs, after=STRANGER_FIRST)
        return found


class Server(System):
    """A server that speaks the chat protocol of OpenAI."""

    by_ids = False
    module: tuple[str, ...] = ()
    port = 0

    def start(self, disk: Path) -> None:
        self.port = _free_port()
        super().start(disk)

    def ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.turn(Prompt("hello", [{"role": "user", "content": "hello"}], list(range(20, 40))), 2)
                return
            except (OSError, http.client.HTTPException, _NotReady) as error:
                process = self.process
                assert process is not None
                if process.poll() is not None or time.monotonic() > deadline:
                    raise self.failed("does not answer") from error
                time.sleep(0.1)

    def turn(self, prompt: Prompt, tokens: int) -> Answer:
        started = time.perf_counter()
        arrivals: list[float] = []
        text, computed = "", None
        for event in self._events("/v1/chat/completions", self.body(prompt, tokens)):
            if usage := event.get("usage"):
                known = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
                computed = usage["prompt_tokens"] - known if known is not None else None
            choices = event.get("choices") or [{}]
            if piece := (choices[0].get("delta") or {}).get("content"):
                arrivals.append(time.perf_counter() - started)
                text += piece
        if not arrivals:
            raise _NotReady("no text came")
        return {"first": arrivals[0], "arrivals": arrivals, "text": text, "computed": computed}

    def body(self, prompt: Prompt, tokens: int) -> dict[str, Any]:
        """The request of a turn."""
        return {
            "model": self.model,
            "messages": prompt.messages,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._post(path, body) as answer:
            for line in answer:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[6:])

    def _post(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise _NotReady(f"{path} answered {answer.status}: {answer.read()[:500]!r}")
        return answer

    def many(self, prompts: Sequence[Prompt], tokens: int) -> dict[str, float]:
        started = time.perf_counter()
        starts: list[float] = []

        def run(prompt: Prompt) -> list[float]:
            began = time.perf_counter() - started
            starts.append(began)
            return [began + at for at in self.turn(prompt, tokens)["arrivals"]]

        with ThreadPoolExecutor(len(prompts)) as pool:
            arrivals = list(pool.map(run, prompts))
        seconds = time.perf_counter() - started
        opened, closed = max(each[0] for each in arrivals), min(each[-1] for each in arrivals)
        pieces = sum(opened < at <= closed for each in arrivals for at in each)
        # A piece of text may be more than one token; all of them are counted at the end.
        share = len(prompts) * tokens / sum(map(len, arrivals))
        return {"decode": pieces * share / (closed - opened), "whole": len(prompts) * tokens / seconds}

    def under_load(self, cold: Prompt, warm: Prompt, tokens: int) -> Answer:
        stranger = threading.Thread(target=self.turn, args=(cold, tokens))
        stranger.start()
        time.sleep(STRANGER_FIRST)
        found = self.turn(warm, tokens)
        stranger.join()
        return found


class MlxServer(Server):
    """mlx_lm.server."""

    def command(self) -> list[str]:
        options = ["--port", str(self.port), "--prompt-cache-size", "64"]
        return ["-m", "mlx_lm", "server", "--model", self.model, *options]


class VllmMlx(Server):
    """vllm-mlx."""

    def command(self) -> list[str]:
        options = ["--port", str(self.port), "--continuous-batching", "--ssd-cache-dir", str(self.disk)]
        return [str(self.python.parent / "vllm-mlx"), "serve", self.model, *options]


class LlamaServer(Server):
    """llama.cpp's server: token ids, and slots that the caller chooses, saves and restores."""

    by_ids = True

    def __post_init__(self) -> None:
        self._slots: dict[str, int] = {}

    def start(self, disk: Path) -> None:
        self._slots = {}
        super().start(disk)

    def command(self) -> list[str]:
        return [str(WORKERS / "llama_server.py"), self.model, str(self.disk), str(self.port)]

    def turn(self, prompt: Prompt, tokens: int) -> Answer:
        return self._complete(prompt, tokens, self._slot(prompt.session))

    def _slot(self, session: str) -> int:
        return self._slots.setdefault(session, len(self._slots) % 8)

    def _complete(self, prompt: Prompt, tokens: int, slot: int) -> Answer:
        body = {"prompt": prompt.ids, "n_predict": tokens, "temperature": 0, "stream": True, "id_slot": slot}
        body |= {"cache_prompt": True, "return_tokens": True, "ignore_eos": True}
        started = time.perf_counter()
        arrivals: list[float] = []
        ids: list[int] = []
        last: dict[str, Any] = {}
        for last in self._events("/completion", body):
            if last.get("tokens") and not last.get("stop"):
                arrivals += [time.perf_counter() - started] * len(last["tokens"])
                ids += last["tokens"]
        timings = last["timings"]
        told = {"model_seconds": timings["prompt_ms"] / 1000, "computed": timings["prompt_n"]}
        return {"first": arrivals[0], "arrivals": arrivals, "ids": ids} | told

    def save(self, session: str) -> None:
        self._action("save", session, session)

    def _action(self, action: str, session: str, file: str) -> None:
        with self._post(
            f"/slots/{self._slot(session)}?action={action}", {"filename": f"{file}.bin"}
        ) as answer:
            answer.read()

    def resume(self, prompt: Prompt, tokens: int) -> Answer:
        return self._copied(prompt, prompt.session, tokens)

    def fork(self, prompt: Prompt, of: str, tokens: int) -> Answer:
        started = time.perf_counter()
        self._action("save", of, of)
        before = time.perf_counter() - started
        return _later(self._copied(prompt, of, tokens), before)

    def known(self, prompt: Prompt, of: str, tokens: int) -> Answer:
        # A slot whose beginning is known is found by the server itself.
        return self._complete(prompt, tokens, -1)

    def _copied(self, prompt: Prompt, file: str, tokens: int) -> Answer:
        started = time.perf_counter()
        self._action("restore", prompt.session, file)
        before = time.perf_counter() - started
        return _later(self.turn(prompt, tokens), before)

    def floor(self, answer: Answer) -> float | None:
        return float(answer["model_seconds"])


class _NotReady(Exception):
    """A server that runs has not answered as it should."""


def _later(answer: Answer, seconds: float) -> Answer:
    answer["first"] += seconds
    answer["arrivals"] = [at + seconds for at in answer["arrivals"]]
    return answer


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def clean_environment(python: Path, **more: str) -> dict[str, str]:
    """The variables of a rival's process: those of this one, without what is about our own Python."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    return kept | {"PATH": f"{python.parent}{os.pathsep}{kept.get('PATH', '')}"} | more


def emptied(folder: Path) -> Path:
    """A folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    return folder
