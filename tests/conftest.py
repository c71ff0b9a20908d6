"""What all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from support import cores

from agent_memory_core.fast_blas import load_openblas

TESTS = Path(__file__).parent

pytest.register_assert_rewrite("support.conversations")
cores.keep_to_one(os.environ.get("PYTEST_XDIST_WORKER", ""))

# Before anything is imported: tests must not depend on the settings of whoever runs them, nor on the network.
_DEVICE = os.environ.get("AGENT_MEMORY_TEST_DEVICE") or os.environ.get("TESTS_RUN_ON", "")
for _name in [name for name in os.environ if name.startswith(("AGENT_MEMORY_", "SEMANTIC_"))]:
    del os.environ[_name]
# The product would refuse a variable that begins with AGENT_MEMORY_ and is no setting. This one is for xdist's workers.
os.environ["TESTS_RUN_ON"] = _DEVICE
os.environ["HF_HUB_OFFLINE"] = "1"
# TF32 multiplies float32 with 10 bits of mantissa where there are several rows, and with 23 where there is one. It is
# on by default on CUDA and on Apple's M5, and no test could then compare one row with several.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# Many test files import MLX before anything of ours, and then it would be too late.
load_openblas()
if _DEVICE:
    from support import devices

    # mlx_lm makes its stream when it is imported, on the device that is the default at that moment.
    devices.select(_DEVICE)


# A time is not a test, and a busy machine is slow.
hypothesis.settings.register_profile("without a clock", deadline=None)
hypothesis.settings.load_profile("without a clock")


def pytest_report_header() -> str:
    """The device, in the first lines of a run."""
    return f"device of the tests: {_DEVICE or 'the default of MLX'}"


@pytest.fixture
def tolerance(request: pytest.FixtureRequest) -> float:
    """How far numbers may be apart: 0 on the CPU, elsewhere what the mark `exact_on_cpu` of the test allows."""
    from support import devices

    mark = request.node.get_closest_marker("exact_on_cpu")
    assert mark is not None, "this test says no tolerance: mark it with pytest.mark.exact_on_cpu"
    return 0.0 if devices.is_exact() else float(mark.kwargs["tolerance"])


@pytest.fixture
def all_cores() -> Iterator[None]:
    """For tests of what happens at the same moment: their threads and processes may run on every core."""
    with cores.on_all():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests run first: they are quick, and what they find explains what fails after them."""
    items.sort(key=lambda item: "unit" not in item.path.relative_to(TESTS).parts)


def pytest_collection_finish() -> None:
    """Spare what the modules of all tests made: Python looks for garbage at each model's end."""
    gc.collect()
    gc.freeze()
