"""What a model keeps is what its live caches say; its config is believed on nothing that they can tell."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support import tiny_models
from support.layer_groups import Group, live_groups, unevaluated

from agent_memory_core.kv.layout import KvLayout
from agent_memory_core.models.cache_spec import ModelCacheSpec, cache_spec

pytestmark = pytest.mark.model

LLAMA = tiny_models.LLAMA | {"vocab_size": 100}
GEMMA4 = {
    "model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 10, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1, "head_dim": 32,
    "global_head_dim": 64, "num_kv_shared_layers": 4, "sliding_window": 16, "sliding_window_pattern": 3,
    "vocab_size": 100, "vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 8,
    "attention_k_eq_v": True,
}  # fmt: skip
FALCON_H1 = {
    "model_type": "falcon_h1", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "mamba_d_ssm": 64,
    "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 16, "vocab_size": 100,
}  # fmt: skip
MAMBA2 = {
    "model_type": "mamba2", "num_heads": 4, "head_dim": 16, "vocab_size": 100, "hidden_size": 32,
    "intermediate_size": 64, "state_size": 8, "num_hidden_layers": 3, "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4, "n_groups": 1, "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True,
    "time_step_limit": [0.0, 1.0], "time_step_rank": "auto",
}  # fmt: skip
DEEPSEEK_V32 = {
    "model_type": "deepseek_v32", "vocab_size": 100, "hidden_size": 64, "index_head_dim": 32,
    "index_n_heads": 2, "index_topk": 16, "intermediate_size": 64, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 64,
    "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32,
}  # fmt: skip
LLAMA4 = {
    "model_type": "llama4",
    "text_config": {
        "attention_bias": False, "attention_chunk_size": 32, "head_dim": 32, "hidden_size": 64,
        "interleave_moe_layer_step": 1, "intermediate_size": 64, "intermediate_size_mlp": 64,
        "max_position_embeddings": 512, "model_type": "llama4_text", "num_attention_heads": 2,
        "num_experts_per_tok": 1, "num_hidden_layers": 4, "num_key_value_heads": 1, "num_local_experts": 2,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0, "use_qk_norm": True,
        "vocab_size": 100,
    },
}  # fmt: skip


def spec_of(config: dict[str, Any]) -> ModelCacheSpec:
    return cache_spec(live_groups(unevaluated(config)), config)


def appending(layers: int, **form: int) -> Group:
    return Group("append", tuple(range(layers)), **{"heads": 2, "key_dim": 64, "value_dim": 64} | form)


@pytest.mark.parametrize("width", [64, 80, 96, 128, 192, 256])
def test_every_head_width_is_read_off_the_layout_of_a_real_model(width: int) -> None:
    config = LLAMA | {"head_dim": width, "num_key_value_heads": 2}
    model = unevaluated(config)
    spec = cache_spec(KvLayout(model).groups, config)
    assert spec.n_layers == 2
    assert spec.values_of("n_kv_heads") == {2}
    assert spec.values_of("head_dim") == spec.values_of("v_head_dim") == {width}
    assert spec.layer_types == ("global", "global")
    assert spec.values_of("sliding_window") == set()
    assert spec.context_length == LLAMA["max_position_embeddings"]
    assert spec.contradictions == ()


def test_unequal_keys_and_values_have_two_widths() -> None:
    spec = spec_of(tiny_models.DEEPSEEK_V2 | {"vocab_size": 100})
    assert [spec.values_of(key) for key in ("n_kv_heads", "head_dim", "v_head_dim")] == [{2}, {48}, {64}]


def test_shared_layers_are_counted_and_mixed_geometry_is_never_one_number() -> None:
    spec = spec_of(GEMMA4)
    assert spec.n_layers == 10
    assert spec.layer_types == ("sliding_window", "sliding_window", "global") * 2
    assert spec.values_of("n_kv_heads") == {1, 2}
    assert spec.values_of("sliding_window") == {16}
    forms = {(s.layer_type, s.layers, s.heads, s.key_dim, s.value_dim, s.window) for s in spec.shapes}
    assert forms == {
        ("sliding_window", (0, 1, 3, 4), 2, 32, 32, 16),
        ("global", (2, 5), 1, 64, 64, None),
    }
    assert spec.values_of("head_dim") == {32, 64}
    assert spec.values_of("head_dim", "global") == {64}
    assert spec.contradictions == ()


@pytest.mark.parametrize(
    ("config", "types", "heads", "widths"),
    [
        (FALCON_H1, ("hybrid",) * 2, {1}, {32}),
        (MAMBA2, ("recurrent",) * 3, set(), set()),
        (DEEPSEEK_V32, ("global",) * 2, {1}, {64, 32}),
        (LLAMA4, ("snapshot",) * 3 + ("global",), {1}, {32}),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_layers_of_every_kind_are_named(
    config: dict[str, Any], types: tuple[str, ...], heads: set[int], widths: set[int]
) -> None:
    spec = spec_of(config)
    assert spec.layer_types == types
    assert spec.n_layers == len(types)
    assert spec.values_of("n_kv_heads") == heads
    assert spec.values_of("head_dim") == widths
    assert spec.contradictions == ()


def test_layers_without_a_cache_are_not_compared_with_those_that_have_one() -> None:
    groups = [Group("state", (0, 2)), Group("append", (1,), 1, 64, 64)]
    listed = ["mamba", "mlp", "attention", "moe", "mamba"]
    spec = cache_spec(groups, {"layer_types": listed})
    assert spec.layer_types == ("recurrent", "global", "recurrent")
    assert (spec.n_layers, spec.contradictions) == (5, ())


@pytest.mark.parametrize(
    ("config", "reported"),
    [
        ({"sliding_window": 512}, "sliding_window = 512, but the live caches have no window"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types that layer 1 is sliding_window",
        ),
        ({"layer_types": ["linear_attention"] * 2}, "its live cache is global \\(2 such layers\\)"),
        ({"sliding_window_pattern": 2}, "sliding_window_pattern that layer 0 is sliding_window"),
        ({"num_hidden_layers": 1}, "says 1 layers, but the model keeps 2 caches"),
    ],
)
def test_a_config_that_contradicts_the_caches_is_reported_and_not_believed(
    config: dict[str, Any], reported: str
) -> None:
    groups = live_groups(unevaluated(LLAMA))
    spec, plain = cache_spec(groups, LLAMA | config), cache_spec(groups, LLAMA)
    assert len(spec.contradictions) == 1
    assert re.search(reported, spec.contradictions[0])
    assert (spec.layer_types, spec.shapes, spec.n_layers) == (plain.layer_types, plain.shapes, plain.n_layers)


def test_another_window_than_the_caches_have_is_reported() -> None:
    window = Group("window", (0,), 1, 64, 64, window=128)
    assert cache_spec([window], {"sliding_window": 128}).contradictions == ()
    assert "windows of 128" in cache_spec([window], {"sliding_window": 64}).contradictions[0]


def test_a_window_that_the_config_itself_switches_off_is_no_claim() -> None:
    assert (
        cache_spec([appending(1)], {"sliding_window": 4096, "use_sliding_window": False}).contradictions == ()
    )
