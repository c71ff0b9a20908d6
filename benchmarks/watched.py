"""Processes that the first day watches: a conversation that can be killed, and what a process takes of memory."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
IS_MAC = sys.platform == "darwin"


class Talk:
    """A conversation with a command that reads lines and prints as it goes."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def say(self, line: str) -> None:
        """Write one line; a process that has ended hears nothing."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode())

    def wait(self, until: Callable[[str], bool], timeout: float = 600) -> bool:
        """Wait for something in what was printed; return False if the process ends or is too slow."""
        ends = time.monotonic() + timeout
        while time.monotonic() < ends and self._reader.is_alive():
            if until(self.text):
                return True
            time.sleep(0.02)
        return until(self.text)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while part := self._process.stdout.read(4096):
            self.text += part.decode("utf-8", "replace")


class MemoryWatch:
    """Samples what one process takes of memory."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._rows: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> list[str]:
        """One row for each sample."""
        self._ended.set()
        self._thread.join()
        return self._rows

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._rows.append(" ".join(self._sample().split()))
            self._ended.wait(2)

    def _sample(self) -> str:
        if IS_MAC:
            # Unlike the resident size, the footprint counts what the GPU uses.
            footprint = f"footprint -p {self._pid} | grep -m1 -i footprint"
            return _output("sh", "-c", f"{footprint}; vm_stat | grep wired; memory_pressure -Q | tail -1")
        kib = _output("ps", "-o", "rss=", "-p", str(self._pid)).strip()
        return f"{int(kib) // 1024} MiB resident" if kib else "ended"


def _output(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=False).stdout
