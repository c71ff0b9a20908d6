"""The only room that knows mlx-lm's cache classes: which layers keep what, and how to cut and join it.

A model's prompt cache is a list with one object per layer; a CacheList in it holds several. What is left when
those are opened are *leaves*, and every leaf is of one kind:

    append    KVCache: one key and one value per token; any range of tokens can be cut out and put back
    window    RotatingKVCache: the same for the last tokens only. A window of n covers the token that is evaluated
              and n - 1 before it, its *reach*; older ones are gone or of no use
    state     ArraysCache: arrays that sum up all tokens so far; they can be put back only whole
    snapshot  any other class whose attributes are arrays and plain values (ChunkedKVCache, ...): put back whole

The plan is derived from the live cache objects after two tokens were run through them, never from a model's
name. Append and window leaves of one shape and dtype form a *group*, and a group's keys (and values) of a token
range travel as one array stacked over its leaves. Kinds are found by exact class, since a subclass may keep
its tokens in another order. A class that holds anything else cannot be stored at all, and the layout says so.

mlx-lm's own ``state`` is never stored: its form changed between releases without a version.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from agent_memory_core.kv.codec import Raw

log = logging.getLogger("agent_memory")

GROW = 256
"""mlx-lm's KVCache grows by this many tokens; buffers made here end on the same step."""

SCALARS = "scalars"
"""The tensor that holds what a whole leaf keeps beside arrays: JSON as bytes."""

LayerKind = Literal["append", "window", "state", "snapshot"]
Shapes = dict[str, tuple[tuple[int, ...], mx.Dtype]]
_PLAIN = (bool, int, float, str, type(None))


