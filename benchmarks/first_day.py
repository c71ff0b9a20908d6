"""The first day on a new machine, above all on a Mac: ten steps, and one report file to send back.

Each step runs commands that a person could type, writes down what they printed, and says what to look at. A step that
a system does not have is marked "not on this system". Nothing stops at a failure: the report is the result.

    make first-day                                     with tiny-chat, about half an hour
    make first-day MODEL=mlx-community/Qwen3-4B-4bit   with a model of your own: what it is made for
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
KEPT_LINES = 60
"""Lines of one command's output that go into the report: the last ones."""

IS_MAC = sys.platform == "darwin"


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose.

    Args:
        model: the model to try, a folder or a hub id.
        folder: where stores and logs of this run go; nothing else is written.
        report: the file to send back.
        soak_minutes: how long four conversations run at once in the last step.
        steps: numbers of the steps to run.
    """

    model: str
    folder: Path
    report: Path
    soak_minutes: float
    steps: tuple[int, ...]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every command: a store of its own, and exact float32 products."""
        store = {"AGENT_MEMORY_CACHE_DIR": str(self.folder / "store"), "AGENT_MEMORY_MODEL": self.model}
        return {**os.environ, **store, "MLX_ENABLE_TF32": "0"}


@dataclass(slots=True)
class Report:
    """The sections of the report, written to disk after every step: a kernel panic must not lose the first nine."""

    path: Path
    lines: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Append a paragraph and save."""
        self.lines += [text, ""]
        self.path.write_text("\n".join(self.lines), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what it is called, what a person should look at, and what it runs."""

    title: str
    look_at: str
    run: Callable[[Options], Iterator[str]]


def command(options: Options, *arguments: str, timeout: float = 3600, text: str | None = None) -> str:
    """Run one command in the clone; return it, its exit status, its seconds and its last lines as Markdown."""
    shown = " ".join(Path(a).name if a.startswith(str(BIN)) else a for a in arguments)
    if shutil.which(arguments[0]) is None:
        return f"`{shown}`: not on this system"
    started = time.perf_counter()
    try:
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env=options.environment,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        status, output = str(done.returncode), done.stdout
    except subprocess.TimeoutExpired as late:
        status, output = f"stopped after {timeout:.0f} s", str(late.stdout or "")
    kept = "\n".join(output.splitlines()[-KEPT_LINES:])
    return f"`{shown}`: exit {status}, {time.perf_counter() - started:.1f} s\n\n```text\n{kept}\n```"


def python(options: Options, program: str) -> str:
    """Run a short Python program in the environment of the clone."""
    return command(options, sys.executable, "-c", program)


# -- the steps ------------------------------------------------------------------------------------------------


def machine(options: Options) -> Iterator[str]:
    """Step 1."""
    for arguments in (
        ("uname", "-m"),
        ("make", "--version"),
        ("sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize"),
        ("sw_vers",),
        ("git", "log", "-1", "--format=%h %s"),
    ):
        yield command(options, *arguments)
    yield python(
        options,
        "import os, platform, sqlite3\n"
        "print(platform.machine(), platform.python_version(), sqlite3.sqlite_version, hasattr(os, 'preadv'))",
    )


def demo(options: Options) -> Iterator[str]:
    """Step 2."""
    yield command(options, str(BIN / "agent-memory"), "demo")


def device(options: Options) -> Iterator[str]:
    """Step 3."""
    yield python(
        options,
        "from pathlib import Path\n"
        "import mlx.core as mx\n"
        "from agent_memory_core.storage.folder import file_system\n"
        "print(mx.default_device(), mx.device_info())\n"
        "print('file system of the home folder:', file_system(Path.home()))",
    )
    yield python(
        options,
        "from agent_memory_core import AgentMemory\n"
        "with AgentMemory() as memory:\n"
        "    print(memory.chat('Hello.', max_tokens=4).text)\n"
        "    print(memory.stats())",
    )


def tests(options: Options) -> Iterator[str]:
    """Step 4."""
    yield command(options, "make", "test", timeout=3 * 3600)


def verify(options: Options) -> Iterator[str]:
    """Step 5."""
    yield command(options, str(BIN / "agent-memory"), "models", "verify", options.model)


