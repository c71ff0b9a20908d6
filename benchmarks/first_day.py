"""The first day on a new machine, above all on a Mac: ten steps, and one report file to send back.

Each step runs commands that a person could type, writes down what they printed, and says what to look at. A command
that a system does not have is marked "not on this system". Nothing stops at a failure: the report is the result.

    make first-day                                     with tiny-chat, about an hour
    make first-day MODEL=mlx-community/Qwen3-4B-4bit   with a model of your own: what it is made for
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from watched import IS_MAC, ROOT, MemoryWatch, Talk

BIN = Path(sys.executable).parent
AGENT_MEMORY = (sys.executable, "-m", "agent_memory_core.cli")
KEPT_LINES = 60
"""Lines of one command's output that go into the report: the last ones."""

NOT_HERE = "not on this system"


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose."""

    model: str
    """The model to try, a folder or a hub id."""
    folder: Path
    """Where stores of this run go; nothing else is written, apart from the report."""
    report: Path
    """The file to send back."""
    soak_minutes: float = 10
    """How long four conversations run at once in the last step."""
    steps: tuple[int, ...] = ()
    """Numbers of the steps to run."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every command: the user's own, with a store of this run."""
        store = {"AGENT_MEMORY_CACHE_DIR": str(self.store), "AGENT_MEMORY_MODEL": self.model}
        return {**os.environ, **store, "COLUMNS": "120"}

    @property
    def store(self) -> Path:
        """The folder of the store."""
        return self.folder / "store"


