"""One record, in the two shapes that the store has for it: with its tensors, and as the catalog describes its file.

A record is a block, a tail, a window or a token tail, see `blocks.block`. It never changes once it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from agent_memory_core.blocks.block import BlockHash, RecordKind

Allocate = Callable[[Sequence[tuple[str, tuple[int, ...]]]], list[tuple[Any, memoryview]]]
"""From the safetensors dtypes and shapes of one record's tensors to new arrays and their writable bytes, which the
store fills. All at once, because on a GPU each call is a round trip."""


class Sized(Protocol):
    """A tensor of any library."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        ...


Tensor_co = TypeVar("Tensor_co", bound=Sized, covariant=True)


@dataclass(frozen=True, slots=True)
class HostTensor:
    """One tensor in host memory, to be written."""

    dtype: str
    """safetensors' name of the element type, for example ``BF16``"""
    shape: tuple[int, ...]
    data: memoryview
    """its elements, contiguous"""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class Record(Generic[Tensor_co]):
    """A record with its tensors: of `HostTensor` on its way to disk, of the reader's arrays on its way back."""

    key: BlockHash
    """its name: the hash of its kind, its parent and its tokens"""
    parent: BlockHash
    """the record that it follows; the root for the first block"""
    tokens: tuple[int, ...]
    """its token ids; empty in a record whose ids the catalog lost in a rebuild"""
    kind: RecordKind
    tensors: Mapping[str, Tensor_co]
    """by name, in the order in which they lie in the file"""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as the catalog describes it. The header of its file says the same, but for the token ids."""

    key: BlockHash
    """its name: the hash of its kind, its parent and its tokens"""
    parent: BlockHash
    """the record that it follows; the root for the first block"""
    root: BlockHash
    """where its chain starts"""
    tokens: tuple[int, ...]
    """its token ids; empty where a rebuild could not know them"""
    kind: RecordKind
    nbytes: int
    """size of its file, header included"""
    checksum: str
    """xxh3-128 of the file's payload, in hex"""
    ntok: int
    """how many tokens it has, also where ``tokens`` is empty"""

    @property
    def place(self) -> tuple[BlockHash, BlockHash, RecordKind, int]:
        """What cannot differ between two records of one name, unless a file lied about itself."""
        return self.root, self.parent, self.kind, self.ntok
