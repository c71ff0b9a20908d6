"""What encryption at rest costs: the records of a long prompt are saved and loaded, with and without it.

    save      commit all records of the turn to a new store
    load      read, verify and open them, into arrays as the engine allocates them

This is the store alone; computing the prompt and building the live cache take the same time with and without. The two
take turns, so that a busy moment of the machine falls on both. What is read is in the system's page cache: a drive
would add the same to both, so these ratios are the worst there are.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import user, write_model
from record import argument_parser, median_of, write_result

from agent_memory_core import AgentMemory
from agent_memory_core.config import Encryption
from agent_memory_core.engine.block_io import allocate
from agent_memory_core.storage.block_store import BlockStore
from agent_memory_core.storage.branches import BranchCommit, BranchRow
from agent_memory_core.storage.record import HostTensor, Record

LAYERS, TOKENS, QUOTA = 2, 2048, 2**40
SETTINGS: dict[str, Encryption] = {"off": "off", "on": "env"}
CODECS: dict[str, Any] = {"6/4": "6/4", "none": None}
TARGETS = {"save": "<= 2", "load": "<= 2"}
SIZES = {"U32": 4, "U8": 1, "BF16": 2, "F32": 4, "I32": 4}
Sample = dict[str, float]


def main() -> None:
    """Measure both codecs and write the result file."""
    parser = argument_parser("encryption", __doc__)
    parser.add_argument("--samples", type=int, default=40, help="stores of each kind")
    options = parser.parse_args()
    os.environ["AGENT_MEMORY_KEY"] = secrets.token_hex(32)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), LAYERS)
        for codec, kv_bits in CODECS.items():
            turn = Turn(model, Path(folder, codec.replace("/", "-")), kv_bits)
            samples: dict[str, list[Sample]] = {name: [] for name in SETTINGS}
            for _ in range(1 + options.samples):
                for name, setting in SETTINGS.items():
                    samples[name].append(turn.measure(Path(folder, "store"), setting))
            # The first round warms up.
            results[codec] = summary({name: found[1:] for name, found in samples.items()}, turn.nbytes)
    write_result(options.out, {"layers": LAYERS, "tokens": TOKENS, "targets": TARGETS}, results)


class Turn:
    """One turn of an engine, with all records that it stored."""

    def __init__(self, model: str, path: Path, kv_bits: Any) -> None:
        with AgentMemory(model=model, cache_dir=path, kv_bits=kv_bits, batching="never") as memory:
            memory.chat([user(TOKENS, 0, first=True)], session="s", max_tokens=1)
        store = BlockStore(path, quota_bytes=QUOTA)
        self._row: BranchRow = store.catalog.branches.of_session("default", "s")[0]
        keys = store.catalog.records.keys()
        found = [store.load(self._row.root, key, _host) for key in keys]
        self._records: list[Record[HostTensor]] = [record for record in found if record is not None]
        self.nbytes = sum(record.nbytes for record in self._records)
        store.close()

    def measure(self, path: Path, encryption: Encryption) -> Sample:
        """Save the turn in a new store and load it again."""
        row = self._row
        store = BlockStore(path, quota_bytes=QUOTA, encryption=encryption)
        store.identify(row.root, {"namespace": row.namespace}, row.namespace)
        # The key is made here, once for a namespace.
        store.catalog.records.cipher(row.root).seal("a key", b"is made")
        commit = BranchCommit(
            row.root, row.namespace, "s", None, 0, row.head, row.tail, row.tokens, row.prompt_tokens, ""
        )
        started = time.perf_counter()
        store.commit(self._records, commit)
        saved = time.perf_counter()
        loaded = [store.load(row.root, record.key, allocate) for record in self._records]
        sample = {"save": saved - started, "load": time.perf_counter() - saved}
        assert None not in loaded
        store.close()
        shutil.rmtree(path)
        return sample


def _host(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[HostTensor, memoryview]]:
    """Tensors in plain memory, and their bytes."""
    views = [memoryview(np.zeros(SIZES[dtype] * int(np.prod(shape)), np.uint8)) for dtype, shape in tensors]
    return [(HostTensor(*tensor, view), view) for tensor, view in zip(tensors, views, strict=True)]


def summary(samples: dict[str, list[Sample]], nbytes: int) -> dict[str, Any]:
    """The medians with and without, and their ratios."""
    medians = {
        name: {part: median_of([sample[part] for sample in found]) for part in TARGETS}
        for name, found in samples.items()
    }
    ratios = {part: round(medians["on"][part] / medians["off"][part], 4) for part in TARGETS}
    return {"bytes": nbytes, "medians": medians, "ratios": ratios, "samples": samples}


if __name__ == "__main__":
    main()
