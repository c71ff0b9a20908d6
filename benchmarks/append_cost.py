"""What a 32-token turn costs as its conversation grows: seconds, bytes written and blocks hashed.

A turn's seconds run from the request until it is on disk, and part into what the model alone takes for the same
tokens on a live cache (``floor``), restoring the conversation from memory (``restore``), and the ``rest``:
matching, sealing, saving. The *naive* way to keep a conversation is to write all of it after each turn with
mlx-lm's `save_prompt_cache` and to load it before the next.

Lengths take turns, so that a busy moment of the machine falls on all of them. A slope is that of the line of
least squares through the medians, per 1,024 tokens, as a part of the median at the shortest length.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import linear_regression
from typing import Any
from unittest import mock

import mlx.core as mx
from common import PlainModel, argument_parser, assistant, median_of, user, words, write_model, write_result
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from agent_memory_core import AgentMemory, block

LAYERS, NEW, NEXT_FRAME, FIRST_FRAME = 2, 32, 10, 8
LENGTHS = (512, 1024, 2048, 4096, 8192)
PER = 1024
History = list[dict[str, str]]
Sample = dict[str, float]


def main() -> None:
    """Measure every length and write the result file."""
    parser = argument_parser("append_cost", __doc__)
    parser.add_argument("--samples", type=int, default=7, help="turns of each length")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), LAYERS)
        plain = {length: PlainModel(model, length) for length in LENGTHS}
        with AgentMemory(model=model, cache_dir=Path(folder, "store")) as memory:
            sessions = {length: Conversation(memory, length) for length in LENGTHS}
            for length in LENGTHS:
                sample(sessions[length], plain[length], Path(folder))
            samples: dict[int, list[Sample]] = {length: [] for length in LENGTHS}
            for _ in range(options.samples):
                for length in LENGTHS:
                    samples[length].append(sample(sessions[length], plain[length], Path(folder)))
    write_result(options.out, {"layers": LAYERS, "new": NEW, "lengths": LENGTHS, "per": PER}, summary(samples))


class Conversation:
    """A session of some length that is continued by turns of equal size."""

    def __init__(self, memory: AgentMemory, length: int) -> None:
        self.memory = memory
        self.session = f"{length} tokens"
        self.history = [user(words(length - FIRST_FRAME, seed=0))]
        self._answer()

    def turn(self) -> Sample:
        """Say something new; the answer is one token long."""
        self.history.append(user(words(NEW - NEXT_FRAME, seed=len(self.history))))
        store, sealed = self._store_bytes(), self.memory.stats()["blocks_sealed"]
        with mock.patch.object(block, "hashlib", CountingHashes()) as hashes:
            started = time.perf_counter()
            report = self._answer()
            seconds = time.perf_counter() - started
        assert report.persisted
        assert report.usage.cache_creation == NEW, report
        assert report.hit_tier == "hot"
        return {
            "seconds": seconds,
            "restore": report.restore_seconds,
            "first_token": report.time_to_first_token,
            "bytes": self._store_bytes() - store,
            "hashed": hashes.count,
            "sealed": self.memory.stats()["blocks_sealed"] - sealed,
        }