def chat_and_kill(options: Options) -> Iterator[str]:
    """Steps 6 and 7: five turns, kill -9 in the middle of the fourth; memory is watched meanwhile."""
    arguments = [str(BIN / "agent-memory"), "chat", "--model", options.model, "--session", "first-day"]
    environment = {**options.environment, "MLX_RESIDENCY_DEBUG": "1"}
    with subprocess.Popen(
        arguments,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdin is not None
        watch = MemoryWatch(process.pid)
        for turn in range(4):
            process.stdin.write(f"This is turn {turn + 1}. Tell me about the number {turn + 7}.\n")
            process.stdin.flush()
            time.sleep(20 if turn < 3 else 2)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
    yield f"killed with SIGKILL in its fourth turn; it had printed:\n\n```text\n{output[-4000:]}\n```"
    yield f"memory, every two seconds:\n\n```text\n{watch.table()}\n```"
    yield command(options, *arguments, text="What did I say in turn 3?\n\n")


def speed(options: Options) -> Iterator[str]:
    """Step 8."""
    for name in ("ttft", "throughput"):
        out = options.folder / f"{name}.json"
        yield command(options, sys.executable, f"benchmarks/{name}.py", "--out", str(out))
        if out.exists():
            yield f"```json\n{out.read_text(encoding='utf-8')[:20_000]}\n```"


def disk(options: Options) -> Iterator[str]:
    """Step 9."""
    store = options.folder / "store"
    yield command(options, "tmutil", "isexcluded", str(store))
    yield command(options, "tmutil", "listlocalsnapshots", "/")
    yield command(options, "df", "-h", str(store.parent))
    yield command(options, str(BIN / "agent-memory"), "check")
    for name in (".DS_Store", "._file"):
        if (store / "ns").is_dir():
            (store / "ns" / name).touch()
    yield "`.DS_Store` and `._file` are now in the store, as Finder puts them there:"
    yield command(options, str(BIN / "agent-memory"), "check")


def soak(options: Options) -> Iterator[str]:
    """Step 10: four conversations at once."""
    if options.soak_minutes <= 0:
        yield "left out (`--soak-minutes 0`)"
        return
    yield python(options, _SOAK.format(seconds=options.soak_minutes * 60))
    yield command(options, "sh", "-c", "ls -l /Library/Logs/DiagnosticReports/*.panic")
    yield command(
        options, "sh", "-c", "log show --last 3h --predicate 'eventMessage CONTAINS \"IOGPU\"' | tail"
    )


_SOAK = """
import threading, time
from agent_memory_core import AgentMemory
ends = time.monotonic() + {seconds}
def talk(memory, name):
    turns, history = 0, []
    while time.monotonic() < ends:
        history = history[-20:] + [{{"role": "user", "content": f"{{name}}: what is {{turns}} and {{turns}}?"}}]
        answer = memory.chat(history, session=name, max_tokens=64)
        history.append({{"role": "assistant", "content": answer.text}})
        turns += 1
    print(name, turns, "turns", flush=True)
with AgentMemory() as memory:
    callers = [threading.Thread(target=talk, args=(memory, name)) for name in ("ada", "bob", "cleo", "dan")]
    for caller in callers: caller.start()
    for caller in callers: caller.join()
    print(memory.stats())
"""


STEPS = (
    Step(
        "The machine",
        "On a Mac: arm64 twice, make 3.81 or newer, macOS 14 or newer, True. x86_64 means that Python runs under "
        "Rosetta: install an arm64 Python and begin again.",
        machine,
    ),
    Step("The demo", "Three answers; `resumed` is faster than `cold`. A traceback is a fault.", demo),
    Step("The device", "On a Mac: the gpu, the memory of the machine, file system apfs.", device),
    Step(
        "All tests",
        "Every failure: is it rounding (a gap, one row alone or in a batch) or a fault (files, threads, an abort)?",
        tests,
    ),
    Step(
        "The model compared with itself",
        "Both gaps and the floor. Resumed is 0 for models that keep every token. Decoding in a batch is allowed.",
        verify,
    ),
    Step(
        "A conversation that is killed, and the memory meanwhile",
        "The last command knows the conversation and reuses its tokens. Memory levels off near the weights plus the "
        "budget. 'residency set' appears once or never, not at every turn.",
        chat_and_kill,
    ),
    Step("Speed", "hot / floor, resumed / floor, cold / resumed; decode of several against mlx-lm.", speed),
    Step(
        "The disk",
        "On a Mac: the store is excluded from Time Machine. Both checks end with exit 0.",
        disk,
    ),
    Step(
        "Four conversations at once",
        "Every caller made turns, no panic report, no IOGPU message. Then do by hand: let the Mac sleep for five "
        "minutes in the middle of an answer, pull the charger, wake it; the answer continues.",
        soak,
    ),
)


class MemoryWatch:
    """Samples what one process takes of memory until it has ended."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._rows: list[str] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def table(self) -> str:
        """One row for each sample."""
        self._thread.join(timeout=10)
        return "\n".join(self._rows)

    def _watch(self) -> None:
        while sample := self._sample():
            self._rows.append(sample)
            time.sleep(2)

    def _sample(self) -> str:
        done = subprocess.run(
            ["ps", "-o", "rss=", "-o", "state=", "-p", str(self._pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        row = done.stdout.split()
        if len(row) < 2 or row[1].startswith("Z"):
            return ""
        wired = _output("sh", "-c", "vm_stat | grep wired; memory_pressure -Q | tail -1") if IS_MAC else ""
        return f"{int(row[0]) // 1024} MiB resident {' '.join(wired.split())}"


def _output(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=False).stdout


def run(options: Options) -> Report:
    """Run the chosen steps, one after the other."""
    report = Report(options.report)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    report.add(f"# First day\n\n{now}, {platform.platform()}, model `{options.model}`")
    for number, step in enumerate(STEPS, 1):
        if number in options.steps:
            print(f"{number} of {len(STEPS)}: {step.title}", flush=True)
            report.add(f"## {number}. {step.title}\n\n*Look at:* {step.look_at}")
            for paragraph in step.run(options):
                report.add(paragraph)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-chat", help="a model folder or hub id")
    parser.add_argument("--report", type=Path, default=ROOT / "first-day.md", help="the file to send back")
    parser.add_argument("--soak-minutes", type=float, default=10, help="length of the last step")
    parser.add_argument("--steps", default="1-9", help="which steps, for example 1-3,5")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="agent-memory-first-day-") as folder:
        options = Options(
            given.model, Path(folder), given.report.resolve(), given.soak_minutes, _numbers(given.steps)
        )
        report = run(options)
    print(
        f"done: read {report.path} once, then send it back. It holds output of this machine, no conversations."
    )


def _numbers(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


if __name__ == "__main__":
    main()