@dataclass(slots=True)
class Report:
    """The sections of the report, on disk after every paragraph: a kernel panic must not lose the first nine."""

    path: Path
    lines: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Append a paragraph and save."""
        self.lines += [text, ""]
        with self.path.open("w", encoding="utf-8") as file:
            file.write("\n".join(self.lines))
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True, slots=True)
class Step:
    """One step."""

    title: str
    """What it is called."""
    look_at: str
    """What a person should look at in its output."""
    run: Callable[[Options], Iterator[str]]
    """Yields the paragraphs of its report, in Markdown."""


# -- commands -------------------------------------------------------------------------------------------------


def command(
    options: Options, *arguments: str, timeout: float = 3600, text: str = "", kept: int = KEPT_LINES
) -> str:
    """Run one command in the clone.

    Args:
        options: what the user chose.
        arguments: the program and its arguments.
        timeout: seconds after which it and what it started are killed.
        text: its standard input.
        kept: how many of its last lines are kept.

    Returns:
        The command, its exit status, its seconds and its last lines, as Markdown.
    """
    shown = shown_command(arguments)
    if shutil.which(arguments[0]) is None:
        return f"`{shown}`: {NOT_HERE}"
    started = time.perf_counter()
    status, output = _run(options, arguments, timeout, text)
    seconds = time.perf_counter() - started
    lines = "\n".join(output.splitlines()[-kept:])
    return f"`{shown}`: {status}, {seconds:.1f} s\n\n````text\n{lines}\n````"


def on_a_mac(options: Options, *arguments: str) -> str:
    """Run a command that has a meaning on a Mac only."""
    return command(options, *arguments) if IS_MAC else f"`{shown_command(arguments)}`: {NOT_HERE}"


def python(options: Options, program: str, timeout: float = 3600) -> str:
    """Run a short Python program in the environment of the clone."""
    return command(options, sys.executable, "-c", program, timeout=timeout)


def shown_command(arguments: Sequence[str]) -> str:
    """A command as a person would type it."""
    if tuple(arguments[:3]) == AGENT_MEMORY:
        return " ".join(("agent-memory", *arguments[3:]))
    if arguments[:2] == (sys.executable, "-c"):
        return "python -c ..."
    return " ".join("python" if a == sys.executable else a for a in arguments)


def _run(options: Options, arguments: Sequence[str], timeout: float, text: str) -> tuple[str, str]:
    """How a command ended, and what it printed."""
    # A session of its own, so that what the command has started can be killed with it.
    with subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=options.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(text, timeout=timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return f"stopped after {timeout:.0f} s", output
    return f"exit {process.returncode}", output


# -- the steps ------------------------------------------------------------------------------------------------


def machine(options: Options) -> Iterator[str]:
    """Step 1."""
    yield command(options, *AGENT_MEMORY, "doctor")
    for arguments in (("uname", "-m"), ("make", "--version"), ("git", "log", "-1", "--format=%h %s")):
        yield command(options, *arguments)
    yield on_a_mac(options, "sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize")
    yield on_a_mac(options, "sw_vers")
    yield python(
        options,
        "import os, platform, resource, sqlite3\n"
        "print(platform.machine(), platform.python_version(), sqlite3.sqlite_version, hasattr(os, 'preadv'))\n"
        "print('open files:', resource.getrlimit(resource.RLIMIT_NOFILE))",
    )


def demo(options: Options) -> Iterator[str]:
    """Step 2."""
    yield command(options, *AGENT_MEMORY, "demo", "--picture", str(options.folder / "demo.png"))


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
        "import json\n"
        "from agent_memory_core import AgentMemory\n"
        "with AgentMemory() as memory:\n"
        "    print(memory.chat('Hello.', max_tokens=4).text)\n"
        "    print(json.dumps(memory.stats().to_dict(), indent=1))",
    )


def tests(options: Options) -> Iterator[str]:
    """Step 4."""
    yield command(options, "make", "test", timeout=3 * 3600, kept=300)


def verify(options: Options) -> Iterator[str]:
    """Step 5."""
    yield command(options, *AGENT_MEMORY, "models", "verify", options.model)


def killed(options: Options) -> Iterator[str]:
    """Step 6: five turns, kill -9 in the middle of the fourth."""
    arguments = (*AGENT_MEMORY, "chat", "--model", options.model, "--session", "first-day")
    with Talk(arguments, {**options.environment, "MLX_RESIDENCY_DEBUG": "1"}) as talk:
        for turn in range(1, 4):
            talk.say(f"This is turn {turn}. Tell me about the number {turn + 7}.")
            if not talk.wait(lambda text, turn=turn: text.count("prompt tokens reused") >= turn):  # type: ignore[misc]
                break
        before = len(talk.text)
        talk.say("Tell me a long story.")
        talk.wait(lambda text: len(text) > before + 4)
        talk.kill()
    yield f"killed with SIGKILL in its fourth turn; it had printed:\n\n````text\n{talk.text[-6000:]}\n````"
    yield command(options, *arguments, text="What did I say in turn 3?\n\n")


def memory_curve(options: Options) -> Iterator[str]:
    """Step 7."""
    with subprocess.Popen(
        [sys.executable, "-c", _GROW],
        cwd=ROOT,
        env=options.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        watch = MemoryWatch(process.pid)
        output, _ = process.communicate()
        rows = watch.stop()
    yield f"thirty turns in one process: exit {process.returncode}\n\n````text\n{output[-8000:]}\n````"
    yield "memory of the process, every two seconds:\n\n````text\n" + "\n".join(rows) + "\n````"


_GROW = """
from agent_memory_core import AgentMemory
with AgentMemory() as memory:
    for turn in range(30):
        # Three conversations that take turns, so that memory is taken and given back.
        history = [{"role": "user", "content": f"{turn % 3}: " + "Tell me more about it. " * (20 + 10 * turn)}]
        report = memory.chat(history, session=str(turn % 3), max_tokens=32).report
        if turn % 5 == 4:
            print("turn", turn + 1, report.usage.prompt_tokens, memory.stats().memory, flush=True)
"""


def speed(options: Options) -> Iterator[str]:
    """Step 8."""
    yield command(options, *AGENT_MEMORY, "bench")
    for name in ("ttft", "throughput"):
        out = options.folder / f"{name}.json"
        yield command(options, sys.executable, f"benchmarks/{name}.py", "--out", str(out))
        if out.exists():
            yield f"````json\n{out.read_text(encoding='utf-8')[:20_000]}\n````"


def disk(options: Options) -> Iterator[str]:
    """Step 9."""
    # Steps are independent, so the store may not be there yet.
    yield python(
        options,
        "from agent_memory_core import AgentMemory\n"
        "with AgentMemory() as memory: print(memory.chat('Hello.', session='disk', max_tokens=4).report.persisted)",
    )
    yield on_a_mac(options, "tmutil", "isexcluded", str(options.store))
    yield on_a_mac(options, "xattr", "-l", str(options.store))
    yield on_a_mac(options, "tmutil", "listlocalsnapshots", "/")
    yield command(options, "df", "-h", str(options.folder))
    yield command(options, *AGENT_MEMORY, "check")
    for name in (".DS_Store", "._file"):
        if (options.store / "ns").is_dir():
            (options.store / "ns" / name).touch()
    yield "`.DS_Store` and `._file` are now in the store, as Finder puts them there:"
    yield command(options, *AGENT_MEMORY, "check")


def soak(options: Options) -> Iterator[str]:
    """Step 10: four conversations at once."""
    if options.soak_minutes <= 0:
        yield "left out (`--soak-minutes 0`)"
        return
    seconds = options.soak_minutes * 60
    yield python(options, _SOAK.format(seconds=seconds), timeout=seconds + 3600)
    yield on_a_mac(options, "sh", "-c", "ls -l /Library/Logs/DiagnosticReports/*.panic")
    yield on_a_mac(
        options, "sh", "-c", "log show --last 3h --predicate 'eventMessage CONTAINS \"IOGPU\"' | tail"
    )


_SOAK = """
import json, threading, time
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
    print(json.dumps(memory.stats().to_dict(), indent=1))
