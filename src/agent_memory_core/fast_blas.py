"""OpenBLAS for MLX on a Linux CPU, whose wheel brings the reference BLAS: in float32 that is 20 times slower.

MLX looks its BLAS up by name. A library that was loaded before it, with its names visible to all, is found first. So
the one that the extra ``cpu`` brings, or else one that the system has, is loaded before MLX is imported for the first
time. On Metal and CUDA nothing is loaded: matrix work runs elsewhere there.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import ctypes.util
import logging
import os
import platform
import sys
from collections.abc import Collection, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, files
from pathlib import Path
from typing import Any

from agent_memory_core.symbol_aliases import load_aliases

log = logging.getLogger("agent_memory")

OPENBLAS_VARIABLE = "AGENT_MEMORY_OPENBLAS"
"""The path of a library to load instead, or ``off`` to load none."""

PACKAGE = "scipy-openblas32"
"""OpenBLAS as the developers of SciPy build it, for x86-64 and ARM: it needs no other library, not even Fortran's."""

PREFIX = "scipy_"
"""Stands before every name in the library of `PACKAGE`, so that it can live beside other ones."""

PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
"""What MLX calls for products of matrices. Its linear algebra stays with the LAPACK of its own wheel."""

CORE_VARIABLE = "OPENBLAS_CORETYPE"
"""The kernels that OpenBLAS takes, by its own names of CPUs; set by whoever knows better."""

CORE_NAME = "openblas_get_corename"
"""The function that tells which kernels it has taken."""

OLD_CORES = frozenset(
    {
        "Katmai",
        "Coppermine",
        "Northwood",
        "Prescott",
        "Banias",
        "Core2",
        "Penryn",
        "Dunnington",
        "Nehalem",
        "Sandybridge",
        "Atom",
        "Generic",
    }
)
"""What it takes for CPUs without AVX2, and for those that are newer than it (version 0.3.21 on a Xeon of 2023)."""

CPU_BACKEND = "mlx-cpu"
"""The distribution that is installed with MLX exactly where it runs on a Linux CPU."""


@cache
def load_openblas() -> str | None:
    """Load OpenBLAS for MLX, once in a process; return the name of its package or library, None if there is none.

    Nothing is loaded where MLX was imported already, because that would come too late, or does not run on the CPU.
    """
    if platform.system() != "Linux" or "mlx.core" in sys.modules or not _runs_on_cpu():
        return None
    for name, library in _libraries():
        try:
            _load(library)
        except OSError as error:
            log.info("%s could not be loaded: %s", library, error)
        else:
            return name
    return None


def _load(library: str) -> None:
    core = None if CORE_VARIABLE in os.environ else _better_core(library)
    if core is not None:
        os.environ[CORE_VARIABLE] = core
    try:
        loaded = ctypes.CDLL(library)
    finally:
        # Of the library alone: programs that this one starts decide for themselves.
        if core is not None:
            del os.environ[CORE_VARIABLE]
    if _function(loaded, PRODUCTS[0]) is not None:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    else:
        # Its own names stay unseen: SciPy, which may come later, has another build with the same ones.
        load_aliases({name: _address(loaded, PREFIX + name) for name in PRODUCTS})


def _function(loaded: ctypes.CDLL, name: str) -> Any:
    """A function of a library, None if it has none of this name."""
    return getattr(loaded, name, None)


def _address(loaded: ctypes.CDLL, name: str) -> int:
    function = _function(loaded, name)
    if function is None:
        raise OSError(f"the library has no {name}")
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def _better_core(library: str) -> str | None:
    """The kernels to ask for where a library takes those of a CPU without AVX2, though this one has it."""
    loaded = ctypes.CDLL(library)
    ask = _function(loaded, CORE_NAME) or _function(loaded, PREFIX + CORE_NAME)
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    try:
        return core_of(_cpu_flags()) if ask().decode() in OLD_CORES else None
    finally:
        # Which kernels it takes is decided once, when it is loaded.
        _ctypes.dlclose(loaded._handle)


def core_of(flags: Collection[str]) -> str | None:
    """The kernels of OpenBLAS for a CPU with these flags of ``/proc/cpuinfo``; None where its own choice is as good."""
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(flags):
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= set(flags) else None


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])


def _runs_on_cpu() -> bool:
    try:
        distribution(CPU_BACKEND)
    except PackageNotFoundError:
        return False
    return True


def _libraries() -> Iterator[tuple[str, str]]:
    """The name and the path of each OpenBLAS that there may be: that of the package first, which is the newest."""
    wanted = os.environ.get(OPENBLAS_VARIABLE)
    if wanted:
        yield from [] if wanted == "off" else [(wanted, wanted)]
        return
    with contextlib.suppress(PackageNotFoundError):
        parts = files(PACKAGE) or []
        yield from (
            (PACKAGE, str(part.locate())) for part in parts if part.match("lib/libscipy_openblas*.so")
        )
    if (found := ctypes.util.find_library("openblas")) is not None:
        yield found, found
