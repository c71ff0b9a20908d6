"""Encoding is exact where it says so, bounded where it does not, and never depends on where a block lay."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from support.stored_turns import IDENTITY, ROOT, wanted

from agent_memory_core.blocks.block import Block, block_hash
from agent_memory_core.engine.block_io import allocate, to_record
from agent_memory_core.kv.codec import ENCODINGS, KvCodec, KvEncoding, Segment, TensorEncoding, nbytes, rotate
from agent_memory_core.storage.block_store import BlockStore

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
TOKENS = (64, 128, 256)
DTYPES = (mx.bfloat16, mx.float16, mx.float32)
DIMS = {"0.k": 64, "0.v": 64, "1.k": 80, "1.v": 48}
VALUES = TensorEncoding(4)
EVERY: dict[str, KvEncoding] = {f"setting {bits}": encoding for bits, encoding in ENCODINGS.items()} | {
    "5/4": KvEncoding(TensorEncoding(5, "tokens"), VALUES),
    "by token": KvEncoding(VALUES, VALUES),
    "rotated": KvEncoding(TensorEncoding(4, rotated=True), TensorEncoding(4, rotated=True)),
    "groups of 32": KvEncoding(TensorEncoding(4, "tokens", 32), TensorEncoding(4, group=32)),
}


def normal(dims: dict[str, int], tokens: int, seed: int, dtype: mx.Dtype = mx.bfloat16) -> Segment:
    keys = mx.random.split(mx.random.key(seed), len(dims))
    return {
        name: mx.random.normal((2, 3, tokens, dim), key=k).astype(dtype)
        for (name, dim), k in zip(dims.items(), keys, strict=True)
    }


def same(a: Segment, b: Segment) -> bool:
    """Whether two segments have the same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]) for name in a
    )


def error(decoded: mx.array, segment: mx.array) -> float:
    """Relative root mean square error."""
    decoded, segment = decoded.astype(mx.float32), segment.astype(mx.float32)
    return float(mx.sqrt(mx.mean((decoded - segment) ** 2) / mx.mean(segment**2)).item())


def bits_per_value(encoded: Segment, segment: Segment, name: str) -> float:
    """What one number of a tensor takes at rest."""
    return 8 * sum(x.nbytes for key, x in encoded.items() if key.startswith(name)) / segment[name].size


# What comes back


@pytest.mark.parametrize(
    ("bits", "key_error", "value_error"),
    [(None, 0, 0), (8, 0.012, 0.012), ("8/4", 0.012, 0.12), ("6/4", 0.03, 0.12), (4, 0.12, 0.12)],
)
def test_rounding_stays_within_what_the_bits_allow(bits: Any, key_error: float, value_error: float) -> None:
    codec, segment = KvCodec(bits, DIMS), normal(DIMS, 128, 2, mx.float32)
    decoded = codec.decode([codec.encode(segment)])
    for name, x in segment.items():
        bound = key_error if name.endswith(".k") else value_error
        assert bound / 3 <= error(decoded[name], x) <= bound, name


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(None, 16, 16), (8, 8.5, 8.5), ("8/4", 8.5, 4.5), ("6/4", 6.5, 4.5), (4, 4.5, 4.5)]),
    st.sampled_from(HEAD_DIMS),
    st.sampled_from(TOKENS),
)
def test_a_setting_takes_its_bits_and_half_a_bit_for_scales(
    setting: tuple[Any, float, float], head_dim: int, tokens: int
) -> None:
    bits, key_bits, value_bits = setting
    dims = {"0.k": head_dim, "0.v": head_dim}
    segment = normal(dims, tokens, 3)
    encoded = KvCodec(bits, dims).encode(segment)
    assert bits_per_value(encoded, segment, "0.k") == key_bits
    assert bits_per_value(encoded, segment, "0.v") == value_bits


