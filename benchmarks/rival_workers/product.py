"""agent-memory in process, as its users call it: whole histories, a session id, a stream."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from protocol import Clock, serve

from agent_memory_core import AgentMemory

Messages = list[dict[str, str]]


class Product:
    """A memory, and its sessions by name."""

    def __init__(self, model: str, disk: str, kv_bits: str) -> None:
        bits: Any = None if kv_bits == "raw" else kv_bits
        self.memory = AgentMemory(model=model, cache_dir=disk, kv_bits=bits)

    def turn(self, session: str, messages: Messages, tokens: int, of: str | None = None) -> dict[str, Any]:
        """Answer a history; with ``of``, in a fork of that session, which is made first."""
        clock = Clock()
        if of is not None:
            self.memory.fork(of, session)
        answer: list[int] = []
        text = ""
        stream = self.memory.chat(messages, session=session, stream=True, max_tokens=tokens, temperature=0)
        for delta in stream:
            text += delta.text
            for token in delta.token_ids:
                clock.token()
                answer.append(int(token))
        report = stream.report
        assert report is not None
        assert report.persisted
        return clock.turn(answer) | {"text": text, "computed": report.usage.cache_creation}

    def many(self, prompts: list[Messages], tokens: int, name: str) -> dict[str, float]:
        """Tokens per second of several prompts at once: while all decode, and with prefill."""
        turns: list[dict[str, Any]] = [{} for _ in prompts]

        def run(number: int) -> None:
            turns[number] = self.turn(f"{name}.{number}", prompts[number], tokens)

        started = time.perf_counter()
        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        opened = max(turn["first"] for turn in turns)
        # What comes with the last delta waits for the turn to be stored.
        closed = min(turn["arrivals"][-2] for turn in turns)
        count = sum(opened < at <= closed for turn in turns for at in turn["arrivals"])
        return {"decode": count / (closed - opened), "whole": len(prompts) * tokens / seconds}

    def under_load(self, cold: dict[str, Any], warm: dict[str, Any], after: float) -> dict[str, Any]:
        """A turn that is asked for a moment after a stranger's long prompt."""
        stranger = threading.Thread(target=self.turn, kwargs=cold)
        stranger.start()
        time.sleep(after)
        found = self.turn(**warm)
        stranger.join()
        return found

    def close(self) -> None:
        """End as a program does."""
        self.memory.close()


if __name__ == "__main__":
    serve(Product(*sys.argv[1:]))
