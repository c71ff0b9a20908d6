"""The same conversation on every system that a user would pick instead, each in an environment of its own.

    cold      the first token of a prompt of which nothing is known
    hot       the next message of a conversation, in the process that answered before
    fork      another next message, in a copy of the conversation
    known     the first message of a new agent, whose system prompt another agent has
    resumed   the next message after the process was ended and a new one had loaded the model; files are on the disk
    killed    the same after kill -9, right after an answer
    loaded    a next message half a second after a stranger's long cold prompt

Times are from the call to the first token in the caller's hands. Beside each stands what the system's own model takes
for the new tokens alone on a live cache: its floor, taken before and after. Systems take turns, in rotated order.
"""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from common import assistant, drop_page_cache, user, write_model
from record import argument_parser, median_of, write_result
from rival_systems import (
    Answer,
    LlamaServer,
    MlxByHand,
    MlxServer,
    Product,
    Prompt,
    System,
    TransformersByHand,
    VllmMlx,
    clean_environment,
    emptied,
)
from transformers import AutoTokenizer

from agent_memory_core.fast_blas import OPENBLAS_VARIABLE

LAYERS, BUILT = 4, "built"
BLAS = ctypes.util.find_library("openblas")
"""The system's, for all who run MLX: it can be loaded into programs that know nothing of it."""
TARGETS = {
    "answers changed by a restart": "<= 0",
    "tokens computed after a restart": "<= 32",
    "tokens computed after a kill": "<= 32",
}
TIMES = ("cold", "hot", "fork", "known", "resumed", "killed", "loaded")
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "mlx-lm": (f"mlx-lm=={version('mlx-lm')}", f"mlx[cpu]=={version('mlx')}"),
    "transformers": ("torch==2.13.0", f"transformers=={version('transformers')}", "accelerate>=1.0"),
    "llama.cpp": ("xllamacpp>=2026.10", "gguf>=0.17", "safetensors>=0.5", "numpy>=1.26"),
    "vllm-mlx": ("vllm-mlx>=0.6", "mlx[cpu]"),
}
"""What is installed into each environment. On Linux the CPU's build of PyTorch suffices, which is much smaller."""
NOT_WANTED: dict[str, tuple[str, ...]] = {"vllm-mlx": ("torch", "torchvision")}
"""What an environment is better without: where these two do not suit each other, transformers cannot be imported."""

