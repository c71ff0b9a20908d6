"""What a step of the engine may take for a moment, besides weights, blocks and live caches.

A forward pass holds the activations of about one layer for each of its tokens, and where attention is not fused the
scores of each of them against all tokens before it; sampling holds the logits of its rows. Rows that join a batch, or
leave it, are copied together with the others. All of it is given back when the step ends. What is stated here is a
bound from the model's shapes, so that it is known before a step begins.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from mlx.nn.layers.base import Module

_LAYER = re.compile(r"\blayers\.\d+")
_FLOAT = 4
"""Bytes of a number, in the widest dtype that is used on the way."""
_IN_FLIGHT = 2
"""Layers whose results may be there at one time: a backend begins with the next one before it frees the last."""
_COPIES_OF_SCORES = 3
"""Scores, their exponentials, and the mask that was added."""
_COPIES_OF_LOGITS = 4
"""Logits, log-probabilities, and what sorting them for sampling takes."""
_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "top_k")
"""Names under which models say how many experts a token meets."""


class WorkingSet:
    """The bound for one model."""

    def __init__(self, model: Any) -> None:
        widths: dict[str, int] = defaultdict(int)
        experts = _experts(model)
        for name, module in model.named_modules():
            found = _LAYER.search(name)
            widths[found[0] if found else ""] += _width(module, experts)
        outside = widths.pop("", 0)
        self._per_token = _IN_FLIGHT * _FLOAT * max(widths.values(), default=outside)
        self._per_row = _COPIES_OF_LOGITS * _FLOAT * _vocabulary(model)
        self._heads = _attribute(model, ("num_attention_heads", "n_heads", "num_heads"), 1)

    def nbytes(self, tokens: int, longest: int, rows: int, copied: int) -> int:
        """Bytes that a step may take.

        Args:
            tokens: most tokens of one forward pass.
            longest: tokens of the longest sequence.
            rows: most rows that are sampled at once, or tokens of a prompt's last chunk.
            copied: bytes of the live caches that may be copied.
        """
        scores = _COPIES_OF_SCORES * _FLOAT * self._heads * longest
        return tokens * (self._per_token + scores) + rows * self._per_row + copied


def _width(module: Module, experts: int) -> int:
    """How many numbers a layer gives for one token."""
    weight = module.get("weight")
    if weight is None or weight.ndim < 2 or "Embedding" in type(module).__name__:
        return 0
    # A matrix for each expert comes first.
    return int(weight.shape[-2]) * (experts if weight.ndim > 2 else 1)


def _experts(model: Any) -> int:
    return _attribute(model, _EXPERTS, 1)


def _vocabulary(model: Any) -> int:
    return _attribute(model, ("vocab_size",), 2**18)


def _attribute(model: Any, names: tuple[str, ...], otherwise: int) -> int:
    """The greatest number that a model's arguments, or those of the text model inside it, have under these names."""
    places = [getattr(part, "args", None) for part in (model, getattr(model, "language_model", None))]
    found = [getattr(place, name, None) for place in places for name in names]
    return max((value for value in found if isinstance(value, int)), default=otherwise)
