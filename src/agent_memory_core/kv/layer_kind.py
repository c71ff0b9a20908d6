"""What a layer kind is: one way in which layers keep what they have seen, and everything that depends on it.

A model's prompt cache is a list with one mlx-lm cache object per layer; a CacheList in it holds several. The objects
that are left when those are opened are *leaves*. A leaf is of one kind:

    append    keeps a key and a value of every token                         ``append.py``
    window    keeps them for the last tokens only                            ``window.py``
    state     keeps arrays of a fixed size that stand for all tokens so far  ``state.py``
    snapshot  any other class that holds only arrays and plain values        ``snapshot.py``

A kind is a subclass of `LayerGroup` in a file of its own. Each of its instances is a group of leaves of one model that
are cut and joined together. `layout.LAYER_KINDS` lists all kinds; nothing outside a kind's own file knows its rules.

KV is stored in three kinds of records, and each layer kind has one of them as its *home*:

    block    encoded; one for each full block of tokens
    window   encoded; one for each full block near a place to resume at
    tail     not encoded; one at the end of a branch or at a checkpoint

A tail holds something of every kind: of the first two the tokens after the last full block, of the third all it keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import mlx.core as mx

from agent_memory_core.blocks.block import RecordKind
from agent_memory_core.blocks.resume_policy import ResumeRequirement
from agent_memory_core.kv.codec import Segment

ArrayShape = tuple[tuple[int, ...], mx.Dtype]
"""Shape and dtype of one array."""


def shapes_of(arrays: Mapping[str, mx.array]) -> dict[str, ArrayShape]:
    """Shape and dtype of each array, by name."""
    return {name: (tuple(x.shape), x.dtype) for name, x in arrays.items()}


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a model's prompt cache, as it is after two tokens were run through the model, one by one."""

    index: int
    """Its number among all leaves of the prompt cache."""
    layer: int
    """The place in the prompt cache that it belongs to."""
    cache: Any
    """The object of mlx-lm."""
    first_shapes: Mapping[str, ArrayShape] = field(default_factory=dict)
    """Its arrays as they were after the first token, by the path of their attribute."""


@dataclass(frozen=True, slots=True)
class TokenShape:
    """The shape of the keys and values of one token in one leaf."""

    heads: int
    key_dim: int
    value_dim: int
    """0 if the leaf keeps no values."""
    dtype: mx.Dtype
    window: int | None = None
    """How many tokens the leaf keeps; None means all."""

    @property
    def nbytes(self) -> int:
        """Bytes of one token."""
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.size


@dataclass(frozen=True, slots=True)
class LiveBytes:
    """How many bytes live caches take."""

    per_token: int = 0
    """For each token."""
    per_window_token: int = 0
    """For each of the last ``window`` tokens."""
    window: int = 0
    """How many tokens before the next one the longest window covers."""
    fixed: int = 0
    """However many tokens there are."""

    def __add__(self, other: LiveBytes) -> LiveBytes:
        return LiveBytes(
            self.per_token + other.per_token,
            self.per_window_token + other.per_window_token,
            max(self.window, other.window),
            self.fixed + other.fixed,
        )


class Joining(Protocol):
    """New live caches of a group, which are filled with what records hold, segment by segment."""

    def add(self, segment: Segment) -> None:
        """Take what `LayerGroup.cut` gave for the next tokens. Only those added before are waited for."""
        ...

    def finish(self) -> None:
        """Set the arrays of the caches: all segments were added, and the last of them ends where the caches are to."""
        ...