ALONE = "one call runs at a time: a second one waits until the first has ended"
AT_EXIT = "it stores when it is ended as it should be, and not before"
NO_DISK = "it stores nothing on disk"
History = list[dict[str, str]]


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, and how many ask at once."""

    prompt: int = 2048
    system: int = 1024
    new: int = 32
    answer: int = 16
    long: int = 4096
    many: int = 8
    short: int = 64
    decoded: int = 96


QUICK = Sizes(prompt=200, system=150, long=600, many=2, decoded=12)
"""Enough to see that every step runs."""


def main() -> None:
    """Build the environments that lack, replay the script on every system, and write the result file."""
    parser = argument_parser("rivals", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each system replays the script")
    parser.add_argument(
        "--environments", type=Path, default=Path(".venv-rivals"), help="where they are built"
    )
    parser.add_argument("--only", nargs="*", help="names of systems; all by default")
    parser.add_argument("--quick", action="store_true", help="short prompts, to see that every step runs")
    parser.add_argument("--prepare", help=SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        write_model(Path(options.prepare), LAYERS)
        return
    sizes = QUICK if options.quick else Sizes()
    environments = options.environments.resolve()
    lacking = {
        name: reason for name in ENVIRONMENTS if (reason := build(environments / name, ENVIRONMENTS[name]))
    }
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder, "model"))
        # Whoever starts other processes has not run MLX itself.
        subprocess.run([sys.executable, __file__, "--prepare", model], check=True)
        systems = [
            system
            for system in all_systems(environments, model)
            if _runs(system) and (not options.only or system.name in options.only)
        ]
        settings = asdict(sizes) | {
            "systems": {
                system.name: {"settings": system.settings, "cannot": system.cannot} for system in systems
            },
            "blas": BLAS,
            "lacking": lacking,
            "targets": TARGETS,
        }
        # After each replay, so that a run that is broken off was not for nothing.
        for found in rounds(systems, Path(folder), Script(model), sizes, options.rounds):
            load = [round(load, 1) for load in os.getloadavg()]
            write_result(options.out, settings | {"load": load}, summary(found))


def build(folder: Path, requirements: Sequence[str]) -> str | None:
    """Make an environment if there is none; return why it could not be made."""
    if (folder / BUILT).exists():
        return None
    print(f"installing {' '.join(requirements)} into {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "install", *requirements], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    if unwanted := NOT_WANTED.get(folder.name):
        subprocess.run([*pip, "uninstall", "--yes", *unwanted], check=True)
    (folder / BUILT).touch()
    return None


def _runs(system: System) -> bool:
    return system.python == Path(sys.executable) or (system.python.parents[1] / BUILT).exists()


def all_systems(environments: Path, model: str) -> list[System]:
    """Every system, ours first, with its settings."""

    def python(name: str) -> Path:
        return environments / name / "bin" / "python"

    def mlx(path: Path) -> dict[str, str]:
        """With the same BLAS as ours: with the one of MLX's own wheel it would be slower."""
        return clean_environment(path, **({"LD_PRELOAD": BLAS} if BLAS else {}))

    ours = Path(sys.executable)
    own = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    own |= {OPENBLAS_VARIABLE: BLAS or "off"}
    by_hand = python("mlx-lm")
    systems: list[System] = [
        Product("agent-memory", ours, model, own, "defaults: keys in 6 bits, values in 4, each turn on disk"),
        Product(
            "agent-memory, raw", ours, model, own, "kv_bits=None: as the model made it, like its rivals here"
        ),
        MlxByHand(
            "mlx-lm by hand",
            by_hand,
            model,
            mlx(by_hand),
            "generate_step on a cache that the caller keeps; deepcopy; save_prompt_cache after each turn, not timed",
            {"loaded": ALONE},
        ),
        MlxServer(
            "mlx_lm.server",
            by_hand,
            model,
            mlx(by_hand),
            "--prompt-cache-size 64, since the 10 of its default would evict",
            {"stored": NO_DISK, "written": NO_DISK},
            by_ids=False,
        ),
        TransformersByHand(
            "transformers by hand",
            python("transformers"),
            model,
            clean_environment(python("transformers")),
            "PyTorch on the CPU, sdpa, a DynamicCache that the caller keeps; deepcopy; torch.save after each turn, "
            "not timed, and torch.load with mmap",
            {"loaded": ALONE},
        ),
        LlamaServer(
            "llama-server",
            python("llama.cpp"),
            model,
            clean_environment(python("llama.cpp")),
            "8 slots, 2 threads, KV in 16 bits as by default, which is half of the others' bytes; slots are chosen, "
            "saved after each turn, not timed, and restored by the caller",
        ),
        VllmMlx(
            "vllm-mlx",
            python("vllm-mlx"),
            model,
            mlx(python("vllm-mlx")),
            "--continuous-batching --ssd-cache-dir",
            {"stored": AT_EXIT, "written": AT_EXIT},
            by_ids=False,
        ),
    ]
    for system, bits in zip(systems, ("6/4", "raw"), strict=False):
        assert isinstance(system, Product)
        system.arguments = (bits,)
    return systems


