"""What this machine has, and what this process takes of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

from agent_memory_core.backend import physical_memory_bytes
from agent_memory_core.manager.config import MIB

_SHARE = 0.7
"""The part of the memory that all models may take together where nothing else is set."""


def default_limit() -> int:
    """Bytes for all models together: 70 % of what Metal recommends, or else of the machine's memory."""
    return int(_SHARE * (_recommended() or physical_memory_bytes()))


def _recommended() -> int | None:
    """The working set that Metal recommends, where there is Metal."""
    if platform.system() != "Darwin":
        return None
    try:
        import mlx.core as mx
    except ImportError:
        return None
    found = mx.device_info().get("max_recommended_working_set_size")
    return int(found) if found is not None else None


def gauges() -> dict[str, Any]:
    """What the process and MLX hold in all, in MiB; 0 of MLX where it was not used."""
    mlx = sys.modules.get("mlx.core")
    return {
        "process_rss_mb": round(_resident() / MIB, 1),
        "mlx_active_mb": round(mlx.get_active_memory() / MIB, 1) if mlx is not None else 0.0,
        "mlx_cache_mb": round(mlx.get_cache_memory() / MIB, 1) if mlx is not None else 0.0,
    }


def _resident() -> int:
    said = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=False
    )
    return int(said.stdout.strip() or 0) * 1024
