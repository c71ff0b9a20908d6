"""Names for addresses of this process, given to all libraries that are loaded later.

A library that was built with a prefix before its names (OpenBLAS as SciPy builds it) is not found by whoever looks for
the usual ones, and the dynamic linker takes names from libraries only. So one is made, in memory, that has nothing but
a table of names, each with an absolute address: no code and no data.

The format is that of the System V ABI, chapters 4 and 5. The value of an absolute symbol is taken as it is by glibc
since 2.28, which is older than what MLX needs.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping
from pathlib import Path

_HEADER = struct.Struct("=16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("=IIQQQQQQ")
_SYMBOL = struct.Struct("=IBBHQQ")
_ENTRY = struct.Struct("=QQ")

_SHARED_OBJECT = 3
_ABSOLUTE, _GLOBAL_FUNCTION = 0xFFF1, 0x12
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551
_READ_WRITE = 6
_HASH, _NAMES, _SYMBOLS, _SIZE_OF_NAMES, _SIZE_OF_SYMBOL = 4, 5, 6, 10, 11
_LARGEST_PAGE = 0x10000


def load_aliases(addresses: Mapping[str, int]) -> None:
    """Let every library that is loaded from now on find each of the names at its address.

    Args:
        addresses: of functions that stay where they are until the process ends, by name. A name that another library
            has given already keeps its meaning.

    Raises:
        OSError: the system gives no file in memory, or its linker takes no such library.
    """
    fd = os.memfd_create("aliases")
    os.write(fd, _library(addresses))
    # It stays open: the linker would take the next file of the same number for a library that it has.
    ctypes.CDLL(f"/proc/self/fd/{fd}", mode=ctypes.RTLD_GLOBAL)


def _library(addresses: Mapping[str, int]) -> bytes:
    names, symbols = b"\0", bytes(_SYMBOL.size)
    for name, address in addresses.items():
        symbols += _SYMBOL.pack(len(names), _GLOBAL_FUNCTION, 0, _ABSOLUTE, address, 0)
        names += name.encode() + b"\0"
    start = _HEADER.size + 3 * _SEGMENT.size
    body, dynamic = b"", {_SIZE_OF_NAMES: len(names), _SIZE_OF_SYMBOL: _SYMBOL.size}
    for tag, table in ((_SYMBOLS, symbols), (_HASH, _one_bucket(len(addresses) + 1)), (_NAMES, names)):
        dynamic[tag] = start + len(body)
        body += table + bytes(-len(table) % 8)
    entries = b"".join(_ENTRY.pack(*entry) for entry in (*dynamic.items(), (0, 0)))
    return _headers(start + len(body), len(entries)) + body + entries


def _one_bucket(symbols: int) -> bytes:
    """A hash table in which each symbol is followed by the next, so that nothing has to be hashed."""
    return struct.pack(f"={3 + symbols}I", 1, symbols, 1, 0, *range(2, symbols), 0)


def _headers(dynamic: int, nbytes: int) -> bytes:
    """The header of the file, and its segments: the whole of it, the dynamic section at ``dynamic``, and the stack."""
    with Path("/proc/self/exe").open("rb") as file:
        # Of the machine that Python was built for, and for its linker.
        identity, _, machine, version, _, _, _, flags, *_ = _HEADER.unpack(file.read(_HEADER.size))
    offsets = (0, _HEADER.size, 0)
    sizes = (_HEADER.size, _SEGMENT.size, 3, 0, 0, 0)
    whole = dynamic + nbytes
    return b"".join(
        (
            _HEADER.pack(identity, _SHARED_OBJECT, machine, version, *offsets, flags, *sizes),
            _SEGMENT.pack(_LOAD, _READ_WRITE, 0, 0, 0, whole, whole, _LARGEST_PAGE),
            _SEGMENT.pack(_DYNAMIC, _READ_WRITE, dynamic, dynamic, dynamic, nbytes, nbytes, 8),
            # Without this one the linker would ask for a stack that can be executed.
            _SEGMENT.pack(_STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16),
        )
    )