"""


STEPS = (
    Step(
        "The machine",
        "On a Mac: arm64 twice, make 3.81 or newer, macOS 14 or newer, True. x86_64 means that Python runs under "
        "Rosetta: install an arm64 Python and begin again.",
        machine,
    ),
    Step("The demo", "Three answers; `resumed` is faster than `cold`. A traceback is a fault.", demo),
    Step(
        "The device",
        "On a Mac: the gpu, the memory of the machine, file system apfs. `budget_bytes` leaves room for the model.",
        device,
    ),
    Step(
        "All tests",
        "Every failure: is it rounding (a gap, one row alone or in a batch) or a fault (files, threads, an abort)?",
        tests,
    ),
    Step(
        "The model compared with itself",
        "The gap and the floor of both comparisons. The model may decode in a batch, and it is stored. Resumed is 0 "
        "for models that keep every token.",
        verify,
    ),
    Step(
        "A conversation that is killed",
        "The last command knows the conversation and reuses its tokens. 'residency set' appears once or never, not "
        "at every turn.",
        killed,
    ),
    Step(
        "Memory over thirty turns",
        "It levels off near the weights plus the budget. Steady growth is a fault; so are wired pages that jump at "
        "every turn.",
        memory_curve,
    ),
    Step("Speed", "hot / floor, resumed / floor, cold / resumed; decode of several against mlx-lm.", speed),
    Step(
        "The disk",
        "On a Mac: the store is excluded from Time Machine. Both checks end with exit 0. Compare what df calls "
        "available with what Finder does: snapshots and purgeable files are the difference.",
        disk,
    ),
    Step(
        "Four conversations at once",
        "Every caller made turns, no panic report, no IOGPU message. Then do by hand: let the Mac sleep for five "
        "minutes in the middle of an answer, pull the charger, wake it; the answer continues.",
        soak,
    ),
)


# -- the program ----------------------------------------------------------------------------------------------


def told_variables() -> list[str]:
    """What of the environment the report tells. It is sent to others, so it must not tell the master key."""
    named = {name: value for name, value in os.environ.items() if name.startswith(("AGENT_MEMORY_", "MLX_"))}
    return [f"{name}={value}" for name, value in sorted(named.items()) if name != "AGENT_MEMORY_KEY"]


def run(options: Options) -> Report:
    """Run the chosen steps, one after the other."""
    report = Report(options.report)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    report.add(
        f"# First day\n\n{now}, {platform.platform()}, model `{options.model}`, "
        f"variables: {', '.join(told_variables()) or 'none'}"
    )
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
    parser.add_argument(
        "--steps", type=numbers, default=f"1-{len(STEPS)}", help="which steps, for example 1-3,5"
    )
    given = parser.parse_args(arguments)
    # Not in the system's temporary folder: Time Machine leaves that out whatever we do, and step 9 would show nothing.
    with tempfile.TemporaryDirectory(prefix=".agent-memory-first-day-", dir=Path.home()) as folder:
        report = run(
            Options(given.model, Path(folder), given.report.resolve(), given.soak_minutes, given.steps)
        )
    print(
        f"done: read {report.path}, then send it back. It holds what commands printed on this machine, with the "
        "conversations of these steps and no others."
    )


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of steps that a text like "1-3,5" names.

    Raises:
        ValueError: the text has another form, or there is no such step.
    """
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    if not found or not set(found) <= set(range(1, len(STEPS) + 1)):
        raise ValueError(f"there are steps 1 to {len(STEPS)}")
    return tuple(found)


if __name__ == "__main__":
    main()
