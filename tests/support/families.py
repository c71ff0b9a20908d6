"""One tiny random model for every way in which mlx-lm's families keep their attention state.

``window`` in a configuration is shorter than a block of 64 in some families and longer in others, since both ask
for other ways of resuming.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_tokenizer
from support import tiny_models

from agent_memory_core.models.loader import LoadedModel

SHORT, LONG = 40, 96

_PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_DEEPSEEK: dict[str, Any] = (
    _PLAIN
    | _MLA
    | {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "rope_scaling": None,
    }
)
_DELTA_NET: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 3,
    "partial_rotary_factor": 0.5,
}
_SLIDING_FULL = ["sliding_attention", "full_attention"]
_ROPES = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_theta": 10000.0},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": tiny_models.LLAMA,
    "qwen3": tiny_models.QWEN3,
    "mistral": tiny_models.LLAMA | {"model_type": "mistral"},
    "phi3": _PLAIN | {"model_type": "phi3", "num_key_value_heads": 2},
    "gemma2": _PLAIN
    | {"model_type": "gemma2", "query_pre_attn_scalar": 64, "final_logit_softcapping": 300.0},
    "gemma3": _PLAIN
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "sliding_window": LONG,
        "sliding_window_pattern": 4,
    },
    "gemma3n": {
        "model_type": "gemma3n",
        "text_config": _PLAIN
        | {
            "model_type": "gemma3n",
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": SHORT,
            "rope_local_base_freq": 1000.0,
            "final_logit_softcapping": 30.0,
            "layer_types": _SLIDING_FULL * 2,
            "activation_sparsity_pattern": [0.5] * 4,
            "hidden_size_per_layer_input": 32,
            "altup_num_inputs": 2,
            "altup_coef_clip": 1.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        },
    },
    "gemma4": {
        "model_type": "gemma4",
        "text_config": _PLAIN
        | {
            "model_type": "gemma4_text",
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "global_head_dim": 128,
            "hidden_size_per_layer_input": 32,
            "sliding_window": LONG,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 30.0,
            "layer_types": _SLIDING_FULL * 3,
            "rope_parameters": _ROPES,
        },
    },
    "gpt_oss": _PLAIN
    | {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": SHORT,
        "layer_types": _SLIDING_FULL,
        "rope_scaling": {"rope_type": "default"},
    },
    "olmo3": _PLAIN
    | {"model_type": "olmo3", "num_hidden_layers": 4, "sliding_window": SHORT, "num_key_value_heads": 2},
    "deepseek_v2": tiny_models.DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK | {"model_type": "deepseek_v3"},
    "deepseek_v32": _DEEPSEEK
    | {"model_type": "deepseek_v32", "index_n_heads": 2, "index_head_dim": 64, "index_topk": 32},
    "qwen3_next": _PLAIN
    | _DELTA_NET
    | _EXPERTS
    | {
        "model_type": "qwen3_next",
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [0],
    },
    "qwen3_5": _PLAIN | _DELTA_NET | {"model_type": "qwen3_5"},
    "lfm2": _PLAIN
    | {
        "model_type": "lfm2",
        "num_hidden_layers": 4,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
    },
    "mamba2": {
        "model_type": "mamba2",
        "num_heads": 4,
        "head_dim": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 32,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 3,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.01, 10.0],
        "time_step_rank": "auto",
    },
    "nemotron_h": _PLAIN
    | {
        "model_type": "nemotron_h",
        "num_hidden_layers": 4,
        "attention_bias": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 32,
        "conv_kernel": 3,
        "n_groups": 1,
        "time_step_limit": [0.01, 10.0],
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": False,
        "hybrid_override_pattern": ["M", "*", "M", "-"],
    },
    "falcon_h1": _PLAIN
    | {
        "model_type": "falcon_h1",
        "attention_bias": False,
        "mamba_d_conv": 4,
        "mamba_d_head": 32,
        "mamba_d_ssm": 128,
        "mamba_d_state": 32,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 4,
        "tie_word_embeddings": True,
    },
    "granitemoehybrid": _PLAIN
    | {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 4,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.125,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_proj_bias": False,
        "mamba_d_state": 32,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": False,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "baichuan_m1": _PLAIN
    | {
        "model_type": "baichuan_m1",
        "num_hidden_layers": 4,
        "sliding_window": LONG,
        "sliding_window_layers": [0, 2],
        "conv_window": 2,
    },
    "recurrent_gemma": _PLAIN
    | {
        "model_type": "recurrent_gemma",
        "num_hidden_layers": 3,
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": SHORT,
        "block_types": ["recurrent", "recurrent", "attention"],
        "lru_width": 64,
        "embeddings_scale_by_sqrt_dim": True,
    },
    "longcat_flash_ngram": _PLAIN
    | _MLA
    | {
        "model_type": "longcat_flash_ngram",
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 64,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 2,
        "zero_expert_num": 2,
        "num_layers": 2,
        "routed_scaling_factor": 1.0,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_bias": False,
    },
    "afm7": {
        "model_type": "afm7",
        "hidden_dim": 64,
        "num_layers": 4,
        "num_hidden_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
    },
    "llama4": {
        "model_type": "llama4",
        "text_config": _PLAIN
        | {
            "model_type": "llama4_text",
            "num_hidden_layers": 4,
            "attention_bias": False,
            "attention_chunk_size": 96,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
            "num_local_experts": 2,
            "rope_scaling": None,
            "use_qk_norm": True,
        },
    },
}
"""By the name of the family."""


def build(name: str, dtype: mx.Dtype = mx.float32) -> Any:
    """The random model of a family."""
    model = tiny_models.build(with_vocabulary(CONFIGS[name], tiny_models.vocab_size()), dtype=dtype)
    model.update(_not_zero(model.parameters(), mx.random.key(1)))
    mx.eval(model.parameters())
    return model


def _not_zero(tree: Any, key: mx.array) -> Any:
    """Weights that start as zeros would make a layer that passes nothing on."""
    if isinstance(tree, dict):
        return {name: _not_zero(value, key) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_not_zero(value, key) for value in tree]
    if (
        isinstance(tree, mx.array)
        and tree.dtype in (mx.float32, mx.bfloat16, mx.float16)
        and not mx.any(tree).item()
    ):
        return (0.3 * mx.random.normal(tree.shape, key=key)).astype(tree.dtype)
    return tree


def with_vocabulary(config: dict[str, Any], size: int) -> dict[str, Any]:
    """A configuration whose nested text configuration knows the size of the vocabulary too."""
    config = config | {"vocab_size": size}
    if "text_config" in config:
        sizes = {"vocab_size": size, "vocab_size_per_layer_input": size}
        config["text_config"] = config["text_config"] | sizes
    return config


def write(folder: Path, name: str) -> str:
    """A folder with the random model of a family and tiny-chat's tokenizer."""
    config = with_vocabulary(CONFIGS[name], tiny_models.vocab_size())
    return tiny_models.write_model(folder, config, build(name))


@cache
def loaded(name: str) -> LoadedModel:
    """The random model of a family as an engine takes it."""
    tokenizer = load_tokenizer(tiny_models.TOKENIZER, eos_token_ids=[tiny_models.eos()])
    return LoadedModel(name, build(name), tokenizer, f"random {name}", 32768, CONFIGS[name])
