"""What the operating system says of this process, and what is given back to it."""

from __future__ import annotations

import ctypes
import resource
import sys


def peak_bytes() -> int:
    """The most bytes of physical memory that the process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_freed_memory() -> bool:
    """Give memory that is not used any more back to the system, and say whether this platform can be asked to.

    glibc keeps what was freed below what is still in use. Under load, with requests and caches of every length, that
    grew by half of what is in use within minutes. Other systems give it back by themselves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True