def test_keys_and_values_are_encoded_each_in_its_own_way() -> None:
    """Every group's keys come back as keys and its values as values, though all have one shape."""
    dims = {f"{group}.{name}": 64 for group in range(3) for name in "kv"}
    segment = {name: mx.full((2, 3, 128, 64), float(i + 1)) for i, name in enumerate(dims)}
    for encoding in EVERY.values():
        codec = KvCodec(encoding, dims)
        decoded = codec.decode([codec.encode(segment)])
        assert [round(decoded[name][0, 0, 5, 7].item(), 2) for name in dims] == [1, 2, 3, 4, 5, 6]
    codec = KvCodec(KvEncoding(TensorEncoding(8), TensorEncoding(4)), dims)
    words = {name: codec.encode(segment)[f"{name}.codes"].shape[-1] for name in dims}
    assert words == {name: 16 if name.endswith(".k") else 8 for name in dims}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outer", [(), (1,), (2, 3)])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_codes_decode_to_what_mlx_makes_of_them(
    bits: Any, dtype: mx.Dtype, outer: tuple[int, ...], group: Any
) -> None:
    x = mx.random.normal((*outer, 128, 80), key=mx.random.key(1)).astype(dtype)
    for along, wide in (("tokens", x), ("head_dim", mx.random.normal((*outer, 7, 128)).astype(dtype))):
        encoding = TensorEncoding(bits, along, group)
        codes, scales, biases = encoding.encode(wide)
        expected = mx.dequantize(codes, scales, biases, group_size=group, bits=bits)
        if along == "tokens":
            expected = expected.flatten(-2).swapaxes(-1, -2)
        decoded = encoding.decode((codes, scales, biases))
        assert decoded.dtype == dtype
        assert mx.array_equal(decoded, expected)


# Where a block lay


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(EVERY)),
    st.fixed_dictionaries({name: st.sampled_from(HEAD_DIMS) for name in ("0.k", "0.v", "1.k")}),
    st.sampled_from((37, 64, 128)),
    st.sampled_from(DTYPES),
)
def test_a_block_read_from_disk_decodes_to_the_same_bits(
    name: str, dims: dict[str, int], count: int, dtype: mx.Dtype
) -> None:
    """Its tokens do not matter here, only the names and shapes of its tensors; some of them fill no group."""
    tokens = tuple(range(4))
    codec = KvCodec(EVERY[name], dims)
    encoded = codec.encode(normal(dims, count, 1, dtype))
    mx.eval(encoded)
    key = block_hash(ROOT, tokens)
    with TemporaryDirectory() as folder:
        store = BlockStore(Path(folder), quota_bytes=2**30)
        store.identify(ROOT, IDENTITY, "default")
        store.commit([to_record(Block(key, ROOT, tokens, nbytes(encoded), encoded))], wanted(tokens))
        store.close()
        again = BlockStore(Path(folder), quota_bytes=2**30)
        loaded = again.load(ROOT, key, allocate)
        again.close()
    assert loaded is not None
    assert same(dict(loaded.tensors), encoded)
    assert same(codec.decode([dict(loaded.tensors)]), codec.decode([encoded]))


def test_a_block_without_rounding_comes_back_whole() -> None:
    codec, segment = KvCodec(None, DIMS), normal(DIMS, 64, 1)
    assert same(codec.decode([codec.encode(segment)]), segment)


# Segments of any length


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(sorted(EVERY)),
    head_dims=st.tuples(st.sampled_from(HEAD_DIMS), st.sampled_from(HEAD_DIMS)),
    counts=st.lists(
        st.one_of(st.integers(1, 130), st.sampled_from((32, 64, 96, 128, 256))), min_size=1, max_size=3
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_segments_of_any_length_come_back_together_as_alone(
    name: str, head_dims: tuple[int, int], counts: list[int], dtype: mx.Dtype
) -> None:
    dims = dict(zip(("0.k", "0.v"), head_dims, strict=True))
    codec = KvCodec(EVERY[name], dims)
    segments = [normal(dims, count, seed, dtype) for seed, count in enumerate(counts)]
    blocks = [codec.encode(segment) for segment in segments]
    alone = [codec.decode([block]) for block in blocks]
    for segment, decoded in zip(segments, alone, strict=True):
        for tensor, x in segment.items():
            assert (decoded[tensor].shape, decoded[tensor].dtype) == (x.shape, dtype)
            assert error(decoded[tensor], x) < 0.15
    assert same(codec.decode(blocks), {t: mx.concatenate([x[t] for x in alone], axis=2) for t in dims})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 140), st.integers(0, 140))