def round_up(tokens: int, step: int = GROW) -> int:
    """The least multiple of ``step`` that is not below ``tokens``."""
    return -(-tokens // step) * step


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """Leaves that keep keys and values per token, of one kind, shape and dtype.

    ``layers`` index the prompt cache, ``leaves`` the opened one. ``window`` is how many tokens are kept, None for
    all. ``value_dim`` 0 means that there are no values.
    """

    kind: LayerKind
    layers: tuple[int, ...]
    leaves: tuple[int, ...]
    heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    window: int | None = None

    def describe(self) -> str:
        """One line that two groups share exactly when their blocks may be exchanged."""
        leaves = ",".join(map(str, self.leaves))
        text = (
            f"{self.kind} leaves={leaves} heads={self.heads} k={self.key_dim} v={self.value_dim} {self.dtype}"
        )
        return text + (f" window={self.window}" if self.window else "")

    @property
    def reach(self) -> int:
        """Tokens before the next one that still matter to it; 0 where all do."""
        return self.window - 1 if self.window else 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all leaves of the group, in a live cache."""
        return len(self.leaves) * self.heads * (self.key_dim + self.value_dim) * self.dtype.size

    def dims(self, number: int) -> dict[str, int]:
        """Width of each tensor that is kept, by name, for the group of this number."""
        values = {f"{number}.v": self.value_dim} if self.value_dim else {}
        return {f"{number}.k": self.key_dim} | values


@dataclass(frozen=True, slots=True)
class WholeLeaf:
    """A leaf that is kept whole or not at all. ``arrays`` are what two tokens left in it, by name.

    ``fixed`` says that their shapes do not depend on the number of tokens.
    """

    kind: LayerKind
    layers: tuple[int, ...]
    leaf: int
    name: str
    arrays: Shapes
    fixed: bool

    def describe(self) -> str:
        """One line that two leaves share exactly when their states may be exchanged."""
        said = ",".join(
            f"{name}:{list(s) if self.fixed else len(s)}:{d}" for name, (s, d) in self.arrays.items()
        )
        return f"{self.kind} leaf={self.leaf} {self.name} {said}"

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays after two tokens."""
        return sum(_product(shape) * dtype.size for shape, dtype in self.arrays.values())


Group = TokenGroup | WholeLeaf


class KvLayout:
    """How the KV of one model is laid out, and the way in and out of its prompt caches.

    ``groups`` number the tensors: a token group's are ``<number>.k`` and ``<number>.v``, a whole leaf's
    ``<number>.<array>``. ``unknown`` names the classes that cannot be stored. ``batches`` says that every class
    has a batched form in mlx-lm; where it has none, each sequence decodes alone.
    """

    def __init__(self, model: Any) -> None:
        """Probe ``model`` with two tokens, one after the other."""
        self._model = model
        probe = make_prompt_cache(model)
        model(mx.array([[0]]), cache=probe)
        leaves = list(_leaves(probe))
        whole = [index for index, (_, leaf) in enumerate(leaves) if not _by_token(leaf)]
        plain = [index for index in whole if _is_plain(leaves[index][1])]
        self.unknown = sorted({type(leaves[index][1]).__name__ for index in whole if index not in plain})
        self.tokens = tuple(_token_groups(leaves))
        before = {index: _shapes(leaves[index][1]) for index in plain}
        model(mx.array([[0]]), cache=probe)
        self.whole = tuple(_whole_leaf(index, *leaves[index], before[index]) for index in plain)
        self.groups: tuple[Group, ...] = (*self.tokens, *self.whole)
        self.num_layers = len(probe)
        if self.unknown:
            log.warning(
                "this model keeps its state in %s, which cannot be stored: every turn is computed whole.",
                ", ".join(self.unknown),
            )
        elif kept := sorted({leaf.name for leaf in self.whole if leaf.kind == "snapshot"}):
            log.info(
                "this model's %s is kept whole, at checkpoints and at the ends of turns.", ", ".join(kept)
            )
        self.batches = all(hasattr(type(leaf), "merge") for _, leaf in leaves)

    @property
    def reach(self) -> int:
        """The longest reach of a window; 0 where no layer has one."""
        return max((group.reach for group in self.tokens), default=0)

    @property
    def bytes_per_token(self) -> int:
        """Bytes by which a live cache grows with every token."""
        return sum(group.bytes_per_token for group in self.tokens if not group.window)

    @property
    def window_bytes(self) -> int:
        """Bytes of one token in the layers that keep a window of them."""
        return sum(group.bytes_per_token for group in self.tokens if group.window)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of a live cache that do not depend on the number of tokens."""
        return sum(leaf.nbytes for leaf in self.whole)

    def dims(self, kind: LayerKind) -> dict[str, int]:
        """Width of each raw tensor by name, of all groups of a kind."""
        return {
            name: dim
            for number, group in enumerate(self.tokens)
            if group.kind == kind
            for name, dim in group.dims(number).items()
        }

    def describe(self) -> str:
        """The layer plan, for the root identity of blocks."""
        return "; ".join(group.describe() for group in self.groups)

    # -- out of a live cache ------------------------------------------------------------------------------

    def cut(self, cache: Sequence[Any], start: int, stop: int) -> Raw:
        """Copy the KV of tokens [start, stop) of every append layer. The result is lazy."""
        leaves = [leaf for _, leaf in _leaves(cache)]
        raw: Raw = {}
        for number, group in self._of("append"):
            raw |= _stack(number, group, leaves, lambda x, leaf: x[0, :, start:stop])
        return raw

    def cut_window(self, cache: Sequence[Any], start: int, stop: int) -> Raw:
        """Copy the KV of tokens [start, stop) of every window layer; of more than its reach, the last ones."""
        leaves = [leaf for _, leaf in _leaves(cache)]
        raw: Raw = {}
        for number, group in self._of("window"):
            first = max(start, stop - group.reach)
            raw |= _stack(number, group, leaves, lambda x, leaf, first=first: _range(leaf, x, first, stop))
        return raw

    def reaches(self, cache: Sequence[Any], position: int) -> bool:
        """Whether every window layer of a live cache still holds its window as it was after ``position`` tokens."""
        leaves = [leaf for _, leaf in _leaves(cache)]
        return all(
            leaves[leaf].offset - _kept(leaves[leaf]) <= max(0, position - group.reach)
            for _, group in self._of("window")
            for leaf in group.leaves
        )

    def snapshot(self, cache: Sequence[Any]) -> Raw:
        """Everything that the state and snapshot layers keep now."""
        leaves = [leaf for _, leaf in _leaves(cache)]
        raw: Raw = {}
        for number, found in enumerate(self.whole, len(self.tokens)):
            arrays, scalars = _taken_apart(leaves[found.leaf])
            said = json.dumps(scalars, sort_keys=True).encode()
            raw |= {f"{number}.{name}": mx.contiguous(x) for name, x in arrays.items()}
            raw[f"{number}.{SCALARS}"] = mx.array(list(said), dtype=mx.uint8)
        return raw

    # -- into a live cache --------------------------------------------------------------------------------

    def join(
        self, parts: Sequence[Raw], windows: Sequence[Raw], whole: Raw, length: int, room: int
    ) -> list[Any]:
        """Build a live cache of ``length`` tokens, with space for ``room`` more.

        ``parts`` are consecutive pieces of the append layers, ``windows`` of the window layers up to their last
        token, ``whole`` is what `snapshot` gave. Every leaf gets a buffer of its own: views into one shared
        buffer would all be copied at the first write. The last part may hold more tokens than are wanted. The
        buffers are lazy.
        """
        cache: list[Any] = make_prompt_cache(self._model)
        if length == 0:
            return cache
        leaves = [leaf for _, leaf in _leaves(cache)]
        capacity = round_up(length + room)
        for number, group in self._of("append"):
            for row, leaf in enumerate(group.leaves):
                _fill(
                    leaves[leaf],
                    group,
                    number,
                    lambda name, row=row: _assemble(parts, name, row, length, capacity),
                )
                leaves[leaf].offset = length
        for number, group in self._of("window"):
            kept = min(length, group.reach)
            for row, leaf in enumerate(group.leaves):
                _fill(
                    leaves[leaf],
                    group,
                    number,
                    lambda name, row=row, kept=kept: _last(windows, name, row, kept, length),
                )
                leaves[leaf].offset, leaves[leaf]._idx = length, leaves[leaf].keys.shape[2]
        for number, found in enumerate(self.whole, len(self.tokens)):
            _put_together(leaves[found.leaf], whole, f"{number}.")
        return cache

    def arrays(self, cache: Sequence[Any]) -> list[mx.array]:
        """The arrays behind a live cache, to evaluate."""
        return [x for _, leaf in _leaves(cache) for x in _arrays(leaf)]

    def _of(self, kind: LayerKind) -> Iterator[tuple[int, TokenGroup]]:
        return ((number, group) for number, group in enumerate(self.tokens) if group.kind == kind)


# -- leaves -----------------------------------------------------------------------------------------------


def _leaves(cache: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Every cache object that holds arrays itself, with the index of its layer."""
    for layer, found in enumerate(cache):
        yield from ((layer, leaf) for leaf in _opened(found))


def _opened(cache: Any) -> Iterator[Any]:
    if type(cache) is CacheList:
        for part in cache.caches:
            yield from _opened(part)
    else:
        yield cache


def _by_token(leaf: Any) -> bool:
    """Whether a leaf keeps one key and one value per token, in an order that is known."""
    if type(leaf) is RotatingKVCache:
        return not leaf.keep and leaf.keys.dtype == leaf.values.dtype
    return type(leaf) is KVCache and leaf.keys is not None and leaf.keys.dtype == leaf.values.dtype


def _token_groups(leaves: Sequence[tuple[int, Any]]) -> Iterator[TokenGroup]:
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, (_, leaf) in enumerate(leaves):
        if _by_token(leaf):
            found.setdefault(_group_key(leaf), []).append(index)
    for key, indices in found.items():
        layers = tuple(dict.fromkeys(leaves[index][0] for index in indices))
        kind, heads, key_dim, value_dim, dtype, window = key
        yield TokenGroup(kind, layers, tuple(indices), heads, key_dim, value_dim, dtype, window)


def _group_key(leaf: Any) -> tuple[Any, ...]:
    rotates = type(leaf) is RotatingKVCache
    return (
        "window" if rotates else "append",
        leaf.keys.shape[1],
        leaf.keys.shape[3],
        leaf.values.shape[3],
        leaf.keys.dtype,
        leaf.max_size if rotates else None,
    )


def _whole_leaf(index: int, layer: int, leaf: Any, before: Shapes) -> WholeLeaf:
    shapes = _shapes(leaf)
    kind: LayerKind = "state" if type(leaf) is ArraysCache else "snapshot"
    return WholeLeaf(kind, (layer,), index, type(leaf).__name__, shapes, kind == "state" and shapes == before)


def _shapes(leaf: Any) -> Shapes:
    arrays, _ = _taken_apart(leaf)
    return {name: (tuple(x.shape), x.dtype) for name, x in sorted(arrays.items())}


def _is_plain(leaf: Any) -> bool:
    """Whether arrays, plain values and lists of them are all that a leaf holds."""
    return hasattr(leaf, "__dict__") and all(map(_is_storable, vars(leaf).values()))


def _is_storable(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_storable, value))
    return isinstance(value, (mx.array, *_PLAIN))


