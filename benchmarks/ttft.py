"""Time to first token of a new 32-token turn in a known conversation, against what the model alone takes.

    floor    mlx-lm evaluates the 32 tokens on a live cache that holds the conversation
    hot      the engine answers in the process that holds the session
    resumed  the engine answers from disk, in a new process where the model is loaded and has said something else
    cold     the engine answers the conversation's first prompt, of which nothing is known

Each sample is another turn of another session, with floors before and after it. Time runs from the engine's
receipt of the request until the first token is sampled; ``outside`` until the caller of a stream has it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import PlainModel, assistant, drop_page_cache, user, write_model
from record import argument_parser, median_of, write_result

from agent_memory_core import AgentMemory

LAYERS, PROMPTS, ANSWER, NEW = 4, (2048, 8192), 16, 32
CODECS: dict[str, Any] = {"6/4": "6/4", "raw": None}
TARGETS = {"hot / floor": "<= 1.25", "resumed / floor": "<= 4.5", "cold / resumed": ">= 9"}
AIMS = {"hot / floor": "<= 1.05", "resumed / floor": "<= 1.25"}
"""What the default codec is to reach; a target is what no codec may miss."""
History = list[dict[str, str]]
Sample = dict[str, Any]


def main() -> None:
    """Measure each codec and write the result file; as a worker, print one resumed sample."""
    parser = argument_parser("ttft", __doc__)
    parser.add_argument("--samples", type=int, default=9, help="hot and resumed samples of each codec")
    parser.add_argument("--worker", action="store_true", help=SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(resumed_turn(**json.load(sys.stdin))))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), LAYERS)
        results = {
            f"{name}, {prompt:,} tokens": measure(
                Path(folder, f"{number} {prompt}"), model, bits, options.samples, prompt
            )
            for prompt in PROMPTS
            for number, (name, bits) in enumerate(CODECS.items())
        }
    settings = {
        "layers": LAYERS,
        "prompts": PROMPTS,
        "answer": ANSWER,
        "new": NEW,
        "targets": TARGETS,
        "aims": AIMS,
    }
    write_result(options.out, settings, results)


def measure(folder: Path, model: str, kv_bits: Any, count: int, prompt: int) -> dict[str, Any]:
    """All samples of one codec and length, their medians, and the ratios of the targets."""
    config = {"model": model, "cache_dir": str(folder), "kv_bits": kv_bits}
    known = prompt + ANSWER
    plain = PlainModel(model, known)
    with AgentMemory(**config) as memory:
        memory.chat("hello", max_tokens=2)
        cold = sample(memory, first_prompt(0, prompt), "cold", prompt)
        histories = [begin(memory, i, prompt) for i in range(2 * count)]
        hot = []
        for number in range(count):
            # Said just before, as in a conversation: other sessions have not displaced it since.
            begin(memory, number, prompt)
            hot.append(
                with_floors(
                    plain, partial(sample, memory, histories[number], f"session {number}", NEW, known)
                )
            )
    resumed = [
        in_new_process(folder, config, histories[i], f"session {i}", known) for i in range(count, 2 * count)
    ]
    assert {s["tier"] for s in hot} == {"hot"}
    assert {s["tier"] for s in resumed} == {"warm"}
    return summary([cold], hot, resumed)


def first_prompt(number: int, prompt: int) -> History:
    """The long first message of a session; those of two sessions differ in the last word."""
    return [user(prompt, seed=0, first=True, ending=number)]


def begin(memory: AgentMemory, number: int, prompt: int) -> History:
    """Start a session, or say the same again; return its history with the model's short answer and a next message."""
    first = first_prompt(number, prompt)
    answer = memory.chat(first, session=f"session {number}", max_tokens=ANSWER, temperature=0)
    assert answer.report.usage.completion_tokens == ANSWER
    return [*first, assistant(answer.text), user(NEW, seed=1 + number, first=False)]


def sample(memory: AgentMemory, history: History, session: str, new: int, known: int = 0) -> Sample:
    """One turn, with its usage checked: so many tokens are new, and so many known."""
    started = time.perf_counter()
    stream = memory.chat(history, session=session, stream=True, max_tokens=ANSWER, temperature=0)
    next(delta for delta in stream if delta.token_ids)
    outside = time.perf_counter() - started
    for _ in stream:
        pass
    report = stream.report
    assert report is not None
    assert report.persisted
    assert report.usage.cache_read == known, report
    assert report.usage.cache_creation == new, report
    return {
        "seconds": report.time_to_first_token,
        "outside": outside,
        "restore": report.restore_seconds,
        "tier": report.hit_tier,
    }


def with_floors(plain: PlainModel, take: Callable[[], Sample]) -> Sample:
    """A sample between two floors on each side."""
    before = [plain.append(NEW) for _ in range(2)]
    taken = take()
    floors = before + [plain.append(NEW) for _ in range(2)]
    return taken | {"floors": floors}


def resumed_turn(config: dict[str, Any], history: History, session: str, known: int) -> Sample:
    """The worker's part: load the model, say something else, then resume."""
    plain = PlainModel(config["model"], known)
    with AgentMemory(**config) as memory:
        memory.chat("hello", max_tokens=2)
        plain.append(NEW)
        return with_floors(plain, partial(sample, memory, history, session, NEW, known))


def in_new_process(
    folder: Path, config: dict[str, Any], history: History, session: str, known: int
) -> Sample:
    """`resumed_turn` in a process of its own, which finds nothing of the store in the system's page cache."""
    dropped = drop_page_cache(folder)
    job = json.dumps({"config": config, "history": history, "session": session, "known": known})
    command = [sys.executable, __file__, "--worker"]
    done = subprocess.run(command, input=job, stdout=subprocess.PIPE, text=True, check=True)
    answer: Sample = json.loads(done.stdout.splitlines()[-1])
    return answer | {"page_cache_dropped": dropped}


def summary(cold: list[Sample], hot: list[Sample], resumed: list[Sample]) -> dict[str, Any]:
    """Medians in seconds; a ratio to the floor is the median of each sample's ratio to its own floors."""
    samples = {"cold": cold, "hot": hot, "resumed": resumed}
    medians = {"floor": median_of([floor for s in hot + resumed for floor in s["floors"]])}
    ratios = {}
    for name, found in samples.items():
        for part in ("seconds", "outside", "restore"):
            medians[name if part == "seconds" else f"{name} {part}"] = median_of([s[part] for s in found])
    for name in ("hot", "resumed"):
        for part, label in (("seconds", name), ("outside", f"{name} outside")):
            ratios[f"{label} / floor"] = median_of([s[part] / median(s["floors"]) for s in samples[name]])
    ratios["cold / resumed"] = round(medians["cold"] / medians["resumed"], 6)
    return {"medians": medians, "ratios": ratios, "samples": samples}


if __name__ == "__main__":
    main()
