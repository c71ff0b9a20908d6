"""The contract with mlx-lm's caches: what is cut out of one and joined into another is the same state."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from support import families, tiny_models

from agent_memory_core.kv.layout import KvLayout, TokenGroup, round_up, slice_tokens

pytestmark = pytest.mark.model

CONFIGS = [tiny_models.LLAMA, tiny_models.QWEN3, tiny_models.MISTRAL, tiny_models.DEEPSEEK_V2]
IDS = [(7 * i) % 900 + 3 for i in range(400)]


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: config["model_type"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.build(request.param)


def run(model: Any, ids: list[int], cache: list[Any]) -> mx.array:
    logits: mx.array = model(mx.array([ids]), cache=cache)[:, -1]
    mx.eval(logits)
    return logits


def test_a_cache_cut_at_any_points_and_joined_gives_bit_identical_logits(model: Any) -> None:
    layout = KvLayout(model)
    live = make_prompt_cache(model)
    run(model, IDS[:50], live)
    for cuts in ([0, 50], [0, 1, 50], [0, 16, 32, 48, 50]):
        parts = [layout.cut(live, a, b) for a, b in itertools.pairwise(cuts)]
        joined = layout.join(parts, [], {}, 50, room=5)
        copy = layout.join([layout.cut(live, 0, 50)], [], {}, 50, room=5)
        assert mx.array_equal(run(model, [5, 6, 7], joined), run(model, [5, 6, 7], copy))


def test_joining_a_part_of_the_last_part_is_the_shorter_prompt(model: Any) -> None:
    layout = KvLayout(model)
    live, short = make_prompt_cache(model), make_prompt_cache(model)
    run(model, IDS[:40], live)
    run(model, IDS[:29], short)
    joined = layout.join([layout.cut(live, 0, 16), layout.cut(live, 16, 40)], [], {}, 29, room=1)
    assert mx.allclose(run(model, [9], joined), run(model, [9], short), atol=1e-4)
    assert joined[0].offset == short[0].offset == 30


def test_the_probe_tells_shapes_and_bytes(model: Any) -> None:
    layout = KvLayout(model)
    live = make_prompt_cache(model)
    run(model, [1] * round_up(1), live)
    assert layout.bytes_per_token * round_up(1) == sum(c.nbytes for c in live)
    raw = layout.cut(live, 0, 10)
    assert raw.keys() == layout.dims("append").keys()
    assert all(x.shape[2:] == (10, layout.dims("append")[name]) for name, x in raw.items())
    assert all(x.shape[2] == 3 for x in slice_tokens(raw, 2, 5).values())


def test_keys_and_values_may_differ_in_width() -> None:
    (group,) = KvLayout(tiny_models.build(tiny_models.DEEPSEEK_V2)).tokens
    assert (group.key_dim, group.value_dim) == (48, 64)


def test_joined_layers_do_not_share_a_buffer(model: Any) -> None:
    layout = KvLayout(model)
    live = make_prompt_cache(model)
    run(model, [1, 2, 3], live)
    joined = layout.join([layout.cut(live, 0, 3)], [], {}, 3, room=1)
    before = mx.array(joined[1].keys)
    joined[0].update_and_fetch(joined[0].keys[..., :1, :] + 1, joined[0].values[..., :1, :])
    assert mx.array_equal(before, joined[1].keys)


# Every family


@pytest.fixture(scope="module", params=families.CONFIGS)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, families.build(request.param)


KINDS = {
    "gemma3": {"window", "append"},
    "gemma3n": {"window", "append"},
    "gemma4": {"window", "append"},
    "gpt_oss": {"window", "append"},
    "olmo3": {"window", "append"},
    "qwen3_next": {"state", "append"},
    "qwen3_5": {"state", "append"},
    "lfm2": {"state", "append"},
    "mamba2": {"state"},
    "nemotron_h": {"state", "append"},
    "falcon_h1": {"state", "append"},
    "granitemoehybrid": {"state", "append"},
    "baichuan_m1": {"state", "window", "append"},
    "recurrent_gemma": {"state", "window"},
    "longcat_flash_ngram": {"state", "append"},
    "llama4": {"snapshot", "append"},
}


def test_the_kinds_of_a_familys_layers_are_read_from_its_live_caches(family: tuple[str, Any]) -> None:
    name, model = family
    layout = KvLayout(model)
    assert {group.kind for group in layout.groups} == KINDS.get(name, {"append"})
    assert layout.unknown == []
    assert layout.batches is (name != "llama4")
    covered = {layer for group in layout.groups for layer in group.layers}
    assert covered == set(range(layout.num_layers)) == set(range(len(make_prompt_cache(model))))


def taken(layout: KvLayout, live: list[Any], length: int, size: int = 64) -> list[Any]:
    """A copy of a live cache by way of what is kept at rest, in blocks of ``size``."""
    cuts = [*range(0, length, size), length]
    first = max(0, length - layout.reach) // size * size
    return layout.join(
        [layout.cut(live, a, b) for a, b in itertools.pairwise(cuts)],
        [
            layout.cut_window(live, max(a, length - layout.reach), b)
            for a, b in itertools.pairwise(cuts)
            if a >= first
        ],
        layout.snapshot(live),
        length,
        room=64,
    )


@pytest.mark.parametrize("chunks", [[30], [64, 64], [64, 64, 64, 50], [300, 1, 20]])
def test_a_cache_taken_apart_and_put_together_goes_on_to_the_same_bits(
    family: tuple[str, Any], chunks: list[int]
) -> None:
    _, model = family
    layout = KvLayout(model)
    live = make_prompt_cache(model)
    at = 0
    for chunk in chunks:
        run(model, IDS[at : at + chunk], live)
        at += chunk
    copy = taken(layout, live, at)
    for more in ([9, 8, 7, 6, 5], [4, 3], [2], [1]):
        assert mx.array_equal(run(model, more, live), run(model, more, copy))


def test_after_tokens_fed_one_by_one_a_copy_goes_on_as_the_original_does(family: tuple[str, Any]) -> None:
    """A window that has turned stands in another order in the copy, which can show in the last bits."""
    _, model = family
    layout = KvLayout(model)
    live = make_prompt_cache(model)
    run(model, IDS[:90], live)
    for token in IDS[90:130]:
        run(model, [token], live)
    copy = taken(layout, live, 130)
    for more in ([9, 8, 7, 6, 5], [2], [1]):
        assert mx.allclose(run(model, more, live), run(model, more, copy), atol=1e-4, rtol=1e-4)


def test_a_window_reaches_only_as_far_as_it_goes() -> None:
    model = families.build("gpt_oss")
    layout = KvLayout(model)
    live = make_prompt_cache(model)
    run(model, IDS[:200], live)
    assert layout.reaches(live, 200)
    assert layout.reaches(live, 150), "a long chunk leaves more than a window"
    for token in IDS[200:260]:
        run(model, [token], live)
    assert layout.reaches(live, 260)
    assert layout.reaches(live, 259)
    assert not layout.reaches(live, 258)
    part = layout.cut_window(live, 192, 256 + 4)
    assert {x.shape[2] for x in part.values()} == {families.SHORT - 1}


def test_unequal_windows_of_bytes_are_told_apart() -> None:
    layout = KvLayout(families.build("gemma3"))
    window, append = layout.tokens
    assert isinstance(window, TokenGroup)
    assert (window.kind, window.window, append.window) == ("window", families.LONG, None)
    assert (layout.window_bytes, layout.bytes_per_token) == (window.bytes_per_token, append.bytes_per_token)
    assert "window=96" in window.describe()


# What has no place


class _Kin(KVCache):  # type: ignore[misc]
    """In a subclass nobody knows where a token lies."""


class _Strange(KVCache):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.mystery = object()


def test_an_unknown_class_is_kept_whole_where_that_can_be_done() -> None:
    model = tiny_models.build(tiny_models.LLAMA)
    model.make_cache = lambda: [KVCache(), _Kin()]
    layout = KvLayout(model)
    assert [(group.kind, group.layers) for group in layout.groups] == [("append", (0,)), ("snapshot", (1,))]
    live = model.make_cache()
    run(model, IDS[:70], live)
    copy = taken(layout, live, 70)
    assert mx.array_equal(run(model, [1, 2], live), run(model, [1, 2], copy))


def test_a_class_that_holds_what_is_no_array_is_named_and_left_out() -> None:
    model = tiny_models.build(tiny_models.LLAMA)
    model.make_cache = lambda: [KVCache(), _Strange()]
    assert KvLayout(model).unknown == ["_Strange"]


def test_a_window_that_keeps_its_first_tokens_is_kept_whole() -> None:
    model = tiny_models.build(tiny_models.LLAMA)
    model.make_cache = lambda: [KVCache(), RotatingKVCache(max_size=8, keep=2)]
    assert [group.kind for group in KvLayout(model).groups] == ["append", "snapshot"]