def test_each_tensor_has_a_length_of_its_own(keys: int, values: int) -> None:
    dims = {"0.k": 64, "1.k": 64}
    codec = KvCodec(4, dims)
    segment = {"0.k": normal(dims, keys, 1)["0.k"], "1.k": normal(dims, values, 1)["1.k"]}
    decoded = codec.decode([codec.encode(segment)])
    assert {name: x.shape for name, x in decoded.items()} == {name: x.shape for name, x in segment.items()}


@pytest.mark.parametrize(
    ("encoding", "tokens", "head_dim", "taken"),
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
def test_what_does_not_fit_takes_the_next_encoding(
    encoding: TensorEncoding, tokens: int, head_dim: int, taken: TensorEncoding
) -> None:
    assert encoding.of(tokens, head_dim) == taken


# Outlier channels


def with_outliers(tokens: int) -> Segment:
    """Keys of which every sixteenth channel is forty times as great, in float32."""
    segment = normal({"0.k": 128}, tokens, 3, mx.float32)["0.k"]
    return {"0.k": segment * mx.where(mx.arange(128) % 16 == 0, 40.0, 1.0)}


def small_error(encoding: KvEncoding, tokens: int = 128) -> float:
    """The relative error of the channels that are not great."""
    segment = with_outliers(tokens)
    codec = KvCodec(encoding, {"0.k": 128})
    small = mx.array([i for i in range(128) if i % 16])
    return error(codec.decode([codec.encode(segment)])["0.k"][..., small], segment["0.k"][..., small])


def test_keys_with_outlier_channels_keep_the_other_channels() -> None:
    assert small_error(ENCODINGS[4]) < 0.12
    assert small_error(ENCODINGS["6/4"]) < 0.03 < small_error(ENCODINGS["8/4"])
    assert small_error(EVERY["rotated"]) < 0.6 * small_error(EVERY["by token"])
    assert small_error(EVERY["by token"]) > 0.9


def test_keys_too_few_for_a_group_keep_the_other_channels_too() -> None:
    assert small_error(ENCODINGS[4], 37) < 0.12
    assert small_error(ENCODINGS["6/4"], 37) < 0.12


# Rotation


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 3, 48, *HEAD_DIMS, 576]) | st.integers(2, 300), st.integers(0, 99))
def test_a_rotation_keeps_lengths_and_undoes_itself(width: int, seed: int) -> None:
    x = mx.random.normal((2, 3, 5, width), key=mx.random.key(seed))
    turned = rotate(x)
    assert mx.allclose(mx.sum(turned**2, axis=-1), mx.sum(x**2, axis=-1), rtol=1e-4)
    assert mx.allclose(rotate(turned), x, atol=1e-5)
    assert not mx.allclose(turned, x, atol=0.01)


def test_a_rotation_spreads_one_channel_over_all() -> None:
    for width in HEAD_DIMS:
        spread = mx.abs(rotate(mx.zeros((width,)).at[5].add(1.0)))
        assert float(mx.max(spread).item()) < 0.3
        assert float(mx.min(spread).item()) > 0


# Identity


def test_names_differ_exactly_when_the_encoding_does() -> None:
    names = [KvCodec(encoding, DIMS).name() for encoding in EVERY.values()]
    assert len(set(names)) == len(names)
    assert KvCodec(8, {"0.k": 64}).name() != KvCodec(8, {"0.k": 80}).name()
    assert KvCodec(4, DIMS).name() == KvCodec(ENCODINGS[4], DIMS).name()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
def test_what_is_quantised_lies_in_the_order_of_its_axes(
    monkeypatch: pytest.MonkeyPatch, layers: int, heads: int
) -> None:
    """On CUDA, MLX quantises a transposed view of one layer with one head in the order of its memory."""
    real, seen = mx.quantize, []

    def quantize(x: mx.array, **settings: Any) -> Any:
        mx.eval(x)
        seen.append(memoryview(x).c_contiguous)
        return real(x, **settings)

    monkeypatch.setattr(mx, "quantize", quantize)
    segment = {name: mx.random.normal((layers, heads, 64, 32)) for name in ("0.k", "0.v")}
    mx.eval(segment)
    KvCodec("6/4", {name: 32 for name in segment}).encode(segment)
    assert seen == [True, True]
