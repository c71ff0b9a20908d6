"""Each worker of xdist keeps to a core of its own.

MLX on a CPU hands every operation to the thread of its stream, and wakes it for each. With tiny models that is most of
the work. On one core the stream's thread runs when its queue is long; on two, each operation wakes a sleeping core and
the two threads wait for one lock: the same tests took 1.3 times as long, and 1.25 times the time of the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_ALL = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def keep_to_one(worker: str) -> None:
    """Keep this process, and what it starts, to the core of a worker (``gw0``, ``gw1``); an empty name changes nothing.

    Called before anything has started a thread: a thread keeps to the cores of the one that started it.
    """
    if worker and _ALL:
        # A second thread of OpenBLAS would wait for its part on the core of another worker, and keep it busy.
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        os.sched_setaffinity(0, {sorted(_ALL)[int(worker.removeprefix("gw")) % len(_ALL)]})


@contextmanager
def on_all() -> Iterator[None]:
    """Inside, threads and processes that are started run at the same time, as far as the machine has cores."""
    if not _ALL:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _ALL)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
