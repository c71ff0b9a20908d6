"""The contract with mlx-lm's caches: what is cut out of one and joined into another is the same KV."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from agent_memory_core.errors import ModelUnsupported
from agent_memory_core.kv_layout import KvLayout, round_up, slice_tokens

CONFIGS = [tiny_models.LLAMA, tiny_models.QWEN3, tiny_models.MISTRAL, tiny_models.DEEPSEEK_V2]


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: config["model_type"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.build(request.param)


def run(model: Any, ids: list[int], cache: list[Any]) -> mx.array:
    logits: mx.array = model(mx.array([ids]), cache=cache)[:, -1]
    mx.eval(logits)
    return logits


def test_a_cache_cut_at_any_points_and_joined_gives_bit_identical_logits(model: Any) -> None:
    layout = KvLayout(model)
    ids = [(7 * i) % 900 + 3 for i in range(50)]
    live = make_prompt_cache(model)
    run(model, ids, live)
    for cuts in ([0, 50], [0, 1, 50], [0, 16, 32, 48, 50]):
        parts = [layout.cut(live, a, b) for a, b in itertools.pairwise(cuts)]
        joined = layout.join(parts, 50, room=5)
        assert layout.length(joined) == 50
        copy = layout.join([layout.cut(live, 0, 50)], 50, room=5)
        assert mx.array_equal(run(model, [5, 6, 7], joined), run(model, [5, 6, 7], copy))


def test_joining_a_part_of_the_last_part_is_the_shorter_prompt(model: Any) -> None:
    layout = KvLayout(model)
    ids = [(5 * i) % 900 + 3 for i in range(40)]
    live = make_prompt_cache(model)
    run(model, ids, live)
    short = make_prompt_cache(model)
    run(model, ids[:29], short)
    joined = layout.join([layout.cut(live, 0, 16), layout.cut(live, 16, 40)], 29, room=1)
    a, b = run(model, [9], joined), run(model, [9], short)
    assert mx.allclose(a, b, atol=1e-4)
    assert layout.length(joined) == layout.length(short) == 30


def test_the_probe_tells_shapes_and_bytes(model: Any) -> None:
    layout = KvLayout(model)
    live = make_prompt_cache(model)
    run(model, [1] * round_up(1), live)
    assert layout.bytes_per_token * round_up(1) == sum(c.nbytes for c in live)
    raw = layout.cut(live, 0, 10)
    assert set(raw) == set(layout.head_dims)
    assert all(x.shape[2:] == (10, layout.head_dims[name]) for name, x in raw.items())
    assert all(x.shape[2] == 3 for x in slice_tokens(raw, 2, 5).values())


def test_keys_and_values_may_differ_in_width() -> None:
    (group,) = KvLayout(tiny_models.build(tiny_models.DEEPSEEK_V2)).groups
    assert (group.key_dim, group.value_dim) == (48, 64)


def test_joined_layers_do_not_share_a_buffer(model: Any) -> None:
    layout = KvLayout(model)
    live = make_prompt_cache(model)
    run(model, [1, 2, 3], live)
    joined = layout.join([layout.cut(live, 0, 3)], 3, room=1)
    before = mx.array(joined[1].keys)
    joined[0].update_and_fetch(joined[0].keys[..., :1, :] + 1, joined[0].values[..., :1, :])
    assert mx.array_equal(before, joined[1].keys)


@pytest.mark.parametrize("other", [RotatingKVCache(max_size=8), type("Kin", (KVCache,), {})()])
def test_an_unknown_kind_is_refused_by_name(other: Any) -> None:
    model = tiny_models.build(tiny_models.LLAMA)
    model.make_cache = lambda: [KVCache(), other]
    with pytest.raises(ModelUnsupported, match=f"layer 1 keeps a {type(other).__name__}"):
        KvLayout(model)
