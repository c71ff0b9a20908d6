"""The kind "state": mlx-lm's ArraysCache, whose arrays stand for all tokens so far (recurrent layers, convolutions).

A state cannot be cut at a token: it is stored and put back as a whole, never rounded. Unlike a snapshot its arrays
have one shape however many tokens there were, so that a stored state can be checked against it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from mlx_lm.models.cache import ArraysCache

from agent_memory_core.kv.layer_kind import ArrayShape, Leaf
from agent_memory_core.kv.snapshot import SnapshotLayers


@dataclass(frozen=True, slots=True)
class StateLayers(SnapshotLayers):
    """One leaf that keeps a state."""

    kind = "state"
    layer_type = "recurrent"

    @classmethod
    def key_of(cls, leaf: Leaf) -> Hashable | None:
        """A subclass of ArraysCache is not accepted: nothing is known about what it adds."""
        return SnapshotLayers.key_of(leaf) if type(leaf.cache) is ArraysCache else None

    @classmethod
    def _is_fixed(cls, leaf: Leaf, shapes: Mapping[str, ArrayShape]) -> bool:
        return shapes == leaf.first_shapes

    @property
    def notice(self) -> str:
        """Nothing: recurrent layers are expected to be so."""
        return ""
