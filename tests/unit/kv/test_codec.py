"""Encoding is exact where it says so, bounded where it does not, and never depends on where a block lay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from support.stored_turns import IDENTITY, ROOT, wanted

from agent_memory_core.blocks.block import Block, block_hash
from agent_memory_core.engine.block_io import allocate, to_record
from agent_memory_core.kv.codec import ENCODINGS, KvCodec, KvEncoding, TensorEncoding, rotate
from agent_memory_core.storage.block_store import BlockStore

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
TOKENS = (64, 128, 256)
DTYPES = (mx.bfloat16, mx.float16, mx.float32)
DIMS = {"0.k": 64, "0.v": 64, "1.k": 80, "1.v": 48}
VALUES = TensorEncoding(4)
EVERY: dict[str, KvEncoding] = {f"setting {bits}": form for bits, form in ENCODINGS.items()} | {
    "5/4": KvEncoding(TensorEncoding(5, "tokens"), VALUES),
    "by token": KvEncoding(VALUES, VALUES),
    "rotated": KvEncoding(TensorEncoding(4, rotated=True), TensorEncoding(4, rotated=True)),
    "groups of 32": KvEncoding(TensorEncoding(4, "tokens", 32), TensorEncoding(4, group=32)),
}
Raw = dict[str, mx.array]


def part(dims: dict[str, int], tokens: int, seed: int, dtype: mx.Dtype = mx.bfloat16) -> Raw:
    keys = mx.random.split(mx.random.key(seed), len(dims))
    return {
        name: mx.random.normal((2, 3, tokens, dim), key=k).astype(dtype)
        for (name, dim), k in zip(dims.items(), keys, strict=True)
    }


def same(a: Raw, b: Raw) -> bool:
    """Whether two parts have the same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]) for name in a
    )


def error(decoded: mx.array, raw: mx.array) -> float:
    """Relative root mean square error."""
    decoded, raw = decoded.astype(mx.float32), raw.astype(mx.float32)
    return float(mx.sqrt(mx.mean((decoded - raw) ** 2) / mx.mean(raw**2)).item())


def bits_per_value(encoded: Raw, raw: Raw, name: str) -> float:
    """What one number of a tensor takes at rest."""
    return 8 * sum(x.nbytes for key, x in encoded.items() if key.startswith(name)) / raw[name].size


# What comes back


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_block_comes_back_in_its_shape_and_dtype_near_to_what_it_was(name: str, head_dim: int) -> None:
    dims = {"0.k": head_dim, "0.v": head_dim}
    codec = KvCodec(EVERY[name], dims)
    for dtype in DTYPES:
        raw = part(dims, 128, 1, dtype)
        decoded = codec.decode([codec.encode(raw)])
        for tensor, x in raw.items():
            assert (decoded[tensor].shape, decoded[tensor].dtype) == (x.shape, dtype)
            assert error(decoded[tensor], x) < 0.12


@pytest.mark.parametrize(
    ("bits", "key_error", "value_error"),
    [(None, 0, 0), (8, 0.012, 0.012), ("8/4", 0.012, 0.12), ("6/4", 0.03, 0.12), (4, 0.12, 0.12)],
)
def test_rounding_stays_within_what_the_bits_allow(bits: Any, key_error: float, value_error: float) -> None:
    codec, raw = KvCodec(bits, DIMS), part(DIMS, 128, 2, mx.float32)
    decoded = codec.decode([codec.encode(raw)])
    for name, x in raw.items():
        bound = key_error if name.endswith(".k") else value_error
        assert bound / 3 <= error(decoded[name], x) <= bound, name


@pytest.mark.parametrize(
    ("bits", "key_bits", "value_bits"), [(None, 16, 16), (8, 8.5, 8.5), ("8/4", 8.5, 4.5), ("6/4", 6.5, 4.5)]
)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_setting_takes_its_bits_and_half_a_bit_for_scales(
    bits: Any, key_bits: float, value_bits: float, head_dim: int
) -> None:
    dims = {"0.k": head_dim, "0.v": head_dim}
    for tokens in TOKENS:
        raw = part(dims, tokens, 3)
        encoded = KvCodec(bits, dims).encode(raw)
        assert bits_per_value(encoded, raw, "0.k") == key_bits
        assert bits_per_value(encoded, raw, "0.v") == value_bits


