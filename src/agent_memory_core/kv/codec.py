"""At-rest encodings of KV: the model's dtype, or affine quantisation in one of a few forms.

A *raw* part is what `KvLayout.cut` returns: arrays of shape [layers, heads, tokens, head_dim] in the model's
dtype, named ``<group>.k`` and ``<group>.v``. An *encoded* part holds, for each of them, either the array itself
or three arrays named ``.codes`` (uint32), ``.scales`` and ``.biases`` (the model's dtype) of affine quantisation,
as `mx.quantize` defines it. Encoding happens once, when a block is sealed; decoding gives the same bits wherever
the block lay and whatever it is decoded with, so a turn resumed from memory and one resumed from disk start alike.

A `TensorForm` says how one tensor is quantised, a `KvForm` how keys and values are, and `FORMS` which of them a
setting means. The numbers that share a scale lie along one of two axes:

    head_dim   channels of one token: ``.codes`` is [layers, heads, tokens, words]
    tokens     tokens of one channel: ``.codes`` is [layers, heads, head_dim, groups, words]

Along the tokens (KIVI, arXiv 2402.02750), channels whose keys are far greater than others', as large models have
them, keep scales of their own. A rotation, which multiplies each token's vector by an orthogonal matrix before it is
quantised (QuaRot, arXiv 2404.00456), spreads such channels over all others instead. `benchmarks/quality.py` compares
the forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Final, Literal

import mlx.core as mx

from agent_memory_core.config import KvBits

Raw = dict[str, mx.array]
Encoded = dict[str, mx.array]
Bits = Literal[4, 5, 6, 8]
Axis = Literal["head_dim", "tokens"]
Group = Literal[64, 32]
AXES: Final[tuple[Axis, ...]] = ("head_dim", "tokens")
GROUPS: Final[tuple[Group, ...]] = (64, 32)
_PARTS = ("codes", "scales", "biases")
_WORD = 32
"""Bits of one element of ``codes``."""
_BY_CHANNEL = 5
"""Axes of ``codes`` whose groups lie along the tokens."""


@dataclass(frozen=True, slots=True)
class TensorForm:
    """How one tensor [layers, heads, tokens, head_dim] is kept; ``bits`` None is as it is.

    ``group`` numbers share a scale and a bias; ``along`` names the axis they lie on.
    """

    bits: Bits | None
    along: Axis = "head_dim"
    group: Group = 64
    rotated: bool = False

    def of(self, tokens: int, head_dim: int) -> TensorForm:
        """The form that a tensor of this shape takes.

        Groups that do not fit along their axis are laid along the other, then made of 32; what no group fits
        stays as it is. Groups laid along the tokens keep outlier channels apart: where that fails, they have 8 bits.
        """
        if self.bits is None or tokens == 0:
            return RAW
        axes = {"tokens": tokens, "head_dim": head_dim}
        for group in GROUPS:
            for along in sorted(AXES, key=self.along.__ne__):
                if group <= self.group and axes[along] % group == 0:
                    bits = 8 if along != self.along == "tokens" else self.bits
                    return replace(self, bits=bits, along=along, group=group)
        return RAW

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        """Quantise an array whose shape this form divides; without bits, the array alone."""
        if self.bits is None:
            return (x,)
        if self.rotated:
            x = rotate(x)
        if self.along == "tokens":
            x = x.swapaxes(-1, -2)
            x = x.reshape(*x.shape[:-1], -1, self.group)
        return tuple(mx.quantize(x, group_size=self.group, bits=self.bits))

    def decode(self, parts: Sequence[mx.array]) -> mx.array:
        """The inverse of `encode`, up to rounding."""
        if self.bits is None:
            return parts[0]
        codes, scales, biases = parts
        x = mx.dequantize(codes, scales, biases, group_size=self.group, bits=self.bits)
        if self.along == "tokens":
            x = x.flatten(-2).swapaxes(-1, -2)
        return rotate(x) if self.rotated else x

    def tokens_of(self, codes: mx.array) -> int:
        """How many tokens ``codes`` hold, encoded by `of` of this form."""
        if codes.ndim == _BY_CHANNEL:
            return codes.shape[-2] * codes.shape[-1] * _WORD // (self.bits or _WORD)
        return codes.shape[-2]

    def name(self) -> str:
        """A short name, part of the identity of every block."""
        rotated = "-rotated" if self.rotated else ""
        return "raw" if self.bits is None else f"q{self.bits}g{self.group}-{self.along}{rotated}"


RAW: Final = TensorForm(None)


@dataclass(frozen=True, slots=True)
class KvForm:
    """How keys and values are kept."""

    keys: TensorForm
    values: TensorForm


_VALUES_4: Final = TensorForm(4)
_EIGHT: Final = TensorForm(8)
FORMS: Final[Mapping[KvBits, KvForm]] = {
    None: KvForm(RAW, RAW),
    8: KvForm(_EIGHT, _EIGHT),
    "8/4": KvForm(_EIGHT, _VALUES_4),
    "6/4": KvForm(TensorForm(6, "tokens"), _VALUES_4),
    4: KvForm(TensorForm(4, "tokens"), _VALUES_4),
}
"""What each setting means."""


class KvCodec:
    """Encodes and decodes the parts of one model's layout.

    Args:
        form: what `EngineConfig.kv_bits` says, or a form of one's own.
        head_dims: width of each raw tensor by name (``"0.k"``: 128).
    """

    def __init__(self, form: KvBits | KvForm, head_dims: Mapping[str, int]) -> None:
        chosen = form if isinstance(form, KvForm) else FORMS[form]
        self._head_dims = dict(head_dims)
        self._forms = {name: chosen.keys if name.endswith(".k") else chosen.values for name in head_dims}

    def name(self) -> str:
        """The encoding of every tensor, for the root identity of blocks."""
        return ",".join(
            f"{name}[{self._head_dims[name]}]={form.name()}" for name, form in sorted(self._forms.items())
        )

    def encode(self, raw: Raw) -> Encoded:
        """Encode one block, of which each tensor may have a token count of its own. The result is lazy."""
        encoded: Encoded = {}
        for name, form in self._forms.items():
            parts = form.of(*raw[name].shape[-2:]).encode(raw[name])
            if len(parts) == 1:
                encoded[name] = parts[0]
            else:
                encoded.update({f"{name}.{part}": x for part, x in zip(_PARTS, parts, strict=True)})
        return encoded

    def decode(self, blocks: Sequence[Encoded]) -> Raw:
        """Decode consecutive blocks into one raw part. The result is lazy."""
        raw: Raw = {}
        for name in self._forms:
            found = [self._find(name, block) for block in blocks]
            # Blocks of one form, which nearly always are all, are decoded in one go.
            runs = [
                form.decode(_join([parts for _, parts in run])) for form, run in groupby(found, itemgetter(0))
            ]
            raw[name] = runs[0] if len(runs) == 1 else mx.concatenate(runs, axis=-2)
        return raw

    def _find(self, name: str, block: Encoded) -> tuple[TensorForm, tuple[mx.array, ...]]:
        """The arrays of one tensor in an encoded block, and the form they have."""
        if name in block:
            return RAW, (block[name],)
        parts = tuple(block[f"{name}.{part}"] for part in _PARTS)
        form = self._forms[name]
        return form.of(form.tokens_of(parts[0]), self._head_dims[name]), parts


def rotate(x: mx.array) -> mx.array:
    """Multiply the last axis by a symmetric orthogonal matrix, in float32: twice gives back what was.

    A width of m * 2^k takes the Kronecker product of the Householder reflection 1 - 2/m of m, and the Hadamard matrix
    of 2^k: `mx.hadamard_transform` of other widths is not its own inverse.
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
    """Put the arrays of consecutive blocks of one form together along their tokens."""
    if len(blocks) == 1:
        return blocks[0]
    return tuple(mx.concatenate(list(column), axis=-2) for column in zip(*blocks, strict=True))
