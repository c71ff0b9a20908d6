"""Models with random weights: real architectures of mlx-lm in a few hundred kilobytes, with tiny-chat's tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from agent_memory_core import InvalidSetting
from agent_memory_core.backend import import_mlx_lm

TOKENIZER = Path(__file__).parents[1] / "tiny_chat"
"""The folder of the embedded model, whose tokenizer all these models have."""

_LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
}
_OLMO2: Mapping[str, Any] = {
    "model_type": "olmo2",
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 80,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "olmo2": _OLMO2,
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 32},
}
"""The ``config.json`` of each small model, by its name here."""


def random_model(config: Mapping[str, Any], *, seed: int = 0, dtype: mx.Dtype = mx.float32) -> Any:
    """A model of ``config`` (as in a ``config.json``) with random weights, evaluated, in memory."""
    # What comes with mlx-lm is imported here, so that importing this module leaves the limits of a process alone.
    import_mlx_lm()
    from mlx_lm.utils import _get_classes

    known = {"vocab_size": _tiny_chat()["vocab_size"], **config}
    model_class, args_class = _get_classes(known)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(known))
    model.set_dtype(dtype)
    # Larger weights make larger differences between logits: without them all greedy answers are the same token.
    model.update(tree_map_with_path(_enlarged, model.parameters()))
    mx.eval(model.parameters())
    return model


def save_model(folder: Path, config: Mapping[str, Any], model: Any) -> Path:
    """Write a model as mlx-lm loads it, with tiny-chat's tokenizer, and return its folder.

    Raises:
        InvalidSetting: the folder cannot be written.
    """
    tiny_chat = _tiny_chat()
    full = {"vocab_size": tiny_chat["vocab_size"], "eos_token_id": tiny_chat["eos_token_id"], **config}
    weights = dict(tree_flatten(model.parameters()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, folder / name)
        (folder / "config.json").write_text(json.dumps(full))
    except OSError as error:
        raise InvalidSetting(f"the model cannot be written to {folder}: {error}.") from error
    return folder


def write_random_model(
    folder: Path, family: str = "llama", *, seed: int = 0, dtype: mx.Dtype = mx.float32
) -> Path:
    """Write a small model of one of `FAMILIES` with random weights, and return its folder.

    Raises:
        InvalidSetting: the family is unknown, or the folder cannot be written.
    """
    if family not in FAMILIES:
        raise InvalidSetting(f"family {family!r} is not known: choose from {', '.join(FAMILIES)}.")
    config = FAMILIES[family]
    return save_model(folder, config, random_model(config, seed=seed, dtype=dtype))


def _tiny_chat() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((TOKENIZER / "config.json").read_text())
    return config


def _enlarged(path: str, weight: mx.array) -> mx.array:
    return weight * 4 if path.rpartition(".")[2] == "weight" and weight.ndim > 1 else weight