# Where a block lay


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_blocks_decoded_together_equal_blocks_decoded_alone(name: str, head_dim: int) -> None:
    dims = {"0.k": head_dim, "0.v": head_dim}
    codec = KvCodec(EVERY[name], dims)
    blocks = [codec.encode(part(dims, 128, seed)) for seed in range(3)]
    alone = [codec.decode([block]) for block in blocks]
    assert same(codec.decode(blocks), {t: mx.concatenate([x[t] for x in alone], axis=2) for t in dims})


@pytest.mark.parametrize("name", EVERY)
def test_a_block_read_from_disk_decodes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    tokens = tuple(range(4))
    # The names of a block's tensors, not its tokens, are what matters here; half of them do not fill a group.
    for number, (dims, count, dtype) in enumerate(
        [(DIMS, 128, mx.bfloat16), ({"0.k": 128, "0.v": 96}, 64, mx.float16), (DIMS, 37, mx.float32)]
    ):
        codec, raw = KvCodec(EVERY[name], dims), part(dims, count, number, dtype)
        encoded = codec.encode(raw)
        mx.eval(encoded)
        key = block_hash(ROOT, tokens)
        block = Block(key, ROOT, tokens, sum(x.nbytes for x in encoded.values()), encoded)
        store = BlockStore(tmp_path / str(number), quota_bytes=2**30)
        store.identify(ROOT, IDENTITY, "default")
        store.commit([to_record(block)], wanted(tokens))
        store.close()
        again = BlockStore(tmp_path / str(number), quota_bytes=2**30)
        loaded = again.load(ROOT, key, allocate)
        again.close()
        assert loaded is not None
        assert same(loaded.tensors, encoded)
        assert same(codec.decode([dict(loaded.tensors)]), codec.decode([encoded]))


def test_a_block_without_rounding_comes_back_whole() -> None:
    codec, raw = KvCodec(None, DIMS), part(DIMS, 64, 1)
    assert same(codec.decode([codec.encode(raw)]), raw)