class Script:
    """Makes the prompts of a round: no two rounds and no two conversations have words in common."""

    def __init__(self, model: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(self, messages: History) -> list[int]:
        """The token ids of a prompt that asks for an answer."""
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def first(self, session: str, messages: History) -> Prompt:
        """The first prompt of a conversation."""
        return Prompt(session, messages, self.ids(messages))

    def next(
        self, asked: Prompt, answer: Answer, message: dict[str, str], session: str | None = None
    ) -> Prompt:
        """The prompt after an answer: what was answered stands in it as it was, token by token."""
        ids = answer.get("ids")
        text = answer["text"] if "text" in answer else self._tokenizer.decode(ids)
        messages = [*asked.messages, assistant(text), message]
        new = ids if ids is not None else []
        return Prompt(session or asked.session, messages, [*asked.ids, *new, *self._after(message)])

    def _after(self, message: dict[str, str]) -> list[int]:
        mark = "MARK"
        around = [user(20, 0, first=True), assistant(mark), message]
        text = self._tokenizer.apply_chat_template(around, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer.encode(text.partition(mark)[2], add_special_tokens=False))


def rounds(
    systems: Sequence[System], folder: Path, script: Script, sizes: Sizes, count: int
) -> Iterator[dict[str, list[Any]]]:
    """Let the systems replay the script in turns; after each replay, all that was found so far.

    Raises:
        RuntimeError: a system failed, with the end of what it said.
    """
    found: dict[str, list[Any]] = {system.name: [] for system in systems}
    mlx = next(system for system in systems if isinstance(system, MlxByHand))
    floor = MlxByHand("floor", mlx.python, mlx.model, mlx.environment, "")
    floor.start(emptied(folder / "floor"))
    try:
        for number in range(count):
            turned = number % len(systems)
            for system in [*systems[turned:], *systems[:turned]]:
                started = time.monotonic()
                try:
                    one = Round(system, script, sizes, floor, emptied(folder / "disk"), number)
                    found[system.name].append(one.replay())
                finally:
                    if system.process is not None:
                        system.stop(kill=True)
                print(f"round {number}, {system.name}: {time.monotonic() - started:.0f} s", flush=True)
                yield found
    finally:
        floor.stop(kill=True)


class Round:
    """One replay of the script by one system."""

    def __init__(
        self, system: System, script: Script, sizes: Sizes, floor: MlxByHand, disk: Path, number: int
    ) -> None:
        self.system, self.script, self.disk = system, script, disk
        self._sizes, self._floor = sizes, floor
        self._seed = 1000 * (number + 1)
        self.found: dict[str, Any] = {"times": {name: [] for name in TIMES}}

    def replay(self) -> dict[str, Any]:
        """All steps; return what was measured."""
        self._start()
        asked, answer = self._begin()
        asked, answer = self._go_on(asked, answer)
        self._known_prompt()
        asked, answer = self._restart(asked, answer)
        self._speeds()
        if "loaded" not in self.system.cannot:
            self._under_load(asked, answer)
        return self.found

    def _start(self) -> None:
        started = time.perf_counter()
        self.system.start(self.disk)
        self.found.setdefault("start", time.perf_counter() - started)

    def _timed(self, name: str, known: int, do: Callable[..., Answer], *asked: Prompt | str) -> Answer:
        """A sample between two floors. The system's own model gives them where it can be asked apart."""
        tokens = self._sizes.answer
        if name == "cold":
            answer, floors = do(*asked, tokens), []
        else:
            before = self._floor_seconds(known)
            answer = do(*asked, tokens)
            own = self.system.floor(answer)
            floors = [own] if own is not None else [before, self._floor_seconds(known)]
        floor = median(floors) if floors else None
        sample = {"seconds": answer["first"], "floor": floor, "computed": answer["computed"]}
        self.found["times"][name].append(sample)
        return answer

    def _floor_seconds(self, known: int) -> float:
        asked = self.system if isinstance(self.system, TransformersByHand) else self._floor
        return float(asked.ask("floor", known=known, new=self._sizes.new))

    def _message(self) -> dict[str, str]:
        self._seed += 1
        return user(self._sizes.new, self._seed, first=False)

    def _begin(self) -> tuple[Prompt, Answer]:
        before = self.system.stored()
        asked = self.script.first("ada", [user(self._sizes.prompt, self._seed, first=True)])
        answer = self._timed("cold", 0, self.system.turn, asked)
        self.system.save("ada")
        self.found["stored"] = self.system.stored() - before
        return asked, answer

    def _go_on(self, asked: Prompt, answer: Answer) -> tuple[Prompt, Answer]:
        """Two hot turns, and what the second one writes."""
        for _ in range(2):
            before = self.system.written()
            known = len(asked.ids) + self._sizes.answer
            asked = self.script.next(asked, answer, self._message())
            answer = self._timed("hot", known, self.system.turn, asked)
            self.system.save("ada")
            self.found["written"] = self.system.written() - before
        return asked, answer

    def _known_prompt(self) -> None:
        words = user(self._sizes.system, self._seed, first=True)["content"]
        first, second = (
            self.script.first(name, [{"role": "system", "content": words}, self._message()])
            for name in ("bob", "cyd")
        )
        self.system.turn(first, self._sizes.answer)
        self._timed("known", self._sizes.system, self.system.known, second, "bob")

    def _restart(self, asked: Prompt, answer: Answer) -> tuple[Prompt, Answer]:
        """Ask a question in a fork; after a restart ask another, which nobody knows, and the first again; then kill."""
        question = self._message()
        known = len(asked.ids) + self._sizes.answer
        forked = self.script.next(asked, answer, question, "ada.fork")
        before = self._timed("fork", known, self.system.fork, forked, "ada")
        self._end(kill=False)
        other = self.script.next(asked, answer, self._message())
        self._timed("resumed", known, self.system.resume, other)
        again = self.script.next(asked, answer, question)
        after = self.system.resume(again, self._sizes.answer)
        self.system.save("ada")
        self.found["changed"] = changed(before, after)
        self._end(kill=True)
        last = self.script.next(again, after, self._message())
        known += self._sizes.new + self._sizes.answer
        return last, self._timed("killed", known, self.system.resume, last)

    def _end(self, *, kill: bool) -> None:
        self.system.stop(kill=kill)
        drop_page_cache(self.disk)
        self._start()

    def _speeds(self) -> None:
        for count in (1, self._sizes.many):
            prompts = []
            for number in range(count):
                self._seed += 1
                name = f"many.{count}.{number}"
                prompts.append(self.script.first(name, [user(self._sizes.short, self._seed, first=True)]))
            self.found[f"decode {count}"] = self.system.many(prompts, self._sizes.decoded)

    def _under_load(self, asked: Prompt, answer: Answer) -> None:
        warm = self.script.next(asked, answer, self._message())
        known = len(asked.ids) + self._sizes.answer
        cold = self.script.first("eve", [user(self._sizes.long, self._seed + 500, first=True)])
        self._timed("loaded", known, self.system.under_load, cold, warm)


def changed(before: Answer, after: Answer) -> bool:
    """Whether an answer is not the one that was given to the same question before."""
    part = "ids" if "ids" in before else "text"
    return bool(before[part] != after[part])


def summary(found: dict[str, list[Any]]) -> dict[str, Any]:
    """Medians of all rounds, and of each sample's ratio to its own floor and of the time above it."""
    return {name: _summary(each) | {"rounds": each} for name, each in found.items() if each}


def _summary(found: list[Any]) -> dict[str, Any]:
    times: dict[str, dict[str, float]] = {}
    for name in TIMES:
        samples = [sample for each in found for sample in each["times"][name]]
        if not samples:
            continue
        times[name] = {"seconds": median_of([s["seconds"] for s in samples])}
        if samples[0]["computed"] is not None:
            times[name]["computed"] = median([s["computed"] for s in samples])
        if samples[0]["floor"] is not None:
            times[name] |= {
                "floor": median_of([s["floor"] for s in samples]),
                "ratio": median_of([s["seconds"] / s["floor"] for s in samples]),
                "above": median_of([s["seconds"] - s["floor"] for s in samples]),
            }
    counts = sorted(int(name.split()[1]) for name in found[0] if name.startswith("decode "))
    parts = ("stored", "written", "start")
    rates = {
        f"{part} {count}": median_of([each[f"decode {count}"][part] for each in found])
        for count in counts
        for part in ("decode", "whole")
    }
    kept = {part: median_of([each[part] for each in found]) for part in parts}
    return {"times": times, "rates": rates, **kept, "changed": sum(each["changed"] for each in found)}


if __name__ == "__main__":
    main()
