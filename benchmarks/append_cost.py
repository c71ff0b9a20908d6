"""What a 32-token turn costs as its conversation grows: seconds, bytes written, blocks hashed.

    floor    mlx-lm evaluates the 32 tokens on a live cache of that length: attention alone makes it grow
    restore  the engine builds the live cache from blocks in memory
    prefill  the rest of the engine's time to first token
    finish   from the first token of two until the turn is on disk and the caller has the answer
    naive    mlx-lm saves its whole cache after the turn with `save_prompt_cache`, and loads it before the next

Lengths take turns, so that a busy moment of the machine falls on all of them. A slope is that of the line of
least squares, per 1,024 tokens of conversation, as a part of what it is at 512.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import linear_regression, mean
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
from common import PlainModel, assistant, user, write_model
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from record import argument_parser, median_of, write_result

from agent_memory_core import AgentMemory, TurnReport
from agent_memory_core.blocks import block

LAYERS, NEW, ANSWER = 2, 32, 2
LENGTHS = (512, 1024, 2048, 4096, 8192)
TARGETS = {"bytes": "<= 0.01", "hashes": "<= 0.01"}
COUNTS = {"bytes", "hashes", "naive bytes"}
Sample = dict[str, float]


def main() -> None:
    """Measure every length and write the result file."""
    parser = argument_parser("append_cost", __doc__)
    parser.add_argument("--samples", type=int, default=9, help="turns of each length")
    options = parser.parse_args()
    samples: dict[int, list[Sample]] = {length: [] for length in LENGTHS}
    with tempfile.TemporaryDirectory() as folder:
        model, file = write_model(Path(folder, "model"), LAYERS), Path(folder, "all.safetensors")
        plain = {length: PlainModel(model, length) for length in LENGTHS}
        with AgentMemory(model=model, cache_dir=Path(folder, "store")) as memory:
            conversations = {length: Conversation(memory, length) for length in LENGTHS}
            for _ in range(1 + options.samples):
                for length in LENGTHS:
                    samples[length].append(conversations[length].turn() | naive(plain[length], file))
    settings = {"layers": LAYERS, "new": NEW, "answer": ANSWER, "lengths": LENGTHS, "targets": TARGETS}
    # The first round warms up.
    write_result(options.out, settings, summary({length: found[1:] for length, found in samples.items()}))


class Conversation:
    """A session that begins with a prompt of some length and goes on by turns of equal size."""

    def __init__(self, memory: AgentMemory, length: int) -> None:
        self._memory = memory
        self._session = f"{length} tokens"
        # All begin alike, so that each length computes only what the one before it did not.
        self._history = [user(length, seed=0, first=True)]
        self._answer()

    def turn(self) -> Sample:
        """Say something new and hear a short answer."""
        self._history.append(user(NEW, seed=len(self._history), first=False))
        with counted() as counts:
            started = time.perf_counter()
            report = self._answer()
            seconds = time.perf_counter() - started
        assert report.persisted
        assert report.hit_tier == "hot"
        assert report.usage.cache_creation == NEW, report
        return {
            "turn": seconds,
            "restore": report.restore_seconds,
            "prefill": report.time_to_first_token - report.restore_seconds,
            "finish": seconds - report.time_to_first_token,
            "bytes": counts["bytes"],
            "hashes": counts["hashes"],
        }

    def _answer(self) -> TurnReport:
        answer = self._memory.chat(self._history, session=self._session, max_tokens=ANSWER, temperature=0)
        self._history.append(assistant(answer.text))
        return answer.report


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the names of blocks and tails that are hashed, and the bytes that go into their files."""
    counts = {"bytes": 0, "hashes": 0}
    writev = os.writev

    def counting_sha256(data: bytes) -> Any:
        counts["hashes"] += 1
        return hashlib.sha256(data)

    def counting_writev(fd: int, buffers: Any) -> int:
        written = writev(fd, buffers)
        counts["bytes"] += written
        return written

    sha256 = SimpleNamespace(sha256=counting_sha256)
    with mock.patch.object(block, "hashlib", sha256), mock.patch.object(os, "writev", counting_writev):
        yield counts


def naive(plain: PlainModel, path: Path) -> Sample:
    """The floor, and what mlx-lm takes to save and load the whole cache."""
    floor, started = plain.append(NEW), time.perf_counter()
    save_prompt_cache(str(path), plain.cache)
    saved = time.perf_counter()
    mx.eval([layer.state for layer in load_prompt_cache(str(path))])
    times = {"floor": floor, "naive save": saved - started, "naive load": time.perf_counter() - saved}
    return times | {"naive bytes": path.stat().st_size}


def summary(samples: dict[int, list[Sample]]) -> dict[str, Any]:
    """Each length's median seconds and mean counts (a block is not full at every turn), and their slopes."""
    names = list(samples[LENGTHS[0]][0])
    middles: dict[int, Sample] = {}
    for length, found in samples.items():
        columns = {name: [sample[name] for sample in found] for name in names}
        middles[length] = {
            name: round(mean(values)) if name in COUNTS else median_of(values)
            for name, values in columns.items()
        }
    slopes = {}
    for name in names:
        values = [middles[length][name] for length in LENGTHS]
        slopes[name] = round(linear_regression(LENGTHS, values).slope * 1024 / values[0], 6)
    return {"middles": middles, "slopes": slopes, "samples": samples}


if __name__ == "__main__":
    main()
