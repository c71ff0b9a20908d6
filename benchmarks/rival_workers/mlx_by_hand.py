"""mlx-lm as a careful user runs it by hand: a cache in a variable for each conversation, saved to a file on request.

It also takes the floor of all systems on MLX: the model evaluates new tokens on a live cache of a given length.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import batch_generate, load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from protocol import Clock, common_prefix, serve


class ByHand:
    """Conversations by name: their tokens and their caches."""

    def __init__(self, model: str, disk: str) -> None:
        self.model, self.tokenizer = load(model)[:2]
        self.disk = Path(disk)
        self._held: dict[str, tuple[list[int], Any]] = {}

    def turn(
        self, session: str, ids: list[int], tokens: int, of: str | None = None, restore: bool = False
    ) -> Any:
        """Answer a prompt on the session's own cache, a copy of another's, or one from a file."""
        clock = Clock()
        known, cache = self._restored(session) if restore else self._begin(session, of)
        kept = min(common_prefix(known, ids), len(ids) - 1)
        trim_prompt_cache(cache, len(known) - kept)
        answer: list[int] = []
        steps = generate_step(mx.array(ids[kept:]), self.model, max_tokens=tokens, prompt_cache=cache)
        for token, _ in steps:
            clock.token()
            answer.append(int(token))
        self._held[session] = ([*ids, *answer][: cache[0].offset], cache)
        return clock.turn(answer) | {"computed": len(ids) - kept}

    def _begin(self, session: str, of: str | None) -> tuple[list[int], Any]:
        if of is not None:
            known, cache = self._held[of]
            return list(known), copy.deepcopy(cache)
        return self._held.pop(session, None) or ([], make_prompt_cache(self.model))

    def _restored(self, session: str) -> tuple[list[int], Any]:
        cache, said = load_prompt_cache(str(self._file(session)), return_metadata=True)
        return [int(token) for token in said["ids"].split()], cache

    def save(self, session: str) -> float:
        """Write the cache of a session to its file; return the seconds that it took."""
        started = time.perf_counter()
        ids, cache = self._held[session]
        save_prompt_cache(str(self._file(session)), cache, {"ids": " ".join(map(str, ids))})
        return time.perf_counter() - started

    def _file(self, session: str) -> Path:
        return self.disk / f"{session}.safetensors"

    def many(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """Tokens per second of several prompts at once: while all decode, and with prefill."""
        started = time.perf_counter()
        found = batch_generate(self.model, self.tokenizer, prompts, max_tokens=tokens)
        seconds = time.perf_counter() - started
        return {"decode": found.stats.generation_tps, "whole": len(prompts) * tokens / seconds}

    def floor(self, known: int, new: int) -> float:
        """Seconds to evaluate so many new tokens on a live cache of so many, up to the logits of the last."""
        cache = make_prompt_cache(self.model)
        args = self.model.args
        shape = (1, args.num_key_value_heads, known, args.head_dim)
        for layer in cache:
            # What the cached numbers are does not change the time.
            layer.update_and_fetch(*(mx.random.normal(shape) for _ in "kv"))
        times = []
        for round_ in range(3):
            mx.eval([x for layer in cache for x in (layer.keys, layer.values)])
            started = time.perf_counter()
            mx.eval(self.model(mx.array([list(range(round_, round_ + new))]), cache=cache)[:, -1, :])
            times.append(time.perf_counter() - started)
            trim_prompt_cache(cache, new)
        return sorted(times[1:])[0]


if __name__ == "__main__":
    serve(ByHand(*sys.argv[1:]))
