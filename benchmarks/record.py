"""The result file of a benchmark: what was measured, and all that is needed to compare it with another run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import LLAMA

HERE = Path(__file__).parent


def argument_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--out``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json", help="the result file")
    return parser


def write_result(path: Path, settings: dict[str, Any], results: Any) -> None:
    """Write what was measured, and where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": _machine(),
        "commit": _commit(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("mlx", "mlx-lm", "agent-memory-mlx")},
        "model": LLAMA | {"dtype": "bfloat16"},
        "settings": settings,
        "results": results,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def median_of(samples: Sequence[float]) -> float:
    """The median, to a millionth: what lies beyond is noise."""
    return round(statistics.median(samples), 6)


def _machine() -> dict[str, Any]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    elif shutil.which("sysctl"):
        cpu = _output("sysctl", "-n", "machdep.cpu.brand_string")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "platform": platform.platform(), "device": str(mx.default_device())}


def _commit() -> str:
    return _output("git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12")


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
