"""Resuming a session from the object store on a machine that has never seen it, beside computing its prompt there.

    prefill    the first token of a long prompt that nobody has computed
    cold       the first token of the same prompt plus a short message, of a session that lies in the object store only

The object store is memory in this process, behind a link whose latency and bandwidth are injected: each request waits
for the latency, and the bytes of all requests share the bandwidth. Both are seconds as the caller sees them, with the
model loaded. ``cold / prefill`` is what resuming takes of the time that it saves; the smaller the faster the link is
beside the model. How many bytes a token has, and how fast a machine computes, differ between models: the ratio at other
places follows from bytes, bandwidth, latency and prefill rate.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import assistant, user, write_model
from obstore.store import MemoryStore
from record import argument_parser, median_of, write_result

from agent_memory_core import AgentMemory
from agent_memory_core.storage.cold.tier import ColdTier

LAYERS, NEW, ANSWER = 4, 32, 2
LENGTHS = (512, 2048)
LINKS = {
    "10 Gbit/s, 10 ms": (1.25e9, 0.01),
    "1 Gbit/s, 30 ms": (1.25e8, 0.03),
    "200 Mbit/s, 100 ms": (2.5e7, 0.1),
}
TARGETS = {"cold / prefill": "<= 0.5"}
STATED = "1 Gbit/s, 30 ms"
"""The link that the target speaks of."""


class Link:
    """A store of obstore behind a network.

    Args:
        bucket: the store.
        bandwidth: bytes a second of all requests together.
        latency: seconds before each answer begins.
    """

    def __init__(self, bucket: Any, bandwidth: float, latency: float) -> None:
        self._bucket, self._bandwidth, self._latency = bucket, bandwidth, latency
        self._free = 0.0

    async def get_async(self, path: str, **options: Any) -> Any:
        """Read an object."""
        found = await self._bucket.get_async(path, **options)
        await self._carry(found.meta["size"])
        return found

    async def head_async(self, path: str) -> Any:
        """Look at an object."""
        await self._carry(0)
        return await self._bucket.head_async(path)

    async def put_async(self, path: str, data: Any, **options: Any) -> Any:
        """Write an object."""
        await self._carry(sum(len(part) for part in data))
        return await self._bucket.put_async(path, data, **options)

    async def _carry(self, nbytes: int) -> None:
        now = time.monotonic()
        self._free = max(self._free, now + self._latency) + nbytes / self._bandwidth
        await asyncio.sleep(self._free - now)


def main() -> None:
    """Measure all lengths and links and write the result file."""
    parser = argument_parser("cold", __doc__)
    parser.add_argument("--samples", type=int, default=3, help="sessions of each length and link")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), LAYERS)
        results = {f"{tokens}": measure(Path(folder), model, tokens, options.samples) for tokens in LENGTHS}
    settings = {"layers": LAYERS, "new": NEW, "link of the target": STATED, "targets": TARGETS}
    write_result(options.out, settings, results)


def measure(folder: Path, model: str, tokens: int, count: int) -> dict[str, Any]:
    """The medians of one length: of prefilling, and of resuming over each link.

    They take turns, so that a busy moment of the machine falls on all of them.
    """
    bucket = MemoryStore()
    samples: dict[str, list[float]] = {name: [] for name in ("prefill", *LINKS)}
    with ExitStack() as stack:
        here = stack.enter_context(opened(folder / f"{tokens} here", model, bucket))
        links = {
            name: stack.enter_context(opened(folder / f"{tokens} {name}", model, Link(bucket, *link)))
            for name, link in LINKS.items()
        }
        for number in range(1 + count):
            first, session = [user(tokens, seed=number, first=True)], f"session {number}"
            seconds, text = timed(here, first, session, ANSWER)
            samples["prefill"].append(seconds)
            assert here.cold.flush(60.0)
            history = [*first, assistant(text), user(NEW, seed=1 + number, first=False)]
            # Whoever comes first after a prefill waits longer.
            turn = number % len(links)
            for name, there in [*links.items()][turn:] + [*links.items()][:turn]:
                samples[name].append(timed(there, history, session, 1)[0])
                assert there.cold.status().pulled == 1 + number
        nbytes = here.cold.status().uploaded_bytes // (1 + count)
    # The first session of each warms up.
    medians = {name: median_of(found[1:]) for name, found in samples.items()}
    prefill = medians.pop("prefill")
    return {
        "bytes of a session": nbytes,
        "prefill": prefill,
        "links": medians,
        "ratios": {name: round(seconds / prefill, 4) for name, seconds in medians.items()},
    }


def opened(folder: Path, model: str, bucket: Any) -> AgentMemory:
    """A memory with its model loaded and a cold tier in a bucket."""
    memory = AgentMemory(
        model=model, cache_dir=folder, cold_url="memory://bench", min_free_mb=0, batching="never"
    )
    memory.load()
    store = memory._required_store()
    store.mirror.close()
    store.mirror = ColdTier(store, bucket, timeout=120.0)
    return memory


def timed(memory: AgentMemory, history: Any, session: str, answer: int) -> tuple[float, str]:
    """Seconds until the first token as the caller sees it, and the answer."""
    started = time.perf_counter()
    stream = memory.chat(history, session=session, stream=True, max_tokens=answer, temperature=0)
    text = ""
    seconds = 0.0
    for delta in stream:
        seconds = seconds or time.perf_counter() - started
        text += delta.text
    return seconds, text


if __name__ == "__main__":
    main()
