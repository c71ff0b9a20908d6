"""How the KV of one model is laid out: its layers in groups, each of one kind.

The layout is read from the live cache objects of a model after two tokens were run through it, never from a model's
name. What a group keeps, and how it is cut and joined, only its kind knows (``layer_kind.py``). A class of cache that
no kind accepts cannot be stored at all, and the layout says so.

In records, the arrays of group number 0 have names that begin with ``0.``, and so on.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, make_prompt_cache

from agent_memory_core.blocks.block import RecordKind
from agent_memory_core.kv.append import AppendLayers
from agent_memory_core.kv.codec import Segment
from agent_memory_core.kv.layer_kind import Joining, LayerGroup, Leaf, LiveBytes, SettledLayers
from agent_memory_core.kv.snapshot import SnapshotLayers, arrays_of, attribute_shapes
from agent_memory_core.kv.state import StateLayers
from agent_memory_core.kv.window import WindowLayers

log = logging.getLogger("agent_memory")

LAYER_KINDS: list[type[LayerGroup]] = [AppendLayers, WindowLayers, StateLayers, SnapshotLayers]
"""All kinds of layers. A leaf is of the first kind that accepts it; the last one accepts nearly everything."""

Segments = Mapping[RecordKind, Iterable[Segment]]
"""Segments in token order, by the kind of record that is the home of their layers."""


class KvLayout:
    """The layers of one model, and the way of their KV out of its prompt caches and into them.

    Attributes:
        groups: all layers that can be stored, in the order of their first leaf.
        unknown: names of the cache classes that cannot be stored.
        batches: whether mlx-lm has a batched form of every class; if not, each sequence decodes alone.
    """

    def __init__(self, model: Any) -> None:
        """Run two tokens through ``model``, one after the other, and look at its caches."""
        self._model = model
        leaves = _probe(model)
        self.groups, unknown = _grouped(leaves)
        self.unknown = sorted({type(leaf.cache).__name__ for leaf in unknown})
        self.batches = all(hasattr(type(leaf.cache), "merge") for leaf in leaves)
        if self.unknown:
            log.warning(
                "this model keeps its state in %s, which cannot be stored: every turn is computed whole.",
                ", ".join(self.unknown),
            )
        else:
            for notice in sorted({group.notice for group in self.groups} - {""}):
                log.info("%s", notice)

    @property
    def live_bytes(self) -> LiveBytes:
        """How many bytes a live cache takes."""
        return sum((group.live_bytes for group in self.groups), LiveBytes())

    def dims(self, record: RecordKind) -> dict[str, int]:
        """The last axis of each array in records of this kind before it is encoded, by name."""
        return {
            f"{n}.{name}": dim for n, group in self._at_home(record) for name, dim in group.dims().items()
        }

    def empty(self, record: RecordKind, tokens: int) -> Segment:
        """Zeros in the shapes of what `cut` gives for so many tokens. They are never evaluated."""
        return _numbered((n, group.empty(tokens)) for n, group in self._at_home(record))

    def describe(self) -> str:
        """All groups in one line, for the root identity of blocks."""
        return "; ".join(group.describe() for group in self.groups)

    # -- out of a live cache ------------------------------------------------------------------------------

    def cut(self, cache: Sequence[Any], record: RecordKind, start: int, stop: int) -> Segment:
        """Copy what a record of this kind keeps of tokens [start, stop); a tail keeps something of all layers.

        The result is lazy.
        """
        leaves = _leaves(cache)
        groups = enumerate(self.groups) if record == "tail" else self._at_home(record)
        return _numbered((n, group.cut(_own(group, leaves), start, stop)) for n, group in groups)

    def holds(self, cache: Sequence[Any], position: int, fed: int) -> bool:
        """Whether a live cache that was fed ``fed`` tokens still holds all that a tail at ``position`` keeps."""
        leaves = _leaves(cache)
        return all(group.holds(_own(group, leaves), position, fed) for group in self.groups)

    # -- into a live cache --------------------------------------------------------------------------------

    def join(self, segments: Segments, length: int, room: int) -> list[Any]:
        """Build a live cache of ``length`` tokens, with space for ``room`` more. Its buffers are not waited for."""
        building = self.building(length, room)
        for home, found in segments.items():
            for segment in found:
                building.add(home, segment)
        return building.finish()

    def building(self, length: int, room: int) -> Building:
        """Do what `join` does with segments that come one after the other."""
        cache: list[Any] = make_prompt_cache(self._model)
        leaves = _leaves(cache)
        joins = [group.joining(_own(group, leaves), length, room) for group in self.groups] if length else []
        return Building(self, cache, joins)

    @property
    def may_pad(self) -> bool:
        """Whether prompts of different lengths may be evaluated in one pass, padded on the right."""
        return self.batches and not self.unknown and all(group.may_pad for group in self.groups)

    @property
    def stays_live(self) -> bool:
        """Whether a live cache can be brought into the form that restoring it would give, see `settle`."""
        return not self.unknown and all(isinstance(group, SettledLayers) for group in self.groups)

    def settle(self, cache: Sequence[Any], segments: Segments, start: int, length: int, room: int) -> None:
        """Make a live cache what `join` would build of its first ``length`` tokens' records, with the same ``room``.

        ``segments`` are the decoded blocks of those tokens from ``start`` on that were computed; all others have
        their stored form already, as has what lies behind the last block.
        """
        leaves = _leaves(cache)
        for number, group in enumerate(self.groups):
            assert isinstance(group, SettledLayers), "see `stays_live`"
            own = [_of_group(number, segment) for segment in segments[group.home]]
            group.settle(_own(group, leaves), own, start, length, room)

    def trimmed(self, cache: Sequence[Any], length: int, room: int) -> list[Any]:
        """A copy of the first ``length`` tokens of a live cache that `stays_live`, with space for ``room`` more."""
        copy: list[Any] = make_prompt_cache(self._model)
        for old, new in zip(_leaves(cache), _leaves(copy), strict=True):
            new.keys, new.values, new.offset = old.keys, old.values, old.offset
        self.settle(copy, {"block": (), "window": (), "tail": ()}, length, length, room)
        return copy

    def at_home(self, segment: Segment, record: RecordKind) -> Segment:
        """Of a tail, the arrays of those layers whose home is this kind of record."""
        numbers = {str(number) for number, _ in self._at_home(record)}
        return {name: x for name, x in segment.items() if name.partition(".")[0] in numbers}

    def fits_tail(self, arrays: Segment, tokens: int) -> bool:
        """Whether arrays that were loaded have the names, shapes and dtypes of a tail of so many tokens."""
        own = [_of_group(number, arrays) for number in range(len(self.groups))]
        return sum(map(len, own)) == len(arrays) and all(
            group.fits(found, tokens) for group, found in zip(self.groups, own, strict=True)
        )

    def arrays(self, cache: Sequence[Any]) -> list[mx.array]:
        """The arrays of a live cache, to evaluate."""
        return [x for leaf in _leaves(cache) for x in arrays_of(leaf)]

    def _at_home(self, record: RecordKind) -> Iterator[tuple[int, LayerGroup]]:
        return ((number, group) for number, group in enumerate(self.groups) if group.home == record)


class Building:
    """A live cache that is filled with segments as they come, see `KvLayout.building`."""

    def __init__(self, layout: KvLayout, cache: list[Any], joins: Sequence[Joining]) -> None:
        """``joins`` are one for each group of the layout; none at all if no token is to be put in."""
        self._homes = [group.home for group in layout.groups]
        self._cache = cache
        self._joins = joins

    def add(self, home: RecordKind, segment: Segment) -> None:
        """Take the next segment of the layers with this home."""
        for number, join in enumerate(self._joins):
            if self._homes[number] == home:
                join.add(_of_group(number, segment))

    def finish(self) -> list[Any]:
        """The live cache, after the last segment. Its buffers are not waited for."""
        for join in self._joins:
            join.finish()
        return self._cache


def _probe(model: Any) -> list[Leaf]:
    """The leaves of a model's prompt cache after two tokens."""
    cache = make_prompt_cache(model)
    model(mx.array([[0]]), cache=cache)
    first = [attribute_shapes(leaf) for leaf in _leaves(cache)]
    model(mx.array([[0]]), cache=cache)
    layers = [layer for layer, found in enumerate(cache) for _ in _opened(found)]
    found = zip(layers, _leaves(cache), first, strict=True)
    return [Leaf(index, layer, leaf, shapes) for index, (layer, leaf, shapes) in enumerate(found)]


