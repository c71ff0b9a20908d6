"""OpenBLAS for MLX on a Linux CPU, whose wheel brings the reference BLAS: in float32 that is 20 times slower.

MLX looks its BLAS up by name. A library that was loaded before it, with its names visible to all, is found first. So
one that the system has, or a package of the index brought, is loaded before MLX is imported for the first time. On
Metal and CUDA nothing is loaded: matrix work runs elsewhere there.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import logging
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, files

log = logging.getLogger("agent_memory")

OPENBLAS_VARIABLE = "AGENT_MEMORY_OPENBLAS"
"""The path of a library to load instead, or ``off`` to load none."""

PACKAGE = "ngsolve-openblas"
"""A distribution whose library has the standard names. It needs the system's libgfortran.so.5."""

CPU_BACKEND = "mlx-cpu"
"""The distribution that is installed with MLX exactly where it runs on a Linux CPU."""


@cache
def load_openblas() -> str | None:
    """Load OpenBLAS for MLX, once in a process; return the path or name of the library, None if there is none.

    Nothing is loaded where MLX was imported already, because that would come too late, or does not run on the CPU.
    """
    if platform.system() != "Linux" or "mlx.core" in sys.modules or not _runs_on_cpu():
        return None
    for library in _libraries():
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            log.info("%s could not be loaded: %s", library, error)
        else:
            return library
    return None


def _runs_on_cpu() -> bool:
    try:
        distribution(CPU_BACKEND)
    except PackageNotFoundError:
        return False
    return True


def _libraries() -> Iterator[str]:
    """Where an OpenBLAS may be: the system's first, because that suits its other libraries."""
    wanted = os.environ.get(OPENBLAS_VARIABLE)
    if wanted:
        yield from [] if wanted == "off" else [wanted]
        return
    if (found := ctypes.util.find_library("openblas")) is not None:
        yield found
    try:
        parts = files(PACKAGE) or []
    except PackageNotFoundError:
        return
    yield from (str(part.locate()) for part in parts if part.name.startswith("libopenblas"))
