"""What rounding does to attention where a few channels of the keys are far greater than the others.

Large models have such channels; tiny-chat does not. They are made here: of 128 channels a head, four have ten times
the size of the others before the rotary embedding. Four kinds are told apart:

    none      no such channels
    swinging  the great channels change their sign from token to token, around zero
    constant  each keeps its sign and a fifth of its size varies, as biases make them
    thrice    constant, and three times as great
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx
from talks import BLOCK

from agent_memory_core.kv.codec import KvCodec, KvEncoding, Segment

HEADS, TOKENS, DIM, QUERIES = 8, 1024, 128, 128
OUTLIERS, SIZE, VARIATION, SPREAD = 4, 10.0, 0.2, 3.0
"""Great channels a head; their size; what of it varies where they are constant; the logits' standard deviation."""
KINDS = ("none", "swinging", "constant", "thrice")
Errors = dict[str, float]


def keys(kind: str) -> mx.array:
    """Keys [1, heads, tokens, dim] in bfloat16, with a rotary embedding."""
    plain = mx.random.normal((1, HEADS, TOKENS, DIM))
    order = mx.argsort(mx.random.uniform(shape=(1, HEADS, 1, DIM)), axis=-1)
    signs = mx.where(mx.random.uniform(shape=(1, HEADS, 1, DIM)) > 0.5, 1.0, -1.0)
    size = SIZE * (3 if kind == "thrice" else 1)
    great = size * (plain if kind == "swinging" else signs * (1 + VARIATION * plain))
    return _rope(plain if kind == "none" else mx.where(order < OUTLIERS, great, plain)).astype(mx.bfloat16)


def errors(kind: str, encodings: Mapping[str, KvEncoding], seed: int) -> dict[str, Errors]:
    """Relative root mean square errors under each encoding.

    ``keys`` of the keys; ``logits`` of the differences between one query's logits, since what all have in common does
    not count; ``output`` of what attention gives where only the keys, and ``values`` where only the values, are
    rounded.
    """
    mx.random.seed(seed)
    raw: Segment = {"0.k": keys(kind), "0.v": mx.random.normal((1, HEADS, TOKENS, DIM)).astype(mx.bfloat16)}
    queries = _rope(mx.random.normal((1, HEADS, TOKENS, DIM)))[:, :, -QUERIES:]
    logits = _logits(queries, raw["0.k"])
    queries = queries * (SPREAD / mx.sqrt(mx.mean(logits**2)))
    logits = _logits(queries, raw["0.k"])
    output = _output(logits, raw["0.v"])
    found = {}
    for name, encoding in encodings.items():
        rounded = _through(KvCodec(encoding, {"0.k": DIM, "0.v": DIM}), raw)
        their = _logits(queries, rounded["0.k"])
        found[name] = {
            "keys": _relative(rounded["0.k"].astype(mx.float32), raw["0.k"].astype(mx.float32)),
            "logits": _relative(their, logits),
            "output": _relative(_output(their, raw["0.v"]), output),
            "values": _relative(_output(logits, rounded["0.v"]), output),
        }
    return found


def _through(codec: KvCodec, raw: Segment) -> Segment:
    starts = range(0, TOKENS, BLOCK)
    return codec.decode(
        [codec.encode({name: x[:, :, i : i + BLOCK] for name, x in raw.items()}) for i in starts]
    )


def _rope(x: mx.array) -> mx.array:
    return mx.fast.rope(x, DIM, traditional=False, base=500000.0, scale=1.0, offset=0)


def _logits(queries: mx.array, keys: mx.array) -> mx.array:
    logits = queries @ keys.astype(mx.float32).swapaxes(-1, -2) / math.sqrt(DIM)
    return logits - mx.mean(logits, axis=-1, keepdims=True)


def _output(logits: mx.array, values: mx.array) -> mx.array:
    return mx.softmax(logits, axis=-1) @ values.astype(mx.float32)


def _relative(got: mx.array, wanted: mx.array) -> float:
    return float(mx.sqrt(mx.mean((got - wanted) ** 2) / mx.mean(wanted**2)).item())