# Parts of any length


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(EVERY)),
    head_dims=st.tuples(st.sampled_from(HEAD_DIMS), st.sampled_from(HEAD_DIMS)),
    counts=st.lists(st.one_of(st.integers(1, 130), st.sampled_from((32, 64, 96))), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
def test_parts_of_any_length_come_back_together_as_alone(
    name: str, head_dims: tuple[int, int], counts: list[int], dtype: mx.Dtype
) -> None:
    dims = dict(zip(("0.k", "0.v"), head_dims, strict=True))
    codec = KvCodec(EVERY[name], dims)
    raws = [part(dims, count, seed, dtype) for seed, count in enumerate(counts)]
    blocks = [codec.encode(raw) for raw in raws]
    alone = [codec.decode([block]) for block in blocks]
    for raw, decoded in zip(raws, alone, strict=True):
        for tensor, x in raw.items():
            assert (decoded[tensor].shape, decoded[tensor].dtype) == (x.shape, dtype)
            assert error(decoded[tensor], x) < 0.15
    assert same(codec.decode(blocks), {t: mx.concatenate([x[t] for x in alone], axis=2) for t in dims})


@pytest.mark.parametrize(("keys", "values"), [(37, 128), (128, 5), (32, 0)])
def test_each_tensor_has_a_length_of_its_own(keys: int, values: int) -> None:
    dims = {"0.k": 64, "1.k": 64}
    codec = KvCodec(4, dims)
    raw = {"0.k": part(dims, keys, 1)["0.k"], "1.k": part(dims, values, 1)["1.k"]}
    decoded = codec.decode([codec.encode(raw)])
    assert {name: x.shape for name, x in decoded.items()} == {name: x.shape for name, x in raw.items()}


@pytest.mark.parametrize(
    ("form", "tokens", "head_dim", "taken"),
    [
        (TensorEncoding(4, "tokens"), 128, 80, TensorEncoding(4, "tokens")),
        (TensorEncoding(4, "tokens"), 100, 128, TensorEncoding(8)),
        (TensorEncoding(4, "tokens"), 32, 80, TensorEncoding(4, "tokens", 32)),
        (TensorEncoding(4, "tokens"), 37, 96, TensorEncoding(8, group=32)),
        (TensorEncoding(4, "tokens", 32), 96, 128, TensorEncoding(4, "tokens", 32)),
        (TensorEncoding(4), 37, 128, TensorEncoding(4)),
        (TensorEncoding(4), 128, 80, TensorEncoding(4, "tokens")),
        (TensorEncoding(4), 37, 96, TensorEncoding(4, group=32)),
        (TensorEncoding(4, rotated=True), 128, 80, TensorEncoding(4, "tokens", rotated=True)),
        (TensorEncoding(4), 37, 80, TensorEncoding(None)),
        (TensorEncoding(None), 37, 80, TensorEncoding(None)),
    ],
)
def test_what_does_not_fit_takes_the_next_form(
    form: TensorEncoding, tokens: int, head_dim: int, taken: TensorEncoding
) -> None:
    assert form.of(tokens, head_dim) == taken


# Outlier channels


def with_outliers(tokens: int) -> Raw:
    """Keys of which every sixteenth channel is forty times as great, in float32."""
    raw = part({"0.k": 128}, tokens, 3, mx.float32)["0.k"]
    return {"0.k": raw * mx.where(mx.arange(128) % 16 == 0, 40.0, 1.0)}


def small_error(form: KvEncoding, tokens: int = 128) -> float:
    """The relative error of the channels that are not great."""
    raw = with_outliers(tokens)
    codec = KvCodec(form, {"0.k": 128})
    small = mx.array([i for i in range(128) if i % 16])
    return error(codec.decode([codec.encode(raw)])["0.k"][..., small], raw["0.k"][..., small])


def test_keys_with_outlier_channels_keep_the_other_channels() -> None:
    assert small_error(ENCODINGS[4]) < 0.12
    assert small_error(ENCODINGS["6/4"]) < 0.03 < small_error(ENCODINGS["8/4"])
    assert small_error(EVERY["rotated"]) < 0.6 * small_error(EVERY["by token"])
    assert small_error(EVERY["by token"]) > 0.9


def test_keys_too_few_for_a_group_keep_the_other_channels_too() -> None:
    assert small_error(ENCODINGS[4], 37) < 0.12
    assert small_error(ENCODINGS["6/4"], 37) < 0.12


# Rotation


@pytest.mark.parametrize("width", [2, 3, 48, *HEAD_DIMS, 576])
def test_a_rotation_keeps_lengths_and_undoes_itself(width: int) -> None:
    x = mx.random.normal((2, 3, 5, width), key=mx.random.key(4))
    turned = rotate(x)
    assert mx.allclose(mx.sum(turned**2, axis=-1), mx.sum(x**2, axis=-1), rtol=1e-4)
    assert mx.allclose(rotate(turned), x, atol=1e-5)
    assert not mx.allclose(turned, x, atol=0.1)


@pytest.mark.parametrize("width", HEAD_DIMS)
def test_a_rotation_spreads_one_channel_over_all(width: int) -> None:
    spread = mx.abs(rotate(mx.zeros((width,)).at[5].add(1.0)))
    assert float(mx.max(spread).item()) < 0.3
    assert float(mx.min(spread).item()) > 0


# Identity


def test_names_differ_exactly_when_the_encoding_does() -> None:
    names = [KvCodec(form, DIMS).name() for form in EVERY.values()]
    assert len(set(names)) == len(names)
    assert KvCodec(8, {"0.k": 64}).name() != KvCodec(8, {"0.k": 80}).name()
    assert KvCodec(4, DIMS).name() == KvCodec(ENCODINGS[4], DIMS).name()
