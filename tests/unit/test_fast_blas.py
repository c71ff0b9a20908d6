"""OpenBLAS is loaded before MLX on a Linux CPU, and nothing depends on it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from agent_memory_core import fast_blas
from agent_memory_core.fast_blas import (
    CORE_VARIABLE,
    OLD_CORES,
    OPENBLAS_VARIABLE,
    PACKAGE,
    _cpu_flags,
    core_of,
    load_openblas,
)
from agent_memory_core.models.loader import load_model

LOOK = """
import ctypes
{first}
from agent_memory_core.backend import require_mlx
from agent_memory_core.fast_blas import load_openblas
require_mlx()
import mlx.core as mx
assert mx.allclose(mx.ones((2, 3)) @ mx.ones((3, 2)), mx.full((2, 2), 3.0)).item()
seen = ctypes.CDLL(None)
assert not hasattr(seen, "scipy_cblas_sgemm"), "SciPy may come later, with another build of it"
print(load_openblas(), hasattr(seen, "cblas_sgemm"))
"""


def looked(first: str = "", **environ: str) -> str:
    """What a new interpreter says of the library that it has loaded."""
    clean = {
        name: value for name, value in os.environ.items() if name not in (OPENBLAS_VARIABLE, "LD_PRELOAD")
    }
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(first=first)],
        env={**clean, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LIBRARIES = dict(fast_blas._libraries())
every_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES.keys())
on_linux = pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere the system has a fast BLAS")
here = pytest.mark.skipif(
    platform.system() != "Linux" or not LIBRARIES or mx.default_device().type != mx.DeviceType.cpu,
    reason="this machine has no OpenBLAS, or MLX does not run on its CPU",
)


@here
@every_library
def test_each_library_there_is_has_its_names_seen_before_mlx(library: str) -> None:
    assert looked(**{OPENBLAS_VARIABLE: library}) == f"{library} True"


@here
def test_the_one_of_the_package_is_taken_without_being_asked_for() -> None:
    assert looked() == f"{PACKAGE} True"


@here
def test_it_is_not_loaded_when_that_would_come_too_late() -> None:
    assert looked("import mlx.core") == "None False"


CORE = """
import ctypes, os, sys
from agent_memory_core.fast_blas import CORE_NAME, PREFIX, load_openblas
load_openblas()
library = ctypes.CDLL(sys.argv[1])
ask = getattr(library, CORE_NAME, None) or getattr(library, PREFIX + CORE_NAME)
ask.restype = ctypes.c_char_p
print(ask().decode(), "OPENBLAS_CORETYPE" in os.environ)
"""


@here
@pytest.mark.parametrize(("wanted", "heirs"), [(None, False), ("Nehalem", True)])
@every_library
def test_a_cpu_that_is_newer_than_the_library_gets_kernels_of_its_kind(
    library: str, wanted: str | None, heirs: bool
) -> None:
    """Unless somebody says which. Programs that are started later inherit nothing."""
    environ = os.environ | {OPENBLAS_VARIABLE: library} | ({CORE_VARIABLE: wanted} if wanted else {})
    done = subprocess.run(
        [sys.executable, "-c", CORE, library], env=environ, capture_output=True, text=True, check=True
    )
    core, is_inherited = done.stdout.split()
    assert is_inherited == str(heirs)
    if wanted:
        assert core == wanted
    else:
        assert core not in OLD_CORES or core_of(_cpu_flags()) is None


@pytest.mark.parametrize(
    ("flags", "core"),
    [
        ("sse4_2 avx", None),
        ("avx avx2", None),
        ("avx avx2 fma", "Haswell"),
        ("avx avx2 fma avx512f", "Haswell"),
        ("avx2 fma avx512f avx512dq avx512cd avx512bw avx512vl amx_tile", "SkylakeX"),
        ("", None),
    ],
)
def test_kernels_need_what_the_cpu_has(flags: str, core: str | None) -> None:
    assert core_of(flags.split()) == core


@on_linux
@pytest.mark.parametrize("unfit", ["off", "/nowhere/libopenblas.so", "libm.so.6"])
def test_it_can_be_switched_off_and_a_library_that_is_none_is_no_error(unfit: str) -> None:
    assert looked(**{OPENBLAS_VARIABLE: unfit}) == "None False"


def dtypes(network: Any) -> set[mx.Dtype]:
    weights: Any = tree_flatten(network.parameters())
    return {x.dtype for _, x in weights if mx.issubdtype(x.dtype, mx.floating)}


@pytest.mark.model
def test_weights_are_computed_in_the_dtype_that_was_asked_for() -> None:
    stored = load_model("tiny-chat", compute_dtype="stored")
    assert dtypes(stored.model) == {mx.bfloat16}
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    auto = mx.float32 if on_cpu and load_openblas() is not None else mx.bfloat16
    assert dtypes(load_model("tiny-chat", compute_dtype="auto").model) == {auto}
    assert dtypes(load_model("tiny-chat", compute_dtype="float32").model) == {mx.float32}
    prompt = mx.array([[5, 6, 7, 8]])
    wide = load_model("tiny-chat", compute_dtype="float32").model(prompt)
    assert mx.allclose(wide, stored.model(prompt).astype(mx.float32), atol=0.5)
