"""The result file of a benchmark: what was measured, and all that is needed to compare it with another run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import DTYPE, LLAMA

# isort: split
import mlx.core as mx

from agent_memory_core.fast_blas import load_openblas

HERE = Path(__file__).parent


def argument_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--out``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json", help="the result file")
    return parser


def write_result(
    path: Path, settings: dict[str, Any], results: Any, model: dict[str, Any] | None = None
) -> None:
    """Write what was measured, where, and on which model: the random one unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": _machine(),
        "commit": _commit(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("mlx", "mlx-lm", "agent-memory-mlx")},
        "model": model or LLAMA | {"dtype": str(DTYPE).rpartition(".")[2]},
        "settings": settings,
        "results": results,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def median_of(samples: Sequence[float]) -> float:
    """The median, to a millionth: what lies beyond is noise."""
    return round(statistics.median(samples), 6)


def _machine() -> dict[str, Any]:
    """The machine: its chip and cores, its memory in bytes, its system, and what MLX says of the device it ran on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    elif shutil.which("sysctl"):
        # On a Mac this is the chip.
        cpu = _output("sysctl", "-n", "machdep.cpu.brand_string")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "platform": f"{platform.system()} {platform.machine()}",
        "macos": platform.mac_ver()[0],
        # In a process of its own: whoever forks children must not have run MLX before.
        "gflops": float(_output(sys.executable, str(HERE / "common.py"))),
        "blas": load_openblas(),
        "device": mx.default_device().type.name,
        "device_info": mx.device_info(),
    }


def _commit() -> str:
    """The commit that last changed what is measured, marked where it was changed since."""
    commit = _git("log", "-1", "--format=%h", "--abbrev=12", "--", "src") or "unknown"
    return f"{commit}-dirty" if _git("status", "--porcelain", "--", "src") else commit


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(HERE.parent), *arguments)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
