"""transformers on PyTorch, by hand: a DynamicCache in a variable for each conversation, saved with torch.save."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from protocol import Clock, common_prefix, serve
from transformers import AutoModelForCausalLM, DynamicCache


class ByHand:
    """Conversations by name: their tokens and their caches."""

    def __init__(self, model: str, disk: str) -> None:
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model.eval()
        self.disk = Path(disk)
        self._held: dict[str, tuple[list[int], Any]] = {}

    def turn(
        self, session: str, ids: list[int], tokens: int, of: str | None = None, restore: bool = False
    ) -> Any:
        """Answer a prompt on the session's own cache, a copy of another's, or one from a file."""
        clock = Clock()
        known, cache = self._restored(session) if restore else self._begin(session, of)
        kept = min(common_prefix(known, ids), len(ids) - 1)
        if kept < len(known):
            cache.crop(kept - len(known))
        answer: list[int] = []
        new = ids[kept:]
        while len(answer) < tokens:
            new = [int(self._logits([new], cache).argmax())]
            clock.token()
            answer += new
        self._held[session] = ([*ids, *answer[:-1]], cache)
        return clock.turn(answer) | {"computed": len(ids) - kept}

    def _logits(self, rows: list[list[int]], cache: Any) -> Any:
        return self.model(torch.tensor(rows), past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def _begin(self, session: str, of: str | None) -> tuple[list[int], Any]:
        if of is not None:
            known, cache = self._held[of]
            return list(known), copy.deepcopy(cache)
        return self._held.pop(session, None) or ([], DynamicCache(config=self.model.config))

    def _restored(self, session: str) -> tuple[list[int], Any]:
        ids, layers = torch.load(self._file(session), mmap=True)
        cache = DynamicCache(config=self.model.config)
        for number, (keys, values) in enumerate(layers):
            cache.update(keys, values, number)
        return ids, cache

    def save(self, session: str) -> float:
        """Write the cache of a session to its file; return the seconds that it took."""
        started = time.perf_counter()
        ids, cache = self._held[session]
        torch.save((ids, [(layer.keys, layer.values) for layer in cache.layers]), self._file(session))
        return time.perf_counter() - started

    def _file(self, session: str) -> Path:
        return self.disk / f"{session}.pt"

    def many(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """Tokens per second of several prompts of one length at once: while all decode, and with prefill."""
        started = time.perf_counter()
        cache = DynamicCache(config=self.model.config)
        rows = self._logits(prompts, cache).argmax(-1)
        opened = time.perf_counter()
        for _ in range(tokens - 1):
            rows = self._logits(rows.tolist(), cache).argmax(-1)
        ended = time.perf_counter()
        count = len(prompts)
        return {
            "decode": count * (tokens - 1) / (ended - opened),
            "whole": count * tokens / (ended - started),
        }

    def floor(self, known: int, new: int) -> float:
        """Seconds to evaluate so many new tokens on a live cache of so many."""
        cache = DynamicCache(config=self.model.config)
        config = self.model.config
        shape = (1, config.num_key_value_heads, known, config.head_dim)
        for number in range(config.num_hidden_layers):
            cache.update(torch.randn(shape), torch.randn(shape), number)
        times = []
        for round_ in range(3):
            started = time.perf_counter()
            self._logits([list(range(round_, round_ + new))], cache)
            times.append(time.perf_counter() - started)
            cache.crop(-new)
        return min(times[1:])


if __name__ == "__main__":
    serve(ByHand(*sys.argv[1:]))
