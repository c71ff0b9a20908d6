"""Whether MLX can be imported on this machine. Nothing is imported before it is asked."""

from __future__ import annotations

from agent_memory_core.errors import BackendMissing


def require_mlx() -> None:
    """Import MLX.

    Raises:
        BackendMissing: there is no backend for this machine; the message names the extras that install one.
    """
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise BackendMissing(
            "MLX has no backend on this machine: install one with the extra cpu, cuda12 or cuda13, "
            "for example pip install 'agent-memory-mlx[cpu]'."
        ) from error
