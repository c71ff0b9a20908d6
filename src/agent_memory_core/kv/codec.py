"""At-rest encodings of KV: the model's dtype, or affine quantisation along one of two axes.

A *segment* is the KV of consecutive tokens as it is cut out of a live cache: arrays of shape [layers, heads, tokens,
head_dim] in the model's dtype, named ``<group>.k`` and ``<group>.v``. An encoded segment holds, for each, either the
array itself or three arrays named ``.codes`` (uint32), ``.scales`` and ``.biases`` (the model's dtype) of affine
quantisation, as `mx.quantize` defines it. A block is encoded once, when it is sealed. Decoding gives the same bits
wherever the block lay and whatever is decoded together with it, so a turn that is resumed from memory and one that is
resumed from disk start from equal KV.

A `TensorEncoding` says how one tensor is quantised, a `KvEncoding` how keys and values are, and `ENCODINGS` which of
them each setting means. The numbers that share a scale lie along one of two axes:

    head_dim   channels of one token: ``.codes`` is [layers, heads, tokens, words]
    tokens     tokens of one channel: ``.codes`` is [layers, heads, head_dim, groups, words]

In large models a few channels of the keys are far greater than the others. Groups along the tokens (KIVI, arXiv
2402.02750) give each channel scales of its own. A rotation (QuaRot, arXiv 2404.00456), which multiplies the vector of
each token by an orthogonal matrix before it is quantised, spreads such channels over all others instead.
`benchmarks/quality.py` compares the encodings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Final, Literal

import mlx.core as mx

from agent_memory_core.config import KvBits

Segment = dict[str, mx.array]
Encoded = dict[str, mx.array]
Bits = Literal[4, 5, 6, 8]
Axis = Literal["head_dim", "tokens"]
GroupSize = Literal[64, 32]
AXES: Final[tuple[Axis, ...]] = ("head_dim", "tokens")
GROUP_SIZES: Final[tuple[GroupSize, ...]] = (64, 32)
_ARRAYS = ("codes", "scales", "biases")
_IN_WHOLE_BYTES: Final[Mapping[int, int]] = {4: 1, 6: 3, 8: 1}
"""Bits of a code, and how many bytes whole codes fill. MLX takes codes apart one by one on a CPU; whole arrays of such
bytes go several times as fast."""
_WORD = 32
"""Bits of one element of ``codes``."""
_AXES_BY_CHANNEL = 5
"""How many axes ``codes`` has if its groups lie along the tokens."""


@dataclass(frozen=True, slots=True)
class TensorEncoding:
    """How one tensor [layers, heads, tokens, head_dim] is stored."""

    bits: Bits | None
    """Bits of one code; None means that the tensor is stored as it is."""
    along: Axis = "head_dim"
    """The axis along which the numbers of a group lie."""
    group: GroupSize = 64
    """How many numbers share a scale and a bias."""
    rotated: bool = False
    """Whether the vector of each token is rotated first."""

    def of(self, tokens: int, head_dim: int) -> TensorEncoding:
        """The encoding that a tensor of this shape gets.

        If groups of this size do not fit along their axis, they lie along the other one; if they do not fit there
        either, they are made of 32 numbers; a tensor that no group fits is stored as it is. If groups should lie along
        the tokens, to keep outlier channels apart, and cannot, they get 8 bits.
        """
        if self.bits is None or tokens == 0:
            return RAW
        axes = {"tokens": tokens, "head_dim": head_dim}
        for group in GROUP_SIZES:
            for along in sorted(AXES, key=self.along.__ne__):
                if group <= self.group and axes[along] % group == 0:
                    bits = 8 if along != self.along == "tokens" else self.bits
                    return replace(self, bits=bits, along=along, group=group)
        return RAW

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        """Quantise an array whose axis is a multiple of the group size; without bits, return the array alone."""
        if self.bits is None:
            return (x,)
        if self.rotated:
            x = rotate(x)
        if self.along == "tokens":
            x = x.swapaxes(-1, -2)
            # A copy, because MLX 0.32 on CUDA reads a transposed view as if its numbers lay in their old order.
            x = mx.contiguous(x.reshape(*x.shape[:-1], -1, self.group))
        return tuple(mx.quantize(x, group_size=self.group, bits=self.bits))

    def decode(self, arrays: Sequence[mx.array]) -> mx.array:
        """The inverse of `encode`, up to rounding."""
        if self.bits is None:
            return arrays[0]
        if self.along == "tokens" and _is_slow_here(self.bits):
            x = _decode_channels(*arrays, group=self.group, bits=self.bits)
            return rotate(x) if self.rotated else x
        x = dequantize(*arrays, group=self.group, bits=self.bits)
        if self.along == "tokens":
            x = x.flatten(-2).swapaxes(-1, -2)
        return rotate(x) if self.rotated else x

    def tokens_of(self, codes: mx.array) -> int:
        """How many tokens ``codes`` hold that were made by an encoding that `of` returned."""
        if codes.ndim == _AXES_BY_CHANNEL:
            return codes.shape[-2] * codes.shape[-1] * _WORD // (self.bits or _WORD)
        return codes.shape[-2]

    def name(self) -> str:
        """A short name, part of the identity of every block."""
        rotated = "-rotated" if self.rotated else ""
        return "raw" if self.bits is None else f"q{self.bits}g{self.group}-{self.along}{rotated}"


RAW: Final = TensorEncoding(None)


@dataclass(frozen=True, slots=True)
class KvEncoding:
    """How keys and values are stored."""

    keys: TensorEncoding
    values: TensorEncoding


_VALUES_4: Final = TensorEncoding(4)
_EIGHT: Final = TensorEncoding(8)
ENCODINGS: Final[Mapping[KvBits, KvEncoding]] = {
    None: KvEncoding(RAW, RAW),
    8: KvEncoding(_EIGHT, _EIGHT),
    "8/4": KvEncoding(_EIGHT, _VALUES_4),
    "6/4": KvEncoding(TensorEncoding(6, "tokens"), _VALUES_4),
    4: KvEncoding(TensorEncoding(4, "tokens"), _VALUES_4),
}
"""What each setting of `EngineConfig.kv_bits` means."""


class KvCodec:
    """Encodes and decodes the segments of one model's layers.

    Args:
        encoding: a value of `EngineConfig.kv_bits`, or an encoding that no setting stands for.
        head_dims: the last axis of each tensor of a segment, by name (``"0.k"``: 128).
    """

    def __init__(self, encoding: KvBits | KvEncoding, head_dims: Mapping[str, int]) -> None:
        chosen = encoding if isinstance(encoding, KvEncoding) else ENCODINGS[encoding]
        self._head_dims = dict(head_dims)
        self._encodings = {name: chosen.keys if name.endswith(".k") else chosen.values for name in head_dims}

    def name(self) -> str:
        """The encoding of every tensor, for the root identity of blocks."""
        return ",".join(
            f"{name}[{self._head_dims[name]}]={encoding.name()}"
            for name, encoding in sorted(self._encodings.items())
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to encode."""
        return not self._encodings

    def encode(self, segment: Segment) -> Encoded:
        """Encode one segment, in which each tensor may have its own number of tokens. The result is lazy."""
        encoded: Encoded = {}
        for name, encoding in self._encodings.items():
            arrays = encoding.of(*segment[name].shape[-2:]).encode(segment[name])
            if len(arrays) == 1:
                encoded[name] = arrays[0]
            else:
                encoded.update({f"{name}.{suffix}": x for suffix, x in zip(_ARRAYS, arrays, strict=True)})
        return encoded

    def decode(self, blocks: Sequence[Encoded]) -> Segment:
        """Decode consecutive encoded segments into one. The result is lazy."""
        segment: Segment = {}
        for name in self._encodings:
            found = [self._find(name, block) for block in blocks]
            # Neighbours of one encoding are decoded together; nearly always that is all of them.
            runs = [
                encoding.decode(_join([arrays for _, arrays in run]))
                for encoding, run in groupby(found, itemgetter(0))
            ]
            segment[name] = runs[0] if len(runs) == 1 else mx.concatenate(runs, axis=-2)
        return segment

    def _find(self, name: str, block: Encoded) -> tuple[TensorEncoding, tuple[mx.array, ...]]:
        """The arrays of one tensor in an encoded segment, and their encoding."""
        if name in block:
            return RAW, (block[name],)
        arrays = tuple(block[f"{name}.{suffix}"] for suffix in _ARRAYS)
        encoding = self._encodings[name]
        return encoding.of(encoding.tokens_of(arrays[0]), self._head_dims[name]), arrays


