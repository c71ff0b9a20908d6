"""Encoding is exact where it says so, bounded where it does not, and never depends on where a block lay."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from agent_memory_core.kv_codec import KvCodec

DIMS = {"0.k": 64, "0.v": 64, "1.k": 80, "1.v": 48}
BITS: list[Any] = [None, 8, 4, "8/4"]


def part(tokens: int, seed: int, dtype: mx.Dtype = mx.bfloat16) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(seed), len(DIMS))
    return {
        name: mx.random.normal((2, 3, tokens, dim), key=k).astype(dtype)
        for (name, dim), k in zip(DIMS.items(), keys, strict=True)
    }


@pytest.mark.parametrize("bits", BITS)
def test_blocks_decoded_together_equal_blocks_decoded_alone(bits: Any) -> None:
    codec = KvCodec(bits, DIMS)
    blocks = [codec.encode(part(128, seed)) for seed in range(3)]
    together = codec.decode(blocks)
    for name in DIMS:
        alone = mx.concatenate([codec.decode([b])[name] for b in blocks], axis=2)
        assert mx.array_equal(together[name], alone)
        assert together[name].dtype == mx.bfloat16


def test_raw_is_exact() -> None:
    raw = part(64, 1)
    decoded = KvCodec(None, DIMS).decode([KvCodec(None, DIMS).encode(raw)])
    assert all(mx.array_equal(decoded[name], raw[name]) for name in DIMS)


@pytest.mark.parametrize(
    ("bits", "key_error", "value_error"), [(8, 0.012, 0.012), ("8/4", 0.012, 0.12), (4, 0.12, 0.12)]
)
def test_rounding_stays_within_what_the_bits_allow(bits: Any, key_error: float, value_error: float) -> None:
    codec, raw = KvCodec(bits, DIMS), part(128, 2, mx.float32)
    decoded = codec.decode([codec.encode(raw)])
    for name, x in raw.items():
        error = float(mx.sqrt(mx.mean((decoded[name] - x) ** 2) / mx.mean(x**2)).item())
        assert 0 < error < (key_error if name.endswith(".k") else value_error), name


def test_four_bit_keys_keep_outlier_channels_apart() -> None:
    raw = part(128, 3, mx.float32)
    spikes = mx.where(mx.arange(64) % 16 == 0, 40.0, 1.0)
    raw["0.k"] = raw["0.k"] * spikes
    decoded = KvCodec(4, DIMS).decode([KvCodec(4, DIMS).encode(raw)])["0.k"]
    small = mx.array([i for i in range(64) if i % 16])
    error = mx.mean((decoded - raw["0.k"])[..., small] ** 2) / mx.mean(raw["0.k"][..., small] ** 2)
    per_token = mx.dequantize(*mx.quantize(raw["0.k"], 64, 4), 64, 4)
    worse = mx.mean((per_token - raw["0.k"])[..., small] ** 2) / mx.mean(raw["0.k"][..., small] ** 2)
    assert float(error.item()) < 0.02 < float(worse.item())


def test_names_differ_exactly_when_the_encoding_does() -> None:
    names = [KvCodec(bits, DIMS).name() for bits in BITS]
    assert len(set(names)) == len(names)
    assert KvCodec(8, {"0.k": 64}).name() != KvCodec(8, {"0.k": 80}).name()
