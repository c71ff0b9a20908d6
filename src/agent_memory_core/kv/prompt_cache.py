"""Live caches as files of mlx-lm, which `mlx_lm.generate --prompt-cache-file` and `load_prompt_cache` read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import save_prompt_cache


def write_prompt_cache(path: Path, cache: Sequence[Any], metadata: Mapping[str, str]) -> None:
    """Write a live cache in the form of the mlx-lm that is installed; its form changes between releases.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_prompt_cache(str(path), list(cache), dict(metadata))
    except RuntimeError as error:
        # MLX says so if the file cannot be opened.
        raise OSError(str(error)) from error