def _taken_apart(leaf: Any) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays of a whole leaf by path, and its other attributes; a list stands as its length and its items."""
    arrays: dict[str, mx.array] = {}
    scalars: dict[str, Any] = {}

    def take(path: str, value: Any) -> None:
        if isinstance(value, mx.array):
            arrays[path] = value
        elif isinstance(value, (list, tuple)):
            scalars[path] = [type(value).__name__, len(value)]
            for index, item in enumerate(value):
                take(f"{path}.{index}", item)
        else:
            scalars[path] = value

    for name, value in vars(leaf).items():
        take(name, value)
    return arrays, scalars


def _put_together(leaf: Any, raw: Raw, prefix: str) -> None:
    """The inverse of `_taken_apart`, onto a new leaf of the same class."""
    scalars: dict[str, Any] = json.loads(bytes(raw[prefix + SCALARS].tolist()))  # type: ignore[arg-type]

    def make(path: str) -> Any:
        if path not in scalars:
            return raw[prefix + path]
        value = scalars[path]
        if isinstance(value, list):
            items = [make(f"{path}.{index}") for index in range(value[1])]
            return tuple(items) if value[0] == "tuple" else items
        return value

    for name in vars(leaf):
        setattr(leaf, name, make(name))


def _arrays(leaf: Any) -> list[mx.array]:
    if not hasattr(leaf, "__dict__"):
        return []

    def within(value: Any) -> list[mx.array]:
        if isinstance(value, (list, tuple)):
            return [x for item in value for x in within(item)]
        return [value] if isinstance(value, mx.array) else []

    return [x for value in vars(leaf).values() for x in within(value)]


# -- keys and values --------------------------------------------------------------------------------------


def _stack(number: int, group: TokenGroup, leaves: Sequence[Any], part: Any) -> Raw:
    """The parts of a group's leaves [heads, tokens, dim], stacked; of one leaf alone a stack would be a view."""
    raw: Raw = {
        f"{number}.k": mx.contiguous(mx.stack([part(leaves[i].keys, leaves[i]) for i in group.leaves]))
    }
    if f"{number}.v" in group.dims(number):
        raw[f"{number}.v"] = mx.contiguous(
            mx.stack([part(leaves[i].values, leaves[i]) for i in group.leaves])
        )
    return raw


