"""The kind "snapshot": any other cache class that holds only arrays and plain values, such as ChunkedKVCache.

Nothing is known about what the attributes of such a leaf mean, so they are stored and put back as a whole. mlx-lm's own
``state`` is not used: its form has changed between releases and has no version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from agent_memory_core.blocks.resume_policy import ResumeRequirement, WholeState
from agent_memory_core.kv.codec import Segment
from agent_memory_core.kv.layer_kind import ArrayShape, LayerGroup, Leaf, LiveBytes, shapes_of

SCALARS = "scalars"
"""The array that holds the attributes that are no arrays: JSON as bytes."""

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class SnapshotLayers(LayerGroup):
    """One leaf that is stored as a whole."""

    kind = "snapshot"
    layer_type = "snapshot"
    home = "tail"

    layers: tuple[int, ...]
    leaves: tuple[int, ...]
    name: str
    """Name of its class."""
    arrays: Mapping[str, ArrayShape]
    """Its arrays after two tokens, by the path of their attribute."""
    fixed: bool = False
    """Whether their shapes do not depend on the number of tokens."""

    @classmethod
    def key_of(cls, leaf: Leaf) -> Hashable | None:
        """Each leaf is a group of its own."""
        return leaf.index if _is_plain(leaf.cache) else None

    @classmethod
    def of(cls, leaves: Sequence[Leaf]) -> Self:
        """The group of one leaf."""
        (leaf,) = leaves
        shapes = attribute_shapes(leaf.cache)
        fixed = cls._is_fixed(leaf, shapes)
        return cls((leaf.layer,), (leaf.index,), type(leaf.cache).__name__, shapes, fixed)

    @classmethod
    def _is_fixed(cls, leaf: Leaf, shapes: Mapping[str, ArrayShape]) -> bool:
        return False

    def describe(self) -> str:
        """Kind, class, and the names and dtypes of its arrays, with their shapes if those are fixed."""
        arrays = (f"{n}:{list(s) if self.fixed else len(s)}:{d}" for n, (s, d) in self.arrays.items())
        return f"{self.kind} leaf={self.leaves[0]} {self.name} {','.join(arrays)}"

    @property
    def notice(self) -> str:
        """That such layers can only be resumed at a few places."""
        return f"this model's {self.name} is stored as a whole, at checkpoints and at the ends of turns."

    @property
    def requirement(self) -> ResumeRequirement:
        """All of it."""
        return WholeState()

    @property
    def live_bytes(self) -> LiveBytes:
        """As many as after two tokens: how they grow is not known."""
        return LiveBytes(fixed=sum(math.prod(shape) * dtype.size for shape, dtype in self.arrays.values()))

    def holds(self, caches: Sequence[Any], position: int, fed: int) -> bool:
        """Only if no token was fed after ``position``: what is summed up cannot be taken back."""
        return fed == position

    def cut(self, caches: Sequence[Any], start: int, stop: int) -> Segment:
        """Copy everything that the leaf keeps now, which has to be after ``stop`` tokens."""
        arrays, scalars = _attributes(caches[0])
        text = json.dumps(scalars, sort_keys=True).encode()
        segment = {name: mx.contiguous(x) for name, x in arrays.items()}
        return segment | {SCALARS: mx.array(list(text), dtype=mx.uint8)}

    def join(self, caches: Sequence[Any], segments: Sequence[Segment], length: int, room: int) -> None:
        """Set every attribute of the leaf."""
        (segment,) = segments
        _restore_attributes(caches[0], segment)

    def fits(self, arrays: Segment, tokens: int) -> bool:
        """Whether the plain values are there, and the arrays too if their shapes are fixed."""
        if SCALARS not in arrays:
            return False
        found = shapes_of(arrays)
        return not self.fixed or all(found.get(name) == shape for name, shape in self.arrays.items())


def arrays_of(cache: Any) -> list[mx.array]:
    """All arrays among the attributes of a leaf."""
    return list(_attributes(cache)[0].values())


def attribute_shapes(cache: Any) -> dict[str, ArrayShape]:
    """Shapes and dtypes of the arrays of a leaf, by the path of their attribute."""
    return shapes_of(dict(sorted(_attributes(cache)[0].items())))


def _attributes(cache: Any) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays of a leaf by path, and all else: a list is recorded as its type and length, and then its items."""
    found = [pair for name, value in getattr(cache, "__dict__", {}).items() for pair in _walk(name, value)]
    arrays = {path: value for path, value in found if isinstance(value, mx.array)}
    return arrays, {path: value for path, value in found if path not in arrays}


def _walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        yield path, [type(value).__name__, len(value)]
        for index, item in enumerate(value):
            yield from _walk(f"{path}.{index}", item)
    else:
        yield path, value


def _is_plain(cache: Any) -> bool:
    """Whether arrays, plain values and lists of them are all that a leaf holds."""
    return hasattr(cache, "__dict__") and all(map(_is_storable, vars(cache).values()))


def _is_storable(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_storable, value))
    return isinstance(value, (mx.array, *_PLAIN))


def _restore_attributes(cache: Any, segment: Segment) -> None:
    """The inverse of `_attributes`, onto a new leaf of the same class."""
    scalars: dict[str, Any] = json.loads(bytes(segment[SCALARS].tolist()))  # type: ignore[arg-type]

    def make(path: str) -> Any:
        if path not in scalars:
            return segment[path]
        value = scalars[path]
        if isinstance(value, list):
            items = [make(f"{path}.{index}") for index in range(value[1])]
            return tuple(items) if value[0] == "tuple" else items
        return value

    for name in vars(cache):
        setattr(cache, name, make(name))
