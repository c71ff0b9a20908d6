"""At-rest encodings of KV: the model's dtype, 8-bit, 4-bit, or 8-bit keys with 4-bit values.

A *raw* part is what `KvLayout.cut` returns: arrays of shape [layers, heads, tokens, head_dim] in the model's
dtype, named ``<group>.k`` and ``<group>.v``. An *encoded* part holds, for each of them, either the array itself
or three arrays named ``.codes`` (uint32), ``.scales`` and ``.biases`` of affine quantisation in groups of
`GROUP`, as `mx.quantize` defines it. Encoding happens once, when a block is sealed; decoding gives the same
bits wherever the block lay, so a turn resumed from memory and one resumed from disk start alike.

Values, and 8-bit keys, are grouped along the head dimension of one token. 4-bit keys are grouped per channel
along the tokens of the block (KIVI, arXiv 2402.02750): outlier channels then keep a scale of their own. The
channel form also serves head dimensions that `GROUP` does not divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from agent_memory_core.config import KvBits

GROUP = 64
Raw = dict[str, mx.array]
Encoded = dict[str, mx.array]
_PARTS = ("codes", "scales", "biases")


@dataclass(frozen=True, slots=True)
class TensorCodec:
    """How one tensor is kept: ``bits`` None is as it is; ``along`` says what a group of `GROUP` spans."""

    bits: Literal[4, 8] | None
    along: Literal["head_dim", "tokens"] = "head_dim"

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        """Quantise [..., tokens, head_dim]; a codec without bits returns the array alone."""
        if self.bits is None:
            return (x,)
        if self.along == "tokens":
            x = mx.contiguous(x.swapaxes(-1, -2))
        return tuple(mx.quantize(x, group_size=GROUP, bits=self.bits))

    def decode(self, parts: Sequence[mx.array]) -> mx.array:
        """The inverse of `encode`, up to rounding."""
        if self.bits is None:
            return parts[0]
        codes, scales, biases = parts
        x = mx.dequantize(codes, scales, biases, group_size=GROUP, bits=self.bits)
        return x.swapaxes(-1, -2) if self.along == "tokens" else x

    def join(self, parts: Sequence[tuple[mx.array, ...]]) -> tuple[mx.array, ...]:
        """Put the encoded forms of consecutive blocks together along their tokens."""
        if len(parts) == 1:
            return parts[0]
        axis = -1 if self.bits is not None and self.along == "tokens" else -2
        return tuple(mx.concatenate(list(column), axis=axis) for column in zip(*parts, strict=True))

    def name(self) -> str:
        """A short name, part of the identity of every block."""
        return "raw" if self.bits is None else f"q{self.bits}g{GROUP}-{self.along}"


def _tensor_codec(bits: Literal[4, 8] | None, head_dim: int, *, is_key: bool) -> TensorCodec:
    if bits is None:
        return TensorCodec(None)
    by_channel = head_dim % GROUP != 0 or (is_key and bits == 4)
    return TensorCodec(bits, "tokens" if by_channel else "head_dim")


class KvCodec:
    """Encodes and decodes the parts of one model's layout.

    Args:
        kv_bits: what `EngineConfig.kv_bits` says.
        head_dims: width of each raw tensor by name (``"0.k"``: 128).
    """

    def __init__(self, kv_bits: KvBits, head_dims: dict[str, int]) -> None:
        key_bits: Literal[4, 8] | None
        value_bits: Literal[4, 8] | None
        key_bits, value_bits = (8, 4) if kv_bits == "8/4" else (kv_bits, kv_bits)
        self._codecs = {
            name: _tensor_codec(
                key_bits if name.endswith(".k") else value_bits, dim, is_key=name.endswith(".k")
            )
            for name, dim in head_dims.items()
        }

    def name(self) -> str:
        """The encoding of every tensor, for the root identity of blocks."""
        return ",".join(f"{name}={codec.name()}" for name, codec in sorted(self._codecs.items()))

    def encode(self, raw: Raw) -> Encoded:
        """Encode one full block. The result is lazy."""
        encoded: Encoded = {}
        for name, codec in self._codecs.items():
            parts = codec.encode(raw[name])
            if len(parts) == 1:
                encoded[name] = parts[0]
            else:
                encoded.update({f"{name}.{part}": x for part, x in zip(_PARTS, parts, strict=True)})
        return encoded

    def decode(self, blocks: Sequence[Encoded]) -> Raw:
        """Decode consecutive full blocks into one raw part. The result is lazy."""
        raw: Raw = {}
        for name, codec in self._codecs.items():
            names = [name] if codec.bits is None else [f"{name}.{part}" for part in _PARTS]
            raw[name] = codec.decode(codec.join([tuple(b[n] for n in names) for b in blocks]))
        return raw