def _grouped(leaves: Sequence[Leaf]) -> tuple[tuple[LayerGroup, ...], list[Leaf]]:
    """All groups, and the leaves that no kind accepts."""
    members: dict[tuple[type[LayerGroup], Hashable], list[Leaf]] = {}
    unknown: list[Leaf] = []
    for leaf in leaves:
        keys = ((kind, kind.key_of(leaf)) for kind in LAYER_KINDS)
        accepted = next(((kind, key) for kind, key in keys if key is not None), None)
        if accepted is None:
            unknown.append(leaf)
        else:
            members.setdefault(accepted, []).append(leaf)
    return tuple(kind.of(found) for (kind, _), found in members.items()), unknown


def _leaves(cache: Sequence[Any]) -> list[Any]:
    """Every cache object that holds arrays itself."""
    return [leaf for found in cache for leaf in _opened(found)]


def _opened(cache: Any) -> Iterator[Any]:
    if type(cache) is CacheList:
        for inner in cache.caches:
            yield from _opened(inner)
    else:
        yield cache


def _of_group(number: int, segment: Segment) -> Segment:
    """Those arrays of a segment that belong to one group, under their own names."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): x for name, x in segment.items() if name.startswith(prefix)}


def _own(group: LayerGroup, leaves: Sequence[Any]) -> list[Any]:
    return [leaves[index] for index in group.leaves]


def _numbered(segments: Iterator[tuple[int, Segment]]) -> Segment:
    """The segments of several groups in one, their names with the number of the group before them."""
    return {f"{number}.{name}": x for number, segment in segments for name, x in segment.items()}