def _kept(leaf: Any) -> int:
    """Tokens that a window leaf holds."""
    return int(leaf._idx) if leaf._idx >= leaf.offset else int(leaf.keys.shape[2])


def _range(leaf: Any, x: mx.array, start: int, stop: int) -> mx.array:
    """Tokens [start, stop) of a window leaf's keys or values, [heads, tokens, dim]."""
    first = leaf.offset - _kept(leaf)
    assert first <= start, f"tokens from {start} are wanted and those before {first} are gone"
    ordered: mx.array = leaf._temporal_order(x)
    return ordered[0, :, start - first : stop - first]


def _fill(leaf: Any, group: TokenGroup, number: int, make: Any) -> None:
    leaf.keys = make(f"{number}.k")
    if group.value_dim:
        leaf.values = make(f"{number}.v")
    else:
        leaf.values = mx.zeros((*leaf.keys.shape[:3], 0), leaf.keys.dtype)


def _assemble(parts: Sequence[Raw], name: str, row: int, length: int, capacity: int) -> mx.array:
    """One leaf's buffer [1, heads, capacity, dim]: its row of every part, then zeros."""
    pieces: list[mx.array] = []
    left = length
    for part in parts:
        take = min(left, part[name].shape[2])
        pieces.append(part[name][row : row + 1, :, :take])
        left -= take
    assert left == 0, f"{left} tokens of {length} have no KV"
    _, heads, _, dim = pieces[0].shape
    pieces.append(mx.zeros((1, heads, capacity - length, dim), pieces[0].dtype))
    return mx.concatenate(pieces, axis=2)


def _last(parts: Sequence[Raw], name: str, row: int, kept: int, length: int) -> mx.array:
    """One leaf's window [1, heads, tokens, dim]: the last ``kept`` tokens of its row of every part.

    A full window begins with the token that the next one takes the place of: here, zeros.
    """
    joined = mx.concatenate([part[name][row : row + 1] for part in parts], axis=2)
    assert joined.shape[2] >= kept, f"{kept - joined.shape[2]} tokens of a window have no KV"
    joined = joined[:, :, joined.shape[2] - kept :]
    return mx.pad(joined, [(0, 0), (0, 0), (min(1, length - kept), 0), (0, 0)])


def slice_tokens(raw: Raw, start: int, stop: int) -> Raw:
    """Tokens [start, stop) of a raw part. The result is lazy."""
    return {name: x[:, :, start:stop] for name, x in raw.items()}


def nbytes(part: Raw) -> int:
    """Bytes of a raw or encoded part."""
    return sum(x.nbytes for x in part.values())


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
