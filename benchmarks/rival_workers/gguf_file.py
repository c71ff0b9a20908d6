"""Writes a Llama model of mlx-lm as a GGUF file in float32, with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write(folder: Path, file: Path, weights: Mapping[str, Any]) -> None:
    """Write a model into a file: configuration and tokenizer are those of a folder, the weights arrays of float32."""
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(str(file), "llama")
    _write_sizes(writer, config)
    _write_tokenizer(writer, folder, config)
    for name, weight in weights.items():
        writer.add_tensor(_name(name), _interleaved(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _write_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    said = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary = dict(tokenizer["model"]["vocab"])
    types = dict.fromkeys(vocabulary.values(), 1)
    for token in tokenizer["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
        types[token["id"]] = 3 if token["special"] else 4
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    # It takes whole words from the vocabulary as ours does. It splits digits and signs in another way, so that texts
    # with many of them have other tokens here.
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(texts)
    writer.add_token_types([types[vocabulary[text]] for text in texts])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(said["chat_template"])


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _interleaved(name: str, weight: Any, config: dict[str, Any]) -> Any:
    """Rows of queries and keys in the order in which llama.cpp rotates them: pairs beside each other."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    found = next((config[key] for part, key in heads.items() if part in name), None)
    if found is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(found, 2, rows // found // 2, columns).swapaxes(1, 2).reshape(rows, columns)
