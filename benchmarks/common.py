"""What the benchmarks share: a random model of usual proportions, and messages of exact length."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

from agent_memory_core.backend import require_mlx

# Before MLX is imported: on a Linux CPU its own BLAS would hide whatever is slow besides it.
require_mlx()

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

import agent_memory_core
from agent_memory_core.fast_blas import load_openblas

TOKENIZER = Path(agent_memory_core.__file__).parent / "tiny_chat"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
"""SmolLM's proportions at a few layers: a third as many KV heads as heads, an inner width of 8/3."""

DTYPE = mx.float32 if load_openblas() is not None else mx.bfloat16
"""What models of a benchmark compute in: float32 where a CPU has a fast BLAS, which knows nothing else."""

_FRAME = {True: 8, False: 10}
"""Tokens that tiny-chat's template puts around a first message, and around one that follows an answer."""


def write_model(folder: Path, layers: int) -> str:
    """Write a random model in `DTYPE` with tiny-chat's tokenizer; it answers in whole words and never ends."""
    folder.mkdir(parents=True, exist_ok=True)
    said = json.loads((TOKENIZER / "config.json").read_text())
    config = LLAMA | {name: said[name] for name in ("vocab_size", "eos_token_id")}
    config["num_hidden_layers"] = layers
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(DTYPE)
    weights = dict(tree_flatten(model.parameters()))
    # Any other token has a logit of zero, which is never the greatest of so many.
    is_word = mx.zeros((said["vocab_size"], 1), DTYPE)
    is_word[mx.array(list(_one_token_words().values()))] = 1
    weights["lm_head.weight"] = weights["lm_head.weight"] * is_word
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return str(folder)


class PlainModel:
    """The same model as mlx-lm alone runs it, on a live cache that already holds some tokens."""

    def __init__(self, folder: str, tokens: int) -> None:
        self.model = load(folder)[0]
        self.cache = make_prompt_cache(self.model)
        self._random = random.Random(tokens)
        shape = (1, LLAMA["num_key_value_heads"], tokens, LLAMA["head_dim"])
        for layer in self.cache:
            # What the cached numbers are does not change the time.
            layer.update_and_fetch(*(mx.random.normal(shape).astype(DTYPE) for _ in "kv"))

    def append(self, tokens: int) -> float:
        """Seconds to evaluate new tokens up to the logits of the last; the cache is then cut back as it was."""
        ids = mx.array([[self._random.randrange(1000) for _ in range(tokens)]])
        started = time.perf_counter()
        logits = self.model(ids, cache=self.cache)[:, -1, :]
        mx.eval(logits, [x for layer in self.cache for x in (layer.keys, layer.values)])
        seconds = time.perf_counter() - started
        for layer in self.cache:
            # The buffers keep the room they grew by, so that later calls do not pay for it.
            layer.trim(tokens)
        return seconds


def gflops() -> float:
    """Billions of operations a second of a matrix product in `DTYPE`: how fast the floor is."""
    a, b = mx.ones((512, 1024), DTYPE), mx.ones((1024, 1024), DTYPE)
    mx.eval(a @ b)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        mx.eval(a @ b)
        times.append(time.perf_counter() - started)
    return round(2 * 512 * 1024 * 1024 / median(times) / 1e9, 1)


def user(tokens: int, seed: int, *, first: bool, ending: int = 0) -> dict[str, str]:
    """A random message that adds so many tokens to a prompt, with what the template puts around it.

    Messages of one seed differ in their last words, by ``ending``.
    """
    known = list(_one_token_words())
    chosen = random.Random(seed).choices(known, k=tokens - _FRAME[first])
    return {"role": "user", "content": "".join([*chosen[:-1], known[ending % len(known)]])}


def assistant(text: str) -> dict[str, str]:
    """A model's answer."""
    return {"role": "assistant", "content": text}


def drop_page_cache(folder: Path) -> bool:
    """Let the system forget what it holds of the files below a folder; False where it cannot be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _one_token_words() -> dict[str, int]:
    """Words with the space before them, and their token ids."""
    vocabulary: dict[str, int] = json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]
    space = "\u0120"
    return {
        f" {token[1:]}": vocabulary[token]
        for token in sorted(vocabulary)
        if token[0] == space and len(token) > 2 and token[1:].isalpha() and token[1:].isascii()
    }


if __name__ == "__main__":
    print(gflops())
