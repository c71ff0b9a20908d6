"""Whether MLX can be imported on this machine, and the first import of mlx-lm. Both happen only when asked for."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Iterator
from typing import Any

from agent_memory_core.errors import BackendMissing
from agent_memory_core.fast_blas import load_openblas

WANTED_FILES = 2048
"""Open files that a process may have at least, as far as its hard limit allows it; mlx-lm asks for the same."""

_importing = threading.Lock()


def physical_memory_bytes() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_mlx() -> None:
    """Import MLX, on a Linux CPU with OpenBLAS, and mlx-lm. The limit of open files is never lower afterwards.

    Raises:
        BackendMissing: there is no backend for this machine; the message names the extras that install one.
    """
    load_openblas()
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise BackendMissing(
            "MLX has no backend on this machine: install one with the extra cpu, cuda12 or cuda13, "
            "for example pip install 'agent-memory-mlx[cpu]'."
        ) from error
    import_mlx_lm()


def import_mlx_lm() -> None:
    """Import mlx-lm for the first time in this process, without the limits that it sets.

    `mlx_lm.utils` calls ``setrlimit(RLIMIT_NOFILE, (2048, 4096))`` when it is imported. This lowers what a server was
    given, it lowers the hard limit, which no process can raise again, and it fails where the hard limit is below 4096.
    """
    if "mlx_lm.utils" in sys.modules:
        return
    load_openblas()
    with _importing, _open_files_kept():
        import mlx_lm.utils  # noqa: F401


@contextlib.contextmanager
def _open_files_kept() -> Iterator[None]:
    """While this thread is inside, its calls that set the limit of open files only raise the soft one."""
    thread, real = threading.get_ident(), resource.setrlimit

    def setrlimit(which: int, limits: Any, /) -> None:
        if which != resource.RLIMIT_NOFILE or threading.get_ident() != thread:
            real(which, limits)
            return
        soft, hard = resource.getrlimit(which)
        raised = raised_soft_limit(soft, hard)
        if raised != soft:
            real(which, (raised, hard))

    # There is no other way: once the hard limit was lowered it stays so, and the call cannot be switched off.
    resource.setrlimit = setrlimit
    try:
        yield
    finally:
        resource.setrlimit = real


def raised_soft_limit(soft: int, hard: int) -> int:
    """The soft limit to have: at least `WANTED_FILES` where ``hard`` allows it, and never less than ``soft``."""
    if soft == resource.RLIM_INFINITY:
        return soft
    allowed = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    return max(soft, allowed)