def dequantize(codes: mx.array, scales: mx.array, biases: mx.array, *, group: int, bits: int) -> mx.array:
    """What `mx.dequantize` gives, bit for bit, in a fraction of its time on a CPU."""
    if not _is_slow_here(bits):
        return mx.dequantize(codes, scales, biases, group_size=group, bits=bits)
    numbers = _numbers(codes.view(mx.uint8), bits).reshape(*scales.shape, group)
    return (numbers.astype(scales.dtype) * scales[..., None] + biases[..., None]).flatten(-2)


def _numbers(packed: mx.array, bits: int) -> mx.array:
    """The codes that bytes hold along their last axis, each a uint8."""
    if bits == 8:
        return packed
    if bits == 4:
        # Both codes of a byte are moved into a byte of their own while it is part of a number with 16 bits.
        wide = packed.astype(mx.uint16)
        return ((wide | wide << 4) & 0x0F0F).view(mx.uint8)
    planes = mx.contiguous(packed.reshape(-1, _IN_WHOLE_BYTES[bits]).T)
    return mx.stack(_unpack(planes, bits), axis=-1)


def _decode_channels(
    codes: mx.array, scales: mx.array, biases: mx.array, *, group: int, bits: int
) -> mx.array:
    """Tokens [..., tokens, head_dim] of groups along the tokens, see the top of this file; bit for bit the same.

    The codes are brought into the order of tokens while they are bytes, which is a quarter of the work; those bytes
    that lie at the same place of each sequence of whole codes come to lie together.
    """
    *outer, channels, groups, _ = codes.shape
    packed = codes.view(mx.uint8).reshape(*outer, channels, groups, -1, _IN_WHOLE_BYTES[bits])
    axes = range(len(outer))
    first = len(outer)
    planes = mx.contiguous(packed.transpose(first + 3, *axes, first + 1, first + 2, first))
    numbers = mx.stack(_unpack(planes, bits), axis=-2).reshape(*outer, groups, group, channels)
    scales, biases = (mx.contiguous(x.squeeze(-1).swapaxes(-1, -2))[..., None, :] for x in (scales, biases))
    return (numbers.astype(scales.dtype) * scales + biases).reshape(*outer, groups * group, channels)


