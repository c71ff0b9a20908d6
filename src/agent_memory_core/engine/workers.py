"""Threads that do jobs for the engine's thread."""

from __future__ import annotations

import ctypes
import gc
import logging
import queue
import threading
from collections.abc import Callable

import mlx.core as mx

log = logging.getLogger("agent_memory")


class Worker:
    """Daemon threads that take jobs from one queue until they are told to stop."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Callable[[], None]) -> bool:
        """Queue a job, and say whether it will be done: after `close`, none is."""
        with self._closing:
            if not self._closed:
                self._jobs.put(job)
            return not self._closed

    def close(self) -> None:
        """Finish all jobs and end the threads."""
        with self._closing:
            self._closed = True
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                # The thread's outermost loop: one fault must not end it and leave every later turn waiting.
                log.exception("%s met a fault", threading.current_thread().name)
        leave_mlx()


def leave_mlx() -> None:
    """Prepare the end of this thread: one that ran MLX and simply ends aborts the process at exit."""
    mx.synchronize()
    mx.clear_streams()


def free_mlx() -> None:
    """Give the memory of what this thread has let go of back to the machine: cycles hold arrays, MLX freed buffers."""
    gc.collect()
    mx.clear_cache()
    # Where MLX runs on the CPU, weights come from malloc, and glibc keeps what was freed in one arena for each thread.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