class LayerGroup(ABC):
    """Leaves of one kind that are cut and joined together.

    Where a method takes ``caches``, they are the group's own leaves of a live cache, in the order of ``leaves``. The
    names of arrays are the group's own; `KvLayout` puts the group's number before them.
    """

    __slots__ = ()

    kind: ClassVar[str]
    """Its name, as in "append"."""
    layer_type: ClassVar[str]
    """The word for such layers in model profiles, one of `cache_spec.LAYER_TYPES`."""
    home: ClassVar[RecordKind]
    """The record kind that holds the full blocks of these leaves; "tail" if only tails hold anything of them."""
    may_pad: ClassVar[bool] = False
    """Whether tokens may be followed by padding in a batch, since what follows a token changes nothing of it."""
    layers: tuple[int, ...]
    """Which layers the leaves belong to, as places in the prompt cache."""
    leaves: tuple[int, ...]
    """The numbers of the leaves among all leaves."""

    # -- which leaves belong to it ------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def key_of(cls, leaf: Leaf) -> Hashable | None:
        """None if a leaf is not of this kind. Leaves with equal keys form one group."""

    @classmethod
    @abstractmethod
    def of(cls, leaves: Sequence[Leaf]) -> Self:
        """The group of leaves that have one key."""

    @abstractmethod
    def describe(self) -> str:
        """One line that two groups share exactly if their records may be exchanged."""

    @property
    def notice(self) -> str:
        """What a user should know about these layers; empty if there is nothing to say."""
        return ""

    # -- rules and sizes ----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def requirement(self) -> ResumeRequirement:
        """What these leaves need in order to be resumed."""

    @property
    @abstractmethod
    def live_bytes(self) -> LiveBytes:
        """How many bytes they take in a live cache."""

    @property
    def shape(self) -> TokenShape | None:
        """The shape of one token's keys and values; None if they are not kept token by token."""
        return None

    def dims(self) -> dict[str, int]:
        """The last axis of each array that is encoded in block or window records, by name."""
        return {}

    def empty(self, tokens: int) -> Segment:
        """Zeros in the shapes that `cut` gives for so many tokens of a home record. They are never evaluated."""
        return {}

    # -- out of a live cache and into one -----------------------------------------------------------------

    @abstractmethod
    def holds(self, caches: Sequence[Any], position: int, fed: int) -> bool:
        """Whether live caches that were fed ``fed`` tokens still hold what a tail at ``position`` needs of them."""

    @abstractmethod
    def cut(self, caches: Sequence[Any], start: int, stop: int) -> Segment:
        """Copy what these leaves keep of tokens [start, stop). The result is lazy, and shares no buffer with them."""

    @abstractmethod
    def join(self, caches: Sequence[Any], segments: Sequence[Segment], length: int, room: int) -> None:
        """Fill new caches with ``length`` tokens; buffers that grow get space for ``room`` more.

        ``segments`` are what `cut` gave for consecutive ranges of tokens, the last of which ends at ``length``. They
        hold every token, or at least those of the window; for layers that keep a whole state there is exactly one.
        """

    def joining(self, caches: Sequence[Any], length: int, room: int) -> Joining:
        """Do what `join` does with segments that come one after the other.

        A kind whose segments need not all be there at once has a `Joining` of its own.
        """
        return _Collected(self, caches, length, room)

    @abstractmethod
    def fits(self, arrays: Segment, tokens: int) -> bool:
        """Whether arrays that were loaded have the names, shapes and dtypes of a tail of so many tokens."""


@dataclass(frozen=True, slots=True)
class _Collected:
    """Segments that wait for the last of them."""

    group: LayerGroup
    caches: Sequence[Any]
    length: int
    room: int
    segments: list[Segment] = field(default_factory=list)

    def add(self, segment: Segment) -> None:
        self.segments.append(segment)

    def finish(self) -> None:
        self.group.join(self.caches, self.segments, self.length, self.room)


class SettledLayers(LayerGroup):
    """Leaves whose live caches can be kept: `settle` is proven to give the bits that `join` gives."""

    __slots__ = ()

    @abstractmethod
    def settle(
        self, caches: Sequence[Any], segments: Sequence[Segment], start: int, length: int, room: int
    ) -> None:
        """Put ``segments``, the stored form of tokens from ``start`` on, in the place of what was computed.

        The caches keep ``length`` tokens in buffers of their own, with space for ``room`` more.
        """