def _unpack(planes: mx.array, bits: int) -> list[mx.array]:
    """The codes that the bytes planes[0], planes[1], ... hold, each a uint8; the lowest bits come first."""
    if bits == 4:
        return [planes[0] & 15, planes[0] >> 4]
    if bits == 8:
        return [planes[0]]
    low, middle, high = planes
    return [low & 63, low >> 6 | (middle & 15) << 2, middle >> 4 | (high & 3) << 4, high >> 2]


def _is_slow_here(bits: int) -> bool:
    return bits in _IN_WHOLE_BYTES and mx.default_device().type == mx.DeviceType.cpu


def rotate(x: mx.array) -> mx.array:
    """Multiply the last axis by a symmetric orthogonal matrix, in float32; doing so twice gives back ``x``.

    For a width of m * 2^k, m odd, the matrix is the Kronecker product of the Householder reflection 1 - 2/m of size m
    and the Hadamard matrix of size 2^k. `mx.hadamard_transform` of other widths is not its own inverse.
    """
    width = x.shape[-1]
    power = width & -width
    odd = width // power
    y = mx.hadamard_transform(x.astype(mx.float32).reshape(*x.shape[:-1], odd, power))
    if odd > 1:
        # Added one by one: the order of a reduction may depend on how many tokens there are.
        total = y[..., 0:1, :]
        for row in range(1, odd):
            total = total + y[..., row : row + 1, :]
        y = y - total * (2 / odd)
    return y.reshape(x.shape).astype(x.dtype)


def _join(blocks: Sequence[tuple[mx.array, ...]]) -> tuple[mx.array, ...]:
    """Join the arrays of consecutive segments of one encoding along their tokens."""
    if len(blocks) == 1:
        return blocks[0]
    return tuple(mx.concatenate(list(column), axis=-2) for column in zip(*blocks, strict=True))


def nbytes(segment: Segment | Encoded) -> int:
    """Bytes of a segment, encoded or not."""
    return sum(x.nbytes for x in segment.values())
