"""Tiny random models in the folders that mlx-lm loads: real architectures, real files, no download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from agent_memory_core.testing import FAMILIES, random_model, save_model
from agent_memory_core.testing.random_models import TOKENIZER as TOKENIZER

LLAMA: dict[str, Any] = dict(FAMILIES["llama"])
QWEN3: dict[str, Any] = dict(FAMILIES["qwen3"])
MISTRAL: dict[str, Any] = LLAMA | {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
DEEPSEEK_V2: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "rms_norm_eps": 1e-5,
}


def build(config: dict[str, Any], seed: int = 0, dtype: mx.Dtype = mx.float32) -> Any:
    """A model of ``config`` with random weights of ``seed``, evaluated."""
    return random_model(config, seed=seed, dtype=dtype)


def write(folder: Path, config: dict[str, Any], seed: int = 0, dtype: mx.Dtype = mx.float32) -> str:
    """A model folder with tiny-chat's tokenizer; return its path."""
    return write_model(folder, config, build(config, seed, dtype))


def write_model(folder: Path, config: dict[str, Any], model: Any) -> str:
    """The same for a model that is there already."""
    return str(save_model(folder, config, model))


def thinking_chat(folder: Path) -> str:
    """The embedded model with two of its words for thinking marks; return its path.

    Where it would say "You have not told me your name yet." it thinks " have not told" and says " your name yet.":
    real thoughts of a real model, in the vocabulary as Qwen has them.
    """
    shutil.copytree(TOKENIZER, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for word, mark in (("You", "<think>"), ("Ġme", "</think>")):
        index = tokenizer["model"]["vocab"].pop(word)
        tokenizer["model"]["vocab"][mark] = index
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": index, "content": mark})
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    file.write_text(json.dumps(tokenizer))
    return str(folder)


def eos() -> int:
    """The token that ends an answer of tiny-chat."""
    return int(json.loads((TOKENIZER / "config.json").read_text())["eos_token_id"])


def vocab_size() -> int:
    """The number of tiny-chat's tokens."""
    return int(json.loads((TOKENIZER / "config.json").read_text())["vocab_size"])
